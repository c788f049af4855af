"""Missed experts filled from a low tier and lifted when they turn out hot, against one tier.

    python tests/bench/bench_lift.py [ARTIFACT] [--low Q2_K] [--high Q4_K] [--cache 3] [-n 1024]

Without an artifact the sample tiny-moe is converted first. Held-out sequences of 128 tokens are
decoded one token at a time by the pager; a tensor is stored as ``source``, so an expert can be
filled with its weights of any tier. Filled are: one tier for all; the low tier, lifted to the high
one right before the n-th use since the miss (the first: never low). Told are the KL divergence to
the source model, bytes of levels read per token, and bytes per token if blocks of the tiers came
from a file (where a lift reads the high tier whole). A lifted expert needs the room of the high
tier from the start: one tier alone is also given the cache that this memory would hold. Prints a
JSON line last.
"""

import argparse
import ctypes
import json
from collections.abc import Iterator
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from artifacts import opened
from bench_expert_mix import weights_at
from bench_prefetch import heldout

from edgekit.artifact import Artifact
from edgekit.assembly import Assembly
from edgekit.engine import Engine, Settings
from edgekit.evaluate import kl_divergence
from edgekit.expert_budget import expert_bytes, expert_stacks
from edgekit.expert_plan import plan_paged
from edgekit.llama import Context, open_model
from edgekit.measure import highest_depths
from edgekit.text import Ids

Place = tuple[int, int]


class Weights:
    """Experts of all tiers in question, as BF16, and what they take."""

    def __init__(self, artifact: Artifact, tiers: set[str]) -> None:
        self._blocks: dict[tuple[str, int, str], bytes] = {}
        self._stacks = {stack.name: stack for stack in expert_stacks(artifact.stacks)}
        for name, stack in self._stacks.items():
            for expert in range(stack.n_experts):
                for tier in tiers:
                    weights = weights_at(artifact, stack, tier, expert)
                    self._blocks[name, expert, tier] = bf16(weights)

    def fill(self, name: str, expert: int, tier: str, into: memoryview) -> None:
        """Put an expert in place."""
        into[:] = self._blocks[name, expert, tier]

    def level_bytes(self, name: str, expert: int, tier: str) -> int:
        """Bytes of all levels up to a tier."""
        stack = self._stacks[name]
        return sum(lv.parts[expert].n_bytes for lv in stack.levels[: stack.depth_of(tier)])

    def block_bytes(self, name: str, tier: str) -> int:
        """Bytes of the tier's blocks."""
        return expert_bytes(self._stacks[name], tier)


def bf16(weights: Any) -> bytes:
    """Rounded to the nearest BF16, ties to even."""
    bits = weights.ravel().view(np.uint32)
    return bytes(((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16))


class LiftingStore:
    """Fills experts from ``low``; `lift` puts ``high`` in their place."""

    def __init__(self, weights: Weights, low: str, high: str) -> None:
        self._weights, self._low, self._high = weights, low, high
        self.level_bytes = self.file_bytes = self.n_fills = self.n_lifts = 0
        self.uses: dict[Place, int] = {}  # of experts that are low
        self._lock = Lock()

    def read(self, name: str, expert: int, into: memoryview) -> int:
        """Fill from the low tier."""
        self._weights.fill(name, expert, self._low, into)
        with self._lock:
            self.level_bytes += self._weights.level_bytes(name, expert, self._low)
            self.file_bytes += self._weights.block_bytes(name, self._low)
            self.n_fills += 1
            self.uses[int(name.split(".")[1]), expert] = 0
        return len(into)

    def lift(self, name: str, expert: int, into: memoryview) -> None:
        """Read what is missing of the high tier."""
        self._weights.fill(name, expert, self._high, into)
        low, high = (self._weights.level_bytes(name, expert, t) for t in (self._low, self._high))
        self.level_bytes += high - low
        self.file_bytes += self._weights.block_bytes(name, self._high)
        self.n_lifts += 1

    def close(self) -> None:
        """Nothing is open."""


def run(
    artifact: Artifact, store: LiftingStore, cache: int, uses: int, sequences: Ids, reference: Any
) -> dict[str, Any]:
    """Decode token by token; lift an expert right before its ``uses``-th use; 0: never."""
    engine = Engine(artifact, Settings(1))
    try:
        engine.load(plan_paged(artifact, 1 << 40, 512, expert_cache=cache))
        pager = engine.pager
        assert pager is not None
        pager._store = store
        fill = pager._chosen

        def chosen(block: int, ids: Any) -> None:
            fill(block, ids)
            for expert in ids.tolist():
                if (block, expert) not in store.uses:
                    continue
                store.uses[block, expert] += 1
                if store.uses[block, expert] == uses:
                    del store.uses[block, expert]
                    for name, span in pager.pool.views(block, expert):
                        place = (ctypes.c_ubyte * span.n_bytes).from_address(span.address)
                        store.lift(name, expert, memoryview(place).cast("B"))

        pager.listener._chosen = chosen
        pager.listener._state.always = 1
        rows = decoded(engine.context, sequences)
        kl = np.concatenate([kl_divergence(a, b) for a, b in zip(reference, rows, strict=True)])
        n = sequences.size
        return {
            "kl_mean": round(float(kl.mean()), 5),
            "kl_error": round(float(kl.std() / n**0.5), 5),
            "hit_rate": round(pager.stats.hit_rate, 4),
            "level_bytes_per_token": round(store.level_bytes / n),
            "file_bytes_per_token": round(store.file_bytes / n),
            "lifted_fills": round(store.n_lifts / store.n_fills, 3),
        }
    finally:
        engine.close()


def decoded(context: Context, sequences: Ids) -> Iterator[Any]:
    """Logits of every sequence, ``[tokens, vocab]``."""
    for sequence in sequences:
        context.clear()
        yield np.concatenate([context.decode([int(token)]) for token in sequence])


def main() -> None:
    """Run, and print the JSON line last."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact", type=Path, nargs="?")
    parser.add_argument("--low", default="Q2_K")
    parser.add_argument("--high", default="Q4_K")
    parser.add_argument("--cache", type=int, default=3)
    parser.add_argument("-n", type=int, default=1024)
    args = parser.parse_args()
    rows = []
    with opened(args.artifact) as artifact:
        names = [tier for tier in artifact.manifest.tiers if tier != "source"]
        tiers = names[names.index(args.low) : names.index(args.high) + 1]
        weights = Weights(artifact, set(tiers))
        _, sequences = heldout(artifact, args.n)
        with (
            Assembly(artifact, highest_depths(artifact)) as top,
            open_model(top) as model,
            Context(model, 512, n_threads=1) as context,
        ):
            reference = list(decoded(context, sequences))
        stack = expert_stacks(artifact.stacks)[0]
        room = args.cache * expert_bytes(stack, args.high)
        ways = [(tier, tier, args.cache, 0) for tier in tiers]
        ways += [(tier, tier, round(room / expert_bytes(stack, tier)), 0) for tier in tiers[:-1]]
        ways += [(args.low, args.high, args.cache, uses) for uses in (2, 3, 5)]
        for low, high, cache, uses in ways:
            store = LiftingStore(weights, low, high)
            row = {"low": low, "high": high, "cache": cache, "lift_at_use": uses}
            rows.append(row | run(artifact, store, cache, uses, sequences, reference))
            print(rows[-1], flush=True)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
