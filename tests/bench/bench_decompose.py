"""Decomposition: time against a full SVD, error per byte against the reference, cost per weight.

The reference takes one full SVD per level; its time is that of one on the same matrix, in this run.
Errors are relative Frobenius errors on Gaussian matrices and on ones whose rows and columns differ
in size. Prints one JSON line last.

    OPENBLAS_NUM_THREADS=1 python tests/bench/bench_decompose.py --size 4096
"""

import argparse
import io
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from edgekit.codecs import CODECS
from edgekit.codecs.chunks import CHUNK_WEIGHTS
from edgekit.codecs.job import Job, one_by_one
from edgekit.kernels.bitstack_level import Level, to_bytes
from edgekit.kernels.bitstack_rows import add_levels
from edgekit.kernels.decompose import Settings, decompose
from edgekit.kernels.decompose_ref import RANK, decompose_ref
from edgekit.sensitivity import Sensitivity

LEVELS = 8


def matrices(size: int) -> dict[str, np.ndarray]:
    """A Gaussian matrix, and one with rows and columns of different sizes."""
    random = np.random.default_rng(0)
    rows, cols = (np.exp(0.5 * random.standard_normal(size)) for _ in range(2))
    plain = random.standard_normal((size, size))
    return {"gaussian": plain.astype(np.float32),
            "uneven": (plain * rows[:, None] * cols).astype(np.float32)}  # fmt: skip


def curve(levels: Iterable[Level], weights: np.ndarray) -> dict[str, Any]:
    """Bits per weight and relative error after each level, and the seconds that levels took."""
    total, bits, errors, seconds = np.zeros_like(weights), [], [], []
    levels, started = iter(levels), time.perf_counter()
    while (level := next(levels, None)) is not None:
        seconds.append(time.perf_counter() - started)
        add_levels([level], total)
        bits.append(8 * len(to_bytes(level)) / weights.size + (bits[-1] if bits else 0.0))
        errors.append(float(np.linalg.norm(weights - total) / np.linalg.norm(weights)))
        started = time.perf_counter()
    return {"bits": bits, "errors": errors, "seconds": seconds}


@dataclass(frozen=True, eq=False)
class Random:
    """A tensor of random BF16 weights."""

    size: int
    name = "blk.0.ffn_down.weight"
    source_type = "BF16"
    quantizable = True

    @property
    def shape(self) -> tuple[int, int]:
        """Square."""
        return self.size, self.size

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Raw rows."""
        values = 0.02 * np.random.default_rng(0).standard_normal(self.shape, np.float32)
        bits = (values.view(np.uint32) >> 16).astype(np.uint16)
        return bits.view(np.uint8).reshape(self.size, -1)[start:stop]


def encode_cost(codec: str, size: int = 3072) -> float:
    """Nanoseconds of processor time per weight of a tensor with a codec's default tiers."""
    random = np.random.default_rng(1)
    rows, cols = (np.exp(random.standard_normal(size)).astype(np.float32) for _ in range(2))
    row = CODECS[codec]
    job = Job(row.tiers, CHUNK_WEIGHTS, None, Sensitivity(rows, cols[None]))
    started = time.process_time()
    row.encode(Random(size), job, io.BytesIO(), one_by_one)
    return 1e9 * (time.process_time() - started) / size**2


def main() -> None:
    """Time and compare, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--reference-size", type=int, default=768, help="for errors per byte")
    args = parser.parse_args()
    weights = matrices(args.size)["gaussian"]
    ours = curve(decompose(weights, 3, Settings(rank=RANK, halves=True)), weights)
    default = curve(decompose(weights, LEVELS), weights)
    started = time.perf_counter()
    np.linalg.svd(np.abs(weights), full_matrices=False)
    full = time.perf_counter() - started
    level = float(np.median(ours["seconds"]))
    print(f"{args.size} x {args.size}: full SVD {full:.1f} s, a level of rank {RANK} {level:.2f} s")
    errors = {}
    for name, matrix in matrices(args.reference_size).items():
        reference = curve(decompose_ref(matrix, LEVELS), matrix)
        mine = curve(decompose(matrix, 2 * LEVELS), matrix)
        at = np.exp(np.interp(reference["bits"], [0, *mine["bits"]],
                              np.log([1, *mine["errors"]])))  # fmt: skip
        errors[name] = {"reference": reference, "ours": mine,
                        "ratio_at_its_bytes": (at / reference["errors"]).tolist()}  # fmt: skip
        print(
            name,
            "error at the reference's bytes over its own:",
            np.round(at / reference["errors"], 3),
        )
    with threadpool_limits(1, "blas"):
        costs = {codec: encode_cost(codec) for codec in CODECS}
    print("ns per weight of a whole tensor:", costs)
    report = {
        "benchmark": "decompose",
        "encode_ns_per_weight": costs,
        "size": args.size,
        "full_svd_seconds": full,
        "level_seconds": level,
        "speed_up": full / level,
        "default": default,
        "ns_per_weight_and_level": 1e9 * float(np.median(default["seconds"])) / weights.size,
        "errors": errors,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
