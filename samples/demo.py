"""The main job on a small model: convert once, look at what budgets buy, run at two of them.

Run it with `make demo`. Every command is printed before it runs; the artifact stays in demo/.
"""

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = "samples/tiny-llama"
PROMPT = "def read(path):"
N_BUDGETS = 6


def main(artifact: str = "demo/tiny-llama") -> None:
    """Convert, plan, run."""
    begin = time.monotonic()
    show("convert", SAMPLE, "-o", artifact, "--force")
    show("inspect", artifact)
    budgets = plan_budgets(artifact)
    for budget in (budgets[0], budgets[-1]):
        show("run", artifact, "--budget", budget, "-p", PROMPT, "-n", "64", "--temperature", "0.7")
    print(f"\nThe artifact is in {artifact}; the command line is .venv/bin/edgekit. ", end="")
    print(f"The demo took {time.monotonic() - begin:.0f} s.")


def plan_budgets(artifact: str) -> list[str]:
    """Print what budgets from the lowest to the highest depth load; return those budgets."""
    quality = ask("inspect", artifact)["quality"]
    roomy = ask("plan", artifact, "--budget", "64GiB")
    rest = roomy["total_bytes"] - roomy["weights_bytes"]
    low, high = quality[0]["weights_bytes"] + rest, roomy["total_bytes"]
    mib = [-(-(low + (high - low) * i // (N_BUDGETS - 1)) // 2**20) for i in range(N_BUDGETS)]
    print(f"\n$ edgekit plan {artifact} --budget ...   (context {roomy['context']})\n")
    print(f"{'budget':>8}  {'weights':>8}  {'bits per weight':>15}  {'expected KL':>11}")
    for size in mib:
        plan = ask("plan", artifact, "--budget", f"{size}MiB")
        weights = f"{plan['weights_bytes'] / 2**20:.1f} MiB"
        bits, kl = plan["bits_per_weight"], plan["expected_kl"]
        print(f"{size:>4} MiB  {weights:>8}  {bits:>15.2f}  {kl:>11.2g}")
    return [f"{size}MiB" for size in mib]


def show(*words: str) -> None:
    """Print a command, then run it."""
    print(f"\n$ edgekit {shlex.join(words)}\n", flush=True)
    subprocess.run(command(words), check=True, cwd=ROOT)


def ask(*words: str) -> dict[str, Any]:
    """The JSON that a command prints."""
    done = subprocess.run(command((*words, "--json")), check=True, cwd=ROOT, stdout=subprocess.PIPE)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def command(words: tuple[str, ...]) -> list[str]:
    """The argument list of an edgekit command in this environment."""
    return [str(Path(sys.executable).with_name("edgekit")), *words]


if __name__ == "__main__":
    try:
        main(*sys.argv[1:2])
    except subprocess.CalledProcessError as error:  # the command has said why
        sys.exit(error.returncode)
