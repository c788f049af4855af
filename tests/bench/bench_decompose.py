"""Decomposition: time against a full SVD, error per byte against the reference, cost per weight.

The reference takes one full SVD per level; its time is that of one on the same matrix, in this run.
Errors are relative Frobenius errors on Gaussian matrices and on ones whose rows and columns differ
in size. Prints one JSON line last.

    OPENBLAS_NUM_THREADS=1 python tests/bench/bench_decompose.py --size 4096
"""

import argparse
import json
import time
from collections.abc import Iterable
from typing import Any

import numpy as np

from edgekit.kernels.bitstack_level import Level, to_bytes
from edgekit.kernels.bitstack_rows import add_levels
from edgekit.kernels.decompose import Settings, decompose
from edgekit.kernels.decompose_ref import RANK, decompose_ref

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
    report = {
        "benchmark": "decompose",
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
