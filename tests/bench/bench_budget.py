"""The budget as a hard limit: `edgekit run` in memory control groups of exactly the budget.

    python tests/bench/bench_budget.py [ARTIFACT...] [--budgets 12] [--context 2048]

Budgets go from the smallest that fits to the one with everything at its highest tier. Each run
must end with exit code 0. The prompt fills a batch, so that every buffer is used. Predicted: the
plan's total. Measured: the most the process held resident, and the most the group was charged,
which also counts the parent that waits and file pages, but not libraries that others had read.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from artifacts import SAMPLES, sample_artifact
from cgroups import Group, memory_group

PROMPT = "def read(path):\n    return open(path).read()\n\n\n" * 40  # fills a batch of 512
EDGEKIT = str(Path(sys.executable).with_name("edgekit"))
MIB = 1 << 20


def plan(artifact: str, budget: int, context: int) -> dict[str, Any] | str:
    """The plan, or the line that says why there is none."""
    words = [EDGEKIT, "plan", artifact, "--budget", str(budget), "--context", str(context)]
    done = subprocess.run([*words, "--json"], capture_output=True, text=True)
    if done.returncode == 0:
        body: dict[str, Any] = json.loads(done.stdout)
        return body
    return done.stderr


def budgets(artifact: str, context: int, n: int) -> list[int]:
    """From the smallest that fits to the top depth, evenly in ratio."""
    refusal, top = plan(artifact, 1, context), plan(artifact, 1 << 50, context)
    assert isinstance(refusal, str) and isinstance(top, dict)
    match = re.search(r"give --budget (\d+)MiB", refusal)
    assert match, refusal
    least, most = int(match[1]) * MIB, -(-top["total_bytes"] // MIB) * MIB
    return [round(least * (most / least) ** (i / (n - 1))) for i in range(n)]


def measure(artifact: str, budget: int, context: int, prompt: str, group: Group) -> dict[str, Any]:
    """One run inside the group."""
    group.limit(budget)
    group.forget()
    words = [EDGEKIT, "run", artifact, "--budget", str(budget), "--context", str(context)]
    words += ["-n", "64", "-p", prompt, "--ignore-eos", "--json"]
    process = group.start(words)
    out, err = process.communicate()
    row: dict[str, Any] = {"budget": budget, "exit": process.returncode}
    if process.returncode:
        return row | {"error": err.strip().splitlines()[-1:]}
    body = json.loads(out)
    return row | {
        "predicted": body["plan"]["total_bytes"],
        "weights": body["plan"]["weights_bytes"],
        "batch": body["plan"]["batch"],
        "peak_rss": body["peak_rss_bytes"],
        "group_peak": group.peak,
        "n_prompt": body["n_prompt"],
        "n_gen": body["n_gen"],
        "changes": len(body["changes"]),
        "load_seconds": body["load_seconds"],
    }


def show(row: dict[str, Any]) -> None:
    """One line."""
    if row["exit"]:
        print(f"{row['budget'] / MIB:9.1f}  exit {row['exit']} {row['error']}")
        return
    cells = (row[key] / MIB for key in ("budget", "predicted", "peak_rss", "group_peak"))
    print("".join(f"{cell:11.1f}" for cell in cells), f"{row['changes']:4}", flush=True)


def main() -> None:
    """Run, print a table per artifact, and the JSON line last."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifacts", nargs="*", help="default: both samples")
    parser.add_argument("--budgets", type=int, default=12)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--short", action="store_true", help="a prompt of a few tokens instead")
    options = parser.parse_args()
    prompt = PROMPT[:15] if options.short else PROMPT
    results = {}
    with memory_group("edgekit-bench", 1 << 40) as group:
        for artifact in options.artifacts or map(sample_artifact, SAMPLES):
            print(f"{artifact}\n{'budget':>11}{'predicted':>11}{'peak rss':>11}{'group':>11}  MiB")
            sizes = budgets(artifact, options.context, options.budgets)
            results[artifact] = rows = []
            for size in sizes:
                rows.append(measure(artifact, size, options.context, prompt, group))
                show(rows[-1])
            words = [EDGEKIT, "run", artifact, "--budget", str(sizes[0] - MIB), "-p", "x"]
            words += ["--context", str(options.context)]
            below = subprocess.run(words, capture_output=True, text=True)
            print(f"  below: exit {below.returncode}: {below.stderr.strip()}")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
