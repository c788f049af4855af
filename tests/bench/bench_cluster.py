"""A conversion on a local Ray cluster of two nodes against threads: seconds, and the same bytes.

A checkpoint of a real shape with random weights is converted by two threads of this machine, then
by a cluster of two nodes with one processor each, which runs on the same processors: what it costs
more is Ray's overhead. Without statistics and measurements, which run in one place either way. The
cluster's start is counted apart. Prints one JSON line last.

    python tests/bench/bench_cluster.py --shape llama-3.2-1b --codec bitstack --tiers Q2_K,B1
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
from pathlib import Path
from typing import Any

from checkpoints import SHAPES, make_checkpoint

from edgekit.convert import convert
from edgekit.convert_options import Options
from edgekit.progress import Silent


def hashes(folder: Path) -> dict[str, str]:
    """Of every file."""
    found = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def timed(checkpoint: Path, artifact: Path, **options: Any) -> tuple[float, dict[str, str]]:
    """Seconds of a conversion, and what it made, which is removed."""
    started = time.perf_counter()
    convert(checkpoint, artifact, Options(statistics=False, measure=False, **options), Silent())
    seconds, found = time.perf_counter() - started, hashes(artifact)
    shutil.rmtree(artifact)
    return seconds, found


def main() -> None:
    """Convert twice, compare, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.2-1b-2-layers")
    parser.add_argument("--codec", default="bitstack")
    parser.add_argument("--tiers", default="Q2_K,B1")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    args = parser.parse_args()
    from ray.cluster_utils import Cluster

    logging.disable(logging.WARNING)
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    chosen = {"tiers": tuple(args.tiers.split(",")), "codec": args.codec, "jobs": 2}
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        folder = Path(temporary)
        checkpoint = make_checkpoint(folder / "model", SHAPES[args.shape])
        n_bytes = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
        alone, wanted = timed(checkpoint, folder / "edge", **chosen)
        print(f"two threads: {alone:.1f} s", flush=True)
        started = time.perf_counter()
        head = {"num_cpus": 1, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        cluster.add_node(num_cpus=1)
        begun = time.perf_counter() - started
        ray = {"engine": "ray", "address": cluster.address}
        together, found = timed(checkpoint, folder / "edge", **chosen, **ray)
        cluster.shutdown()
    print(f"two nodes: {together:.1f} s, started in {begun:.1f} s")
    report = {"benchmark": "cluster", **vars(args), "checkpoint_bytes": n_bytes,
              "threads_seconds": alone, "cluster_seconds": together, "start_seconds": begun,
              "overhead": together / alone - 1, "same_bytes": found == wanted}  # fmt: skip
    print(json.dumps(report, default=str))


if __name__ == "__main__":
    main()
