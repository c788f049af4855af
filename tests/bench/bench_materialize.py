"""Materialize against copying: `edgekit.materialize` at a tier, beside a copy of the file it makes.

Both write to the same folder, sync and rename, in turns; the page cache is warm for both, and the
artifact's parts were hashed before, which is remembered. Prints one JSON line last.

    python tests/bench/bench_materialize.py llama-edge --tier Q4_K
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from artifacts import shape_artifact

from edgekit.artifact import open_artifact
from edgekit.materialize import materialize
from edgekit.plan import plan_tier

COPY_BYTES = 1 << 20


def copy(source: Path, target: Path) -> float:
    """Seconds to copy as materialize writes: a temporary name, fsync, rename."""
    started, partial = time.perf_counter(), target.with_name(target.name + ".partial")
    with source.open("rb") as old, partial.open("wb") as new:
        while block := old.read(COPY_BYTES):
            new.write(block)
        new.flush()
        os.fsync(new.fileno())
    partial.replace(target)
    return time.perf_counter() - started


def make(folder: Path, tier: str, target: Path, threads: int) -> float:
    """Seconds from opening the artifact to the renamed file."""
    started = time.perf_counter()
    with open_artifact(folder, remember=True) as artifact:
        depths = plan_tier(artifact, tier).depths
        materialize(artifact, depths, target, force=True, n_threads=threads)
    return time.perf_counter() - started


def main() -> None:
    """Alternate and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("artifact", type=Path, nargs="?", help="default: one is made")
    parser.add_argument("--tier", default="Q4_K")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder")
    args = parser.parse_args()
    artifact = args.artifact or Path(shape_artifact())
    report = compare(artifact, args.tier, args.pairs, args.threads, args.folder)
    print(json.dumps({"benchmark": "materialize", "artifact": artifact.name, **report}))


def compare(
    artifact: Path, tier: str, pairs: int, threads: int, parent: Path | None
) -> dict[str, Any]:
    """Alternate ``pairs`` times."""
    rows = []
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        made, copied = Path(folder) / "made.gguf", Path(folder) / "copied.gguf"
        make(artifact, tier, made, threads)  # warms the page cache
        for _ in range(pairs):
            seconds = make(artifact, tier, made, threads), copy(made, copied)
            rows.append(seconds)
            copied.unlink()
            print(f"materialize {seconds[0]:.2f} s, copy {seconds[1]:.2f} s")
        size = made.stat().st_size
    ratios = [ours / theirs for ours, theirs in rows]
    return {
        "tier": tier,
        "threads": threads,
        "bytes": size,
        "materialize_seconds": [round(ours, 3) for ours, _ in rows],
        "copy_seconds": [round(theirs, 3) for _, theirs in rows],
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
    }


if __name__ == "__main__":
    main()
