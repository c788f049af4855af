"""Packed bitstack levels times x on a GPU, against dense bf16 and against rebuilding the weight.

At sizes of real layers, batches 1, 4 and 16, depths 1 to 6: microseconds, and the share of the
card's memory bandwidth that the bytes moved make. The roofline of a product is the larger of its
bytes over the bandwidth and its operations over the tensor cores' peak. `rebuild` is the original's
approach: write the dense weight, then multiply. `nested` times blocks of ggml's types the same way.
The answer is checked before anything is timed. Prints one JSON line last.

    python tests/bench/bench_bitstack_gpu.py
"""

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from edgekit.kernels.bitstack_level import Level
from edgekit.kernels.bitstack_matmul import PackedLevel, dense_ref, packed
from edgekit.kernels.block_matmul import PackedBlocks
from edgekit.kernels.ggml import quantize

SHAPES = ((4096, 4096), (4096, 14336), (8192, 28672))  # rows, cols
BATCHES = (1, 4, 16)
RANK = 20
# Bytes per second of memory, operations per second of bf16 tensor cores without sparsity.
# https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet and its like
CARDS = {"H100 80GB HBM3": (3.35e12, 989e12), "H200": (4.8e12, 989e12),
         "A100-SXM4-80GB": (2.04e12, 312e12), "RTX 4090": (1.01e12, 165e12)}  # fmt: skip
BLOCKS = ("Q2_K", "Q4_K", "Q6_K", "Q8_0")


def random_level(rows: int, cols: int, seed: int) -> PackedLevel:
    """A level of random bytes: its time does not depend on what it says."""
    random = np.random.default_rng(seed)
    scale = lambda n: (random.random(n) / 127).astype(np.float16)  # noqa: E731
    return packed(
        Level(
            RANK, cols, 1.0,
            random.integers(-127, 128, (RANK, cols), np.int8),
            random.integers(-127, 128, (rows, RANK), np.int8),
            scale(cols), scale(rows),
            random.integers(0, 256, (rows, -(-cols // 8)), np.uint8),
        ),
        "cuda",
    )  # fmt: skip


def microseconds(call: Callable[[], Any], seconds: float) -> dict[str, float]:
    """Median and interquartile range of a call, the second cache flushed before each."""
    import triton.testing

    low, middle, high = triton.testing.do_bench(
        call, rep=int(1000 * seconds), quantiles=[0.25, 0.5, 0.75]
    )
    return {"median_us": 1000 * middle, "iqr_us": 1000 * (high - low)}


def roofline(card: str, n_bytes: int, n_operations: int) -> float | None:
    """Microseconds below which nobody gets on this card."""
    for name, (bandwidth, peak) in CARDS.items():
        if name in card:
            return 1e6 * max(n_bytes / bandwidth, n_operations / peak)
    return None


def check(got: torch.Tensor, exact: torch.Tensor, naive: torch.Tensor) -> None:
    """At most twice the error of plain torch, in the same type."""
    allowed = 2 * (naive.double() - exact).abs().max() + 1e-6 * exact.abs().max()
    assert (got.double() - exact).abs().max() <= allowed, "a kernel computes something else"


def bench_levels(card: str, rows: int, cols: int, seconds: float) -> list[dict[str, Any]]:
    """A row for each depth and batch."""
    from edgekit.kernels.bitstack_triton import launch_dense, launch_matmul

    made = [random_level(rows, cols, seed) for seed in range(6)]
    dense = torch.randn(rows, cols, device="cuda", dtype=torch.bfloat16)
    found = []
    for batch in BATCHES:
        x = torch.randn(batch, cols, device="cuda", dtype=torch.bfloat16)
        plain = microseconds(lambda x=x: x @ dense.T, seconds)
        for depth in range(1, 7):
            levels = made[:depth]
            weight = dense_ref(levels, torch.float32)
            check(launch_matmul(levels, x), x.double() @ weight.double().T,
                  x @ weight.to(x.dtype).T)  # fmt: skip
            del weight
            n_bytes = sum(t.nbytes for lv in levels for t in lv.tensors) + 4 * batch * (rows + cols)
            fused = microseconds(lambda lv=levels, x=x: launch_matmul(lv, x), seconds)
            rebuilt = microseconds(lambda lv=levels, x=x: x @ launch_dense(lv, x.dtype).T, seconds)
            floor = roofline(card, n_bytes, 2 * rows * cols * (RANK * depth + batch))
            row = {"rows": rows, "cols": cols, "batch": batch, "depth": depth, "bytes": n_bytes,
                   "fused": fused, "dense_bf16": plain, "rebuild": rebuilt, "roofline_us": floor,
                   "bytes_per_second": 1e6 * n_bytes / fused["median_us"],
                   "over_dense": plain["median_us"] / fused["median_us"],
                   "over_rebuild": rebuilt["median_us"] / fused["median_us"]}  # fmt: skip
            print(json.dumps(row), flush=True)
            found.append(row)
    return found


def bench_blocks(card: str, rows: int, cols: int, seconds: float) -> list[dict[str, Any]]:
    """A row for each type and batch."""
    from edgekit.kernels.block_triton import launch_dense, launch_matmul

    found = []
    one = np.random.default_rng(0).standard_normal((64, cols)).astype(np.float32)
    for kind in BLOCKS:
        data = np.tile(quantize(kind, one), (rows // 64, 1))
        blocks = PackedBlocks(kind, torch.from_numpy(data).cuda())
        for batch in BATCHES:
            x = torch.randn(batch, cols, device="cuda", dtype=torch.bfloat16)
            fused = microseconds(lambda b=blocks, x=x: launch_matmul(b, x), seconds)
            rebuilt = microseconds(lambda b=blocks, x=x: x @ launch_dense(b, x.dtype).T, seconds)
            row = {"type": kind, "rows": rows, "cols": cols, "batch": batch, "bytes": data.nbytes,
                   "fused": fused, "rebuild": rebuilt,
                   "roofline_us": roofline(card, data.nbytes, 2 * rows * cols * batch)}  # fmt: skip
            print(json.dumps(row), flush=True)
            found.append(row)
    return found


def main() -> None:
    """Check, time, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=0.2, help="for each figure")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print(json.dumps({"benchmark": "bitstack_gpu", "gpu": None}))
        sys.exit(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    card = torch.cuda.get_device_name()
    levels = [row for shape in SHAPES for row in bench_levels(card, *shape, args.seconds)]
    blocks = [row for shape in SHAPES for row in bench_blocks(card, *shape, args.seconds)]
    print(
        json.dumps({"benchmark": "bitstack_gpu", "gpu": card, "levels": levels, "blocks": blocks})
    )


if __name__ == "__main__":
    main()
