"""A conversion on a local Ray cluster of two nodes against threads: seconds, and the same bytes.

A checkpoint, or one of a real shape with random weights, is converted with one job, with two, and
by a cluster of two nodes with one processor each, in turn. The cluster runs on the processors that
two jobs have: what it costs more is Ray's overhead. Without statistics and measurements, which run
in one place either way. The cluster's start is counted apart. Prints one JSON line last.

    python tests/bench/bench_cluster.py --shape llama-3.2-1b --layers 4 --codec bitstack
"""

import argparse
import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from checkpoints import SHAPES, make_checkpoint

from edgekit.convert import convert
from edgekit.convert_options import Options
from edgekit.progress import Silent

NODE = {"num_cpus": 1, "object_store_memory": 128 << 20}  # jobs pass no objects, only numbers


def hashes(folder: Path) -> dict[str, str]:
    """Of every file."""
    found = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def timed(checkpoint: Path, artifact: Path, options: Options) -> tuple[float, dict[str, str]]:
    """Seconds of a conversion, and what it made, which is removed."""
    started = time.perf_counter()
    convert(checkpoint, artifact, options, Silent())
    seconds, found = time.perf_counter() - started, hashes(artifact)
    shutil.rmtree(artifact)
    return seconds, found


@contextmanager
def two_nodes() -> Iterator[str]:
    """The address of a cluster on this machine."""
    from ray.cluster_utils import Cluster

    logging.disable(logging.WARNING)
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    cluster = Cluster(initialize_head=True, head_node_args=NODE | {"include_dashboard": False})
    try:
        cluster.add_node(**NODE)
        yield cluster.address
    finally:
        cluster.shutdown()


def parse() -> argparse.Namespace:
    """What to convert, and how."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--checkpoint", type=Path, help="instead of a shape")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.2-1b")
    parser.add_argument("--layers", type=int, default=2, help="of the shape")
    parser.add_argument("--codec", default="bitstack")
    parser.add_argument("--tiers", default="Q2_K,B1")
    parser.add_argument("--runs", type=int, default=1, help="of each, in turn")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    return parser.parse_args()


def main() -> None:
    """Convert in three ways, compare, report."""
    args = parse()
    tiers = tuple(args.tiers.split(","))
    one = Options(tiers=tiers, codec=args.codec, jobs=1, statistics=False, measure=False)
    seconds: dict[str, list[float]] = {"one_job": [], "two_jobs": [], "two_nodes": []}
    made, starts = [], []
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        folder = Path(temporary)
        shape = replace(SHAPES[args.shape], num_hidden_layers=args.layers)
        checkpoint = args.checkpoint or make_checkpoint(folder / "model", shape)
        n_bytes = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))

        def note(way: str, options: Options) -> None:
            took, found = timed(checkpoint, folder / "edge", options)
            print(f"{way}: {took:.1f} s", flush=True)
            seconds[way].append(took)
            made.append(found)

        for _ in range(args.runs):
            note("one_job", one)
            note("two_jobs", replace(one, jobs=2))
            started = time.perf_counter()
            with two_nodes() as address:
                starts.append(time.perf_counter() - started)
                note("two_nodes", replace(one, jobs=2, engine="ray", address=address))
    alone, threads, cluster = (median(runs) for runs in seconds.values())
    if args.checkpoint:
        args.shape = args.layers = None  # those of the checkpoint
    report: dict[str, Any] = {
        "benchmark": "cluster", **vars(args), "checkpoint_bytes": n_bytes, "seconds": seconds,
        "start_seconds": starts, "threads_speed_up": alone / threads,
        "cluster_speed_up": alone / cluster, "cluster_overhead": cluster / threads - 1,
        "same_bytes": all(found == made[0] for found in made),
    }  # fmt: skip
    print(json.dumps(report, default=str))


if __name__ == "__main__":
    main()
