"""Hit rates and reading ahead on a trained router, behind a reader as slow as a phone's storage.

    python tests/bench/bench_prefetch.py [ARTIFACT] [--caches 2,3,4] [--bandwidth 200MB] [-n 384]

Decodes the same held-out tokens with every cache and every way of guessing. Reads go one at a time
through a reader of the given bandwidth, in place of a disk. Beside what was measured: the hit rate
that the manifest's trace promises, and what a replay of these very tokens says. With ``--resident``
the cost of listening when all experts are resident, against no listener, alternating. Prints a JSON
line last.
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
from artifacts import sample_artifact

from edgekit.artifact import Artifact, open_artifact
from edgekit.engine import Engine, Settings
from edgekit.expert_plan import experts_of, plan_paged
from edgekit.llama import Context, Listener
from edgekit.paging.store import ExpertStore
from edgekit.routing.facts import hit_rate
from edgekit.routing.replay import hit_rates
from edgekit.routing.trace import trace_of
from edgekit.samples import heldout_text
from edgekit.sizes import parse_size


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
    artifact: Artifact, cache: int, prefetch: Any, bandwidth: int, n: int
) -> dict[str, Any]:
    """Decode held-out text token by token."""
    plan = plan_paged(artifact, 1 << 40, 1024, expert_cache=cache)
    engine = Engine(artifact, Settings(1, "auto", prefetch))
    try:
        engine.load(plan)
        pager, context = engine.pager, engine.context
        assert pager is not None
        pager._store = SlowStore(pager._store, bandwidth)
        ids = context.model.tokenize(heldout_text())[: n + 64]
        for token in ids[:64]:
            context.decode([token])
        pager.reset()
        started = time.perf_counter()
        for token in ids[64:]:
            context.decode([token])
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


def replayed(artifact: Artifact, caches: list[int], n: int) -> dict[int, float]:
    """What the simulator says of the same tokens at the same depths, first 64 tokens left out."""
    n_experts, _ = experts_of(artifact)
    plan = plan_paged(artifact, 1 << 40, 1024, expert_cache=max(caches))
    chosen: dict[int, list[np.ndarray[Any, Any]]] = {}
    engine = Engine(artifact, Settings(1))
    try:
        engine.load(plan)
        blocks = int(
            engine.context.model.header.get(f"{artifact.manifest.architecture}.block_count")
        )
        pager = engine.pager
        assert pager is not None
        keep, real = pager.listener, pager._chosen

        def hear(block: int, ids: Any) -> None:
            chosen.setdefault(block, []).append(keep.topk().copy())
            real(block, ids)

        keep._chosen = hear
        keep._state.always = 1
        for token in engine.context.model.tokenize(heldout_text())[: n + 64]:
            engine.context.decode([token])
    finally:
        engine.close()
    ids = np.stack([np.concatenate(chosen[block]) for block in range(blocks)], axis=1)
    whole, head = trace_of(ids, n_experts), trace_of(ids[:64], n_experts)
    rates = {}
    for cache in caches:
        a, b = (hit_rates(t, "pool", [cache]).mean() * t.n_tokens for t in (whole, head))
        rates[cache] = float((a - b) / n)
    return rates


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
    parser.add_argument("artifact", type=Path, nargs="?", help="default: samples/tiny-moe")
    parser.add_argument("--caches", default="2,3,4")
    parser.add_argument("--bandwidth", default="200MB")
    parser.add_argument("-n", type=int, default=384)
    parser.add_argument("--resident", action="store_true")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    folder = args.artifact or Path(sample_artifact("tiny-moe"))
    with open_artifact(folder, remember=True) as artifact:
        if args.resident:
            print(json.dumps(listening(artifact, args.n, args.pairs, args.threads)))
            return
        caches = [int(cache) for cache in args.caches.split(",")]
        foretold = replayed(artifact, caches, args.n)
        rows = []
        for cache in caches:
            for prefetch in ("off", "gate", "table"):
                row = measured(artifact, cache, prefetch, parse_size(args.bandwidth), args.n)
                rows.append(row | {"replayed": round(foretold[cache], 4)})
                print(rows[-1], flush=True)
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
