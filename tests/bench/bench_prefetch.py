"""Hit rates and reading ahead on a trained router, behind a reader as slow as a phone's storage.

    python tests/bench/bench_prefetch.py [ARTIFACT] [--caches 2,3,4] [--prefetch off] [-n 2048]

Decodes the same held-out tokens with every cache and every way of guessing, in sequences of 128
evenly from all of the text: a few hundred tokens in a row say little of the next few hundred. Reads
go one at a time through a reader of the given bandwidth, in place of a disk. Beside what was
measured: the hit rate that the manifest's trace promises, what a replay of these very tokens says,
and the standard deviation of that between sequences. With ``--resident`` the cost of listening when
all experts are resident, against no listener, alternating. Without an artifact the sample tiny-moe
is converted first. Prints a JSON line last.
"""

import argparse
import json
import statistics
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from artifacts import opened

from edgekit.artifact import Artifact
from edgekit.assembly import Assembly
from edgekit.engine import Engine, Settings
from edgekit.expert_plan import experts_of, plan_paged
from edgekit.llama import Context, Listener, open_model
from edgekit.measure import highest_depths
from edgekit.paging.store import ExpertStore
from edgekit.routing.facts import hit_rate
from edgekit.routing.replay import hit_rates
from edgekit.routing.trace import Trace, trace_of
from edgekit.samples import HELDOUT_TEXT, heldout_text
from edgekit.sizes import parse_size
from edgekit.text import Ids, token_chunks
from edgekit.tracing import trace_model

SEQUENCE = 128


class SlowStore:
    """A store behind one device of a bandwidth."""

    def __init__(self, store: ExpertStore, bytes_per_second: int) -> None:
        self._store, self._speed, self._lock = store, bytes_per_second, threading.Lock()

    def read(self, name: str, expert: int, into: memoryview) -> int:
        """Read, and take as long as the device would."""
        with self._lock:
            time.sleep(len(into) / self._speed)
            return self._store.read(name, expert, into)

    def close(self) -> None:
        """Close the store."""
        self._store.close()


def measured(
    artifact: Artifact, cache: int, prefetch: Any, bandwidth: int, sequences: Ids
) -> dict[str, Any]:
    """Decode sequences token by token."""
    plan = plan_paged(artifact, 1 << 40, 1024, expert_cache=cache)
    engine = Engine(artifact, Settings(1, "auto", prefetch))
    try:
        engine.load(plan)
        pager, context = engine.pager, engine.context
        assert pager is not None
        pager._store = SlowStore(pager._store, bandwidth)
        n, started = sequences.size, time.perf_counter()
        for sequence in sequences:
            context.clear()
            for token in sequence:
                context.decode([int(token)])
        seconds, stats = time.perf_counter() - started, pager.stats
        found = stats.n_guessed_right + stats.n_missing
        return {
            "cache": cache,
            "prefetch": prefetch,
            "hit_rate": round(stats.hit_rate, 4),
            "promised": hit_rate(artifact.manifest.experts, cache),
            "recall": round(stats.n_predicted_right / max(1, stats.n_predicted), 4),
            "useful_reads": round(stats.n_guessed_right / max(1, stats.n_guessed), 4),
            "guessed_of_needed": round(stats.n_guessed_right / max(1, found), 4),
            "stall_ms_per_token": round(1000 * stats.stall_seconds / n, 3),
            "bytes_per_token": round(stats.bytes_read / n),
            "tokens_per_second": round(n / seconds, 1),
        }
    finally:
        engine.close()


def heldout(artifact: Artifact, n: int) -> tuple[Trace, Ids]:
    """What routers at the highest depth choose in held-out sequences, and their tokens."""
    n_chunks = -(-n // SEQUENCE)
    with Assembly(artifact, highest_depths(artifact)) as source:
        trace = trace_model(source, HELDOUT_TEXT, max_chunks=n_chunks, chunk_tokens=SEQUENCE)
        with open_model(source, vocab_only=True) as vocab:
            ids = token_chunks(vocab, heldout_text(), SEQUENCE, n_chunks, "held-out text")
    return trace, ids


def replayed(trace: Trace, cache: int) -> dict[str, float]:
    """What the simulator says of a trace, and how far it differs between sequences."""
    each = [
        hit_rates(trace_of(ids, trace.n_experts), "pool", [cache]).mean()
        for ids in trace.sequences()
    ]
    whole = hit_rates(trace, "pool", [cache]).mean()
    return {"replayed": round(float(whole), 4), "deviation": round(float(np.std(each)), 4)}


def listening(artifact: Artifact, n: int, pairs: int, threads: int) -> dict[str, float]:
    """Decode with all experts resident: alone, and with a listener that has nothing to do."""
    from edgekit.plan import plan_budget

    n_experts, _ = experts_of(artifact)
    plan = replace(plan_budget(artifact, 1 << 40, 512), batch=32)
    engine = Engine(artifact, Settings(threads))
    try:
        engine.load(plan)
        model = engine.context.model
        blocks = int(model.header.get(f"{artifact.manifest.architecture}.block_count"))
        listener = Listener(blocks, n_experts, lambda *_: None)
        listener.uses.resident[:] = True
        contexts = {
            "plain": Context(model, 512, n_batch=32, n_threads=threads),
            "listening": Context(model, 512, n_batch=32, n_threads=threads, listener=listener),
        }
        times: dict[str, list[float]] = {way: [] for way in contexts}
        busys: dict[str, list[float]] = {way: [] for way in contexts}
        for pair in range(pairs):
            order = list(contexts) if pair % 2 else list(contexts)[::-1]
            for way in order:
                context = contexts[way]
                context.clear()
                context.decode([5], "none")
                busy, wall = time.process_time(), time.perf_counter()
                for token in range(3, 3 + n):
                    context.decode([token % 200 + 3])
                times[way].append((time.perf_counter() - wall) / n)
                busys[way].append((time.process_time() - busy) / n)
        found = {}
        for name, rows in (("wall", times), ("processor", busys)):
            ratios = [b / a for a, b in zip(rows["plain"], rows["listening"], strict=True)]
            found |= {
                f"{name}_plain_ms": 1000 * statistics.median(rows["plain"]),
                f"{name}_listening_ms": 1000 * statistics.median(rows["listening"]),
                f"{name}_ratio": statistics.median(ratios),
                f"{name}_ratio_of_least": min(rows["listening"]) / min(rows["plain"]),
            }
        return found
    finally:
        engine.close()


def main() -> None:
    """Run, and print the JSON line last."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact", type=Path, nargs="?")
    parser.add_argument("--caches", default="2,3,4")
    parser.add_argument("--prefetch", default="off,gate,table")
    parser.add_argument("--bandwidth", default="200MB")
    parser.add_argument("-n", type=int, default=2048)
    parser.add_argument("--resident", action="store_true")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    with opened(args.artifact) as artifact:
        if args.resident:
            print(json.dumps(listening(artifact, min(args.n, 384), args.pairs, args.threads)))
            return
        caches = [int(cache) for cache in args.caches.split(",")]
        trace, sequences = heldout(artifact, args.n)
        rows = []
        for cache in caches:
            foretold = replayed(trace, cache)
            for prefetch in args.prefetch.split(","):
                row = measured(artifact, cache, prefetch, parse_size(args.bandwidth), sequences)
                rows.append(row | foretold)
                print(rows[-1], flush=True)
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
