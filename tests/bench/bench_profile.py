"""Predictions against measurements: `edgekit profile --measure` on artifacts, as one table.

    python tests/bench/bench_profile.py [ARTIFACT...] [--context 1024]

Each artifact is tried at five budgets, each in a process of its own, after the machine was probed.
A speed is predicted from the machine's profile and the other budgets' timings, memory from the plan
alone. On a busy machine give it the processors: `chrt -r 1 python ...`. Prints a
JSON line last.
"""

import argparse
import json
import subprocess
import sys
from typing import Any

from artifacts import SAMPLES, sample_artifact

MIB = 1 << 20
HEADINGS = (
    "artifact", "budget, MiB", "memory, predicted", "peak, measured", "decode, predicted",
    "measured", "ratio", "prompt, predicted", "measured", "ratio", "load, s", "resize, s",
    "back, s",
)  # fmt: skip


def measure(artifact: str, context: int) -> dict[str, Any]:
    """The data of the profile."""
    words = [sys.executable, "-m", "edgekit", "profile", artifact, "--measure", "--json"]
    words += ["--context", str(context), "--device", "pixel-8"]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
    body: dict[str, Any] = json.loads(done.stdout)
    return body


def cells(name: str, check: dict[str, Any]) -> list[str]:
    """A row."""
    trial = check["trial"]
    row = [name, *(f"{trial[key] / MIB:.1f}" for key in ("budget_bytes", "planned_bytes"))]
    row.append(f"{trial['peak_bytes'] / MIB:.1f}")
    for key in ("decode_tokens_per_s", "prompt_tokens_per_s"):
        row += [f"{check[key]:.5g}", f"{trial[key]:.5g}", f"{check[key] / trial[key]:.3f}"]
    times = ("load_seconds", "resize_seconds", "return_seconds")
    return [*row, *(f"{trial[key]:.2f}" for key in times)]


def main() -> None:
    """Measure, print the table and the line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("artifacts", nargs="*", help="default: both samples")
    parser.add_argument("--context", type=int, default=1024)
    options = parser.parse_args()
    artifacts = options.artifacts or map(sample_artifact, SAMPLES)
    found = {artifact: measure(artifact, options.context) for artifact in artifacts}
    print("|", " | ".join(HEADINGS), "|")
    print("|", " | ".join("---" for _ in HEADINGS), "|")
    for body in found.values():
        for check in body["measured"]["checks"]:
            print("|", " | ".join(cells(body["artifact"]["name"], check)), "|")
    print(json.dumps({name: body["measured"]["checks"] for name, body in found.items()}))


if __name__ == "__main__":
    main()
