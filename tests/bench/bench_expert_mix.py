"""Tiers of expert tensors, uniform against mixed, at equal bytes: KL divergence to the source.

    python tests/bench/bench_expert_mix.py [ARTIFACT CHECKPOINT] [--tiers Q3_K,Q4_K,Q5_K]

Without arguments the sample tiny-moe is converted first. At each size all dense tensors stay at the
uniform tier; the expert tensors take the bytes that they have there: all alike; by the integer
program with the losses measured at conversion; by the same program with PMQ's cost, phi * w *
error**2 per expert and tier (how often the expert is chosen, its mean weight, the squared distance
of its weights), summed over a tensor's experts; and by the planner's greedy order. Last, all
tensors mixed by the program within all bytes. Text that was not calibrated on. Prints a JSON line
last.
"""

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from artifacts import TINY_MOE, opened
from expert_mix import measured_costs, mixed_tiers

from edgekit.artifact import Artifact
from edgekit.assembly import Assembly
from edgekit.checkpoint import Checkpoint
from edgekit.codecs import CODECS
from edgekit.decode import Decoder, chunks_of
from edgekit.evaluate import Reference, evaluate
from edgekit.expert_budget import expert_stacks
from edgekit.kernels.ggml import dequantize
from edgekit.measure import highest_depths
from edgekit.planner import Depths, fill, resident_bytes, tier_at, uniform
from edgekit.samples import heldout_text
from edgekit.stack import Stack
from edgekit.tracing import trace_checkpoint


def weights_at(artifact: Artifact, stack: Stack, tier: str, expert: int) -> Any:
    """Weights of one expert at a tier, float32."""
    decoder = Decoder(CODECS[artifact.manifest.codec], artifact.part)
    depth = stack.depth_of(tier)
    chunks = chunks_of(stack, depth, expert, artifact.manifest.chunk_weights)
    blocks = [np.empty(chunk.n_bytes, np.uint8) for chunk in chunks]
    for chunk, block in zip(chunks, blocks, strict=True):
        decoder.decode(chunk, block)
    return dequantize(stack.type_at(tier), np.concatenate(blocks))


def pmq_costs(artifact: Artifact, checkpoint: Path) -> dict[tuple[str, str], float]:
    """PMQ's objective with alpha = beta = 1 and gamma = 2."""
    trace = trace_checkpoint(Checkpoint.open(checkpoint))
    assert trace.weights is not None
    costs = {}
    for stack in expert_stacks(artifact.stacks):
        layer = trace.layers.index(int(stack.name.split(".")[1]))
        ids, weights = trace.experts[:, layer], trace.weights[:, layer].astype(np.float64)
        for tier in stack.tiers:
            cost = 0.0
            for expert in range(stack.n_experts):
                chosen = ids == expert
                share = chosen.any(axis=1).mean()
                mean_weight = weights[chosen].mean() if chosen.any() else 0.0
                source = weights_at(artifact, stack, stack.tiers[-1], expert)
                error = np.square(source - weights_at(artifact, stack, tier, expert)).sum()
                cost += share * mean_weight * float(error)
            costs[stack.name, tier] = cost
    return costs


def main() -> None:
    """Run, and print the JSON line last."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact", type=Path, nargs="?")
    parser.add_argument("checkpoint", type=Path, nargs="?", default=TINY_MOE)
    parser.add_argument("--tiers", default="Q3_K,Q4_K,Q5_K")
    parser.add_argument("--tokens", type=int, default=8192)
    args = parser.parse_args()
    rows = []
    with opened(args.artifact) as artifact:
        experts = expert_stacks(artifact.stacks)
        names = {stack.name for stack in experts}
        ways = {"fisher": measured_costs(experts), "pmq": pmq_costs(artifact, args.checkpoint)}
        order = artifact.order(artifact.manifest.resident_order)
        order = tuple(key for key in order if key[0] in names)
        with (
            Assembly(artifact, highest_depths(artifact)) as top,
            Reference.open(top, heldout_text(), n_tokens=args.tokens, n_threads=1) as reference,
        ):
            for tier in args.tiers.split(","):
                same = uniform(artifact.stacks, lambda stack, t=tier: tier_at(stack, t))
                budget = sum(resident_bytes(s, same.tier(s.name)) for s in experts)
                mixes = {"uniform": {s.name: same.tier(s.name) for s in experts}}
                for way, costs in ways.items():
                    mixes[way] = mixed_tiers(experts, budget, costs)
                mixes["greedy"] = dict(fill(experts, order, budget).tiers)
                everything = measured_costs(artifact.stacks)
                mixes["all tensors"] = mixed_tiers(artifact.stacks, same.weights_bytes, everything)
                for way, tiers in mixes.items():
                    depths = Depths({**same.tiers, **tiers}, 0)
                    with Assembly(artifact, depths) as source:
                        kl = evaluate(source, reference, n_threads=1).kl_mean
                    row: dict[str, Any] = {"tier": tier, "way": way, "kl_mean": kl}
                    for name, stacks in (("expert", experts), ("all", artifact.stacks)):
                        size = sum(resident_bytes(s, depths.tier(s.name)) for s in stacks)
                        row[f"{name}_bytes"] = size
                    row["expert_tiers"] = dict(Counter(depths.tier(s.name) for s in experts))
                    rows.append(row)
                    print(row, flush=True)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
