"""Commands of the peers: run to their end, timed, and what they say where they fail."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
TIMEOUT_SECONDS = 3600


class Failed(Exception):
    """A peer's tool ended with an error; the text is its last line."""


def timed(words: Sequence[object], log: Path) -> tuple[float, int]:
    """Run a command; seconds and peak resident bytes, by the kernel's count.

    Raises:
        Failed: It ended with an error or took too long.
    """
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["EDGEKIT_CACHE"] = str(log.parent / "cache")
    peak = log.with_suffix(".peak")
    command = [sys.executable, HERE / "peak.py", peak, TIMEOUT_SECONDS, *words]
    started = time.perf_counter()
    with log.open("wb") as file:
        done = subprocess.run(
            [str(word) for word in command], stdout=file, stderr=subprocess.STDOUT, env=environment
        )
    seconds = time.perf_counter() - started
    if done.returncode != 0:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        raise Failed(lines[-1][-300:] if lines else f"exit code {done.returncode}")
    return seconds, int(peak.read_text())
