"""Does what llama.cpp reads per second depend on the size of the model? The probe's are small ones.

    python tests/bench/bench_probe.py [--rounds 4]

Models of the probe with few and with many layers, with and without a large output head, one thread.
Processor time, not the clock's: a shared machine then disturbs less. Prints GB/s, the best single
token and the median of each round; a JSON line last.
"""

import argparse
import json
import time
from collections import defaultdict
from statistics import median

from edgekit.llama import Context, open_model
from edgekit.probe import FEED_FORWARD, VOCAB, WIDTH
from edgekit.probe_model import ProbeModel, ProbeShape

HEAD, CONTEXT = 128_256, 512
READ_BYTES = 16 << 30  # of each model and round
SIZES = ((2, VOCAB), (8, VOCAB), (16, VOCAB), (1, HEAD), (16, HEAD))  # layers, vocabulary


def rates(shape: ProbeShape) -> list[float]:
    """GB/s of each token."""
    n = max(8, READ_BYTES // shape.weights_bytes)
    seconds = []
    with open_model(ProbeModel(shape)) as model, Context(model, CONTEXT, n_threads=1) as context:
        context.decode([1])
        for _ in range(min(n, CONTEXT // 4)):
            started = time.process_time()
            context.decode([1])
            seconds.append(time.process_time() - started)
    return [shape.weights_bytes / s / 1e9 for s in seconds]


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kinds", nargs="+", default=["BF16"])
    parser.add_argument("--rounds", type=int, default=4)
    options = parser.parse_args()
    sizes = [(kind, *size) for kind in options.kinds for size in SIZES]
    found = defaultdict[str, list[list[float]]](list)
    for kind, layers, vocab in options.rounds * sizes:
        shape = ProbeShape(kind, layers, WIDTH, FEED_FORWARD, vocab, CONTEXT)
        label = f"{kind}, {layers} layers, {vocab} tokens, {shape.weights_bytes >> 20} MiB"
        found[label].append(rates(shape))
    told = {
        label: {"best": max(map(max, rounds)), "medians": [median(r) for r in rounds]}
        for label, rounds in found.items()
    }
    for label, row in told.items():
        print(f"{label}: best {row['best']:.1f}, medians {[f'{m:.1f}' for m in row['medians']]}")
    print(json.dumps(told))


if __name__ == "__main__":
    main()
