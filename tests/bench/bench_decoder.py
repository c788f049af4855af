"""Codec nested on one thread: speed and bits per weight of every level, beside ggml's quantizers.

    python tests/bench/bench_decoder.py [--checkpoint FOLDER] [--repeats N]

Weights are Gaussian, or the largest matrices of a checkpoint. Every answer is checked before it
is timed. Times are CPU time of the one thread, so that a busy machine disturbs them less.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np

from edgekit.codecs.nested import decode_chunk, encode_chunk
from edgekit.kernels import ggml, native

CHAIN = ("Q2_K", "Q3_K", "Q4_K", "Q6_K", "Q8_0", "BF16")
CHUNK = 1 << 18  # weights
SHAPES = {"llama3.2-1b.down": (2048, 8192), "qwen3-0.6b.down": (1024, 3072)}  # rows, cols
# What docs and DESIGN promise: bits per weight of codes + scales as a level on the one before.
PLAIN_ENTROPY = {"Q3_K": 1.90, "Q4_K": 1.91, "Q6_K": 2.89, "Q8_0": 2.53, "BF16": 3.5}


def gaussian(rows: int, cols: int) -> np.ndarray:
    """Weights of standard deviation 0.02, one chunk of them, rounded to BF16."""
    weights = np.random.default_rng(0).standard_normal((CHUNK // cols or 1, cols)) * 0.02
    blocks = ggml.quantize("BF16", weights.astype(np.float32))
    return ggml.dequantize("BF16", blocks).reshape(weights.shape)


def trained(folder: Path) -> dict[str, np.ndarray]:
    """The three largest matrices of a checkpoint, cut to a chunk."""
    from edgekit.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(folder)
    wide = {n: t for n, t in checkpoint.tensors.items() if len(t.shape) == 2}
    largest = sorted(wide, key=lambda name: -np.prod(wide[name].shape))[:3]
    found = {}
    for name in largest:
        rows = checkpoint.read(name, slice(0, CHUNK // wide[name].shape[1]))
        bits = rows.astype(np.uint32) << 16 if rows.dtype == np.uint16 else rows.view(np.uint32)
        found[name] = np.ascontiguousarray(bits).view(np.float32)
    return found


def cpu_seconds(call: Callable[[], object], repeats: int) -> list[float]:
    """CPU seconds of each of ``repeats`` calls on this thread."""
    times = []
    for _ in range(repeats):
        start = time.thread_time()
        call()
        times.append(time.thread_time() - start)
    return times


def rate(times: list[float], n: int) -> dict[str, float]:
    """M weights/s: median, and the quartiles' distance."""
    rates = [n / t / 1e6 for t in times]
    quarter, _, three = statistics.quantiles(rates, n=4)
    best = {"median": statistics.median(rates), "iqr": three - quarter, "best": max(rates)}
    return {key: round(value, 1) for key, value in best.items()}


def bench(weights: np.ndarray, repeats: int) -> dict[str, dict[str, object]]:
    """Bits and speeds of each level of the default chain, and of the quantizers beside them."""
    n = weights.size
    tiers = {name: ggml.quantize(name, weights).reshape(-1) for name in CHAIN}
    result: dict[str, dict[str, object]] = {"Q2_K": {"bits": tiers["Q2_K"].nbytes * 8 / n}}
    for parent, child in pairwise(CHAIN):
        pair = (parent, child, tiers[parent])
        payload = encode_chunk(*pair, tiers[child])
        assert np.array_equal(decode_chunk(*pair, payload, n), tiers[child])
        result[child] = {
            "bits": round(len(payload) * 8 / n, 3),
            "bits_plain_entropy": PLAIN_ENTROPY[child],
            "encode_mw_per_s": rate(
                cpu_seconds(lambda p=pair, c=child: encode_chunk(*p, tiers[c]), repeats), n
            ),
            "decode_mw_per_s": rate(
                cpu_seconds(lambda p=pair, x=payload: decode_chunk(*p, x, n), repeats), n
            ),
            "quantize_mw_per_s": rate(cpu_seconds(lambda c=child: ggml.quantize(c, weights), 3), n),
        }
    return result


def main() -> None:
    """Run, print a table, and the JSON line last."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    cases = {name: gaussian(*shape) for name, shape in SHAPES.items()}
    if options.checkpoint:
        cases |= trained(options.checkpoint)
    results = {name: bench(weights, options.repeats) for name, weights in cases.items()}
    for name, levels in results.items():
        total = sum(float(str(level["bits"])) for level in levels.values())
        print(f"{name}: stack {total:.2f} bits = {total / 16:.3f} of BF16")
        for child, level in levels.items():
            print(f"  {child:5} {json.dumps(level)}")
    compiled = native.native() is not None
    print(json.dumps({"chunk_weights": CHUNK, "compiled": compiled, "results": results}))


if __name__ == "__main__":
    main()
