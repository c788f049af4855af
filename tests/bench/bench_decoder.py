"""Codec nested on one thread: speed and bits per weight of every level, beside ggml's quantizers.

    python tests/bench/bench_decoder.py [--checkpoint FOLDER] [--repeats N] [--chunk WEIGHTS]

Weights are Gaussian, or the largest matrices of a checkpoint, one chunk of them at a time. Every
answer is checked before it is timed. Times are CPU time of the one thread, so that a busy machine
disturbs them less; a neighbour on the same core still shows. EDGEKIT_NO_AVX512=1 measures the
kernels as they run on machines without AVX-512.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np

from edgekit.codecs.chunks import CHUNK_WEIGHTS
from edgekit.codecs.nested import decode_chunk, encode_chunk
from edgekit.kernels import ggml, native

CHAIN = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "BF16")
SHAPES = {"llama3.2-1b.down": (2048, 8192), "qwen3-0.6b.down": (1024, 3072)}  # rows, cols
# What docs and DESIGN promise: bits per weight of codes + scales as a level on the one before.
PLAIN_ENTROPY = {"Q3_K": 1.90, "Q4_K": 1.91, "Q5_K": 1.89, "Q6_K": 2.07, "Q8_0": 2.53, "BF16": 3.5}


def gaussian(rows: int, cols: int, chunk: int) -> np.ndarray:
    """Weights of standard deviation 0.02, one chunk of them, rounded to BF16."""
    rows = min(rows, chunk // cols or 1)
    weights = np.random.default_rng(0).standard_normal((rows, cols)) * 0.02
    blocks = ggml.quantize("BF16", weights.astype(np.float32))
    return ggml.dequantize("BF16", blocks).reshape(weights.shape)


def trained(folder: Path, chunk: int) -> dict[str, np.ndarray]:
    """The three largest matrices of a checkpoint, cut to a chunk."""
    from edgekit.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(folder)
    wide = {n: t for n, t in checkpoint.tensors.items() if len(t.shape) == 2}
    largest = sorted(wide, key=lambda name: -np.prod(wide[name].shape))[:3]
    found = {}
    for name in largest:
        rows = checkpoint.read(name, slice(0, chunk // wide[name].shape[1] or 1))
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


def show(name: str, levels: dict[str, dict[str, object]]) -> None:
    """Print one case as a table: M weights/s as median and distance of the quartiles."""
    total = sum(float(str(level["bits"])) for level in levels.values())
    print(f"{name}: stack {total:.2f} bits = {total / 16:.3f} of BF16")
    print(f"  {'level':6}{'bits':>7}{'decode M/s':>16}{'encode M/s':>16}{'quantize M/s':>16}")
    encode_ns = 0.0
    for child, level in levels.items():
        speeds = [level.get(f"{what}_mw_per_s") for what in ("decode", "encode", "quantize")]
        cells = [f"{s['median']:8.0f} +- {s['iqr']:4.0f}" for s in speeds if isinstance(s, dict)]
        print(f"  {child:6}{level['bits']:>7.3f}" + "".join(f"{cell:>16}" for cell in cells))
        encode_ns += sum(1e3 / s["median"] for s in speeds[1:2] if isinstance(s, dict))
    print(f"  encoding all levels takes {encode_ns:.1f} ns per weight")


def main() -> None:
    """Run, print tables, and the JSON line last."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--chunk", type=int, default=CHUNK_WEIGHTS, help="weights in a chunk")
    options = parser.parse_args()
    cases = {name: gaussian(*shape, options.chunk) for name, shape in SHAPES.items()}
    if options.checkpoint:
        cases |= trained(options.checkpoint, options.chunk)
    results = {name: bench(weights, options.repeats) for name, weights in cases.items()}
    for name, levels in results.items():
        show(name, levels)
    about = {"chunk_weights": options.chunk, "compiled": native.native() is not None}
    print(json.dumps(about | {"results": results}))


if __name__ == "__main__":
    main()
