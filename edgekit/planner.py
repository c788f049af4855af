"""Load orders and plans: which levels to load first, and what a budget buys.

A load order is greedy on the lower convex hull of (bytes, loss) of every tensor: the next step is
always the one that lowers the loss most per byte. On hulls, greedy is the Lagrangian optimum at
every budget it reaches exactly (Shoham & Gersho, "Efficient bit allocation for an arbitrary set of
quantizers", IEEE Trans. ASSP 1988).
"""

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from edgekit.codecs import CODECS
from edgekit.errors import DoesNotFitError
from edgekit.kernels.ggml import TYPES, row_bytes, type_for
from edgekit.manifest import Order
from edgekit.sizes import format_size
from edgekit.stack import SOURCE, Level, Stack

LevelBytes = Callable[[Stack, int], int]  # cost in bytes of going from depth to depth + 1
TierBytes = Callable[[Stack, str], int]  # bytes in memory at a tier


def resident_bytes(stack: Stack, tier: str) -> int:
    """Bytes of the tensor in memory at ``tier``: plain blocks of its ggml type."""
    rows = stack.n_weights // stack.cols
    return rows * row_bytes(stack.type_at(tier), stack.cols)


def resident_step(stack: Stack, depth: int) -> int:
    """Memory that level ``depth`` adds over the one below it."""
    tiers = stack.tiers
    return resident_bytes(stack, tiers[depth]) - resident_bytes(stack, tiers[depth - 1])


def packed_bytes(stack: Stack, tier: str) -> int:
    """Bytes in a runtime that computes with levels as they are stored, where the codec has such."""
    codec = CODECS.get(stack.levels[-1].codec)
    held = codec.held(stack, stack.depth_of(tier)) if codec is not None else ()
    return sum(stack.levels[d].n_bytes for d in held) or resident_bytes(stack, tier)


def stored_step(stack: Stack, depth: int) -> int:
    """Bytes that level ``depth`` takes in the artifact."""
    return stack.levels[depth].n_bytes


@dataclass(frozen=True)
class Step:
    """Raise a tensor from one corner of its hull to the next: one or more levels at once."""

    n_bytes: int
    gain: float
    levels: tuple[Level, ...]

    @property
    def gain_per_byte(self) -> float:
        """Loss removed per byte; a step that costs nothing and gains comes first."""
        return _rate(self.gain, self.n_bytes)


def hull_steps(stack: Stack, level_bytes: LevelBytes) -> Iterator[Step]:
    """Steps along the lower convex hull of (bytes, loss), steepest first, up to the last level."""
    costs = [0]
    for depth in range(1, len(stack.levels)):
        costs.append(costs[-1] + level_bytes(stack, depth))
    losses = [level.loss for level in stack.levels]
    at = 0
    while at < len(costs) - 1:
        ahead = range(at + 1, len(costs))
        best = max(ahead, key=lambda d: (_slope(costs, losses, at, d), -d))
        yield Step(
            costs[best] - costs[at], losses[at] - losses[best], stack.levels[at + 1 : best + 1]
        )
        at = best


def _slope(costs: Sequence[int], losses: Sequence[float], start: int, stop: int) -> float:
    return _rate(losses[start] - losses[stop], costs[stop] - costs[start])


def _rate(gain: float, n_bytes: int) -> float:
    if n_bytes > 0:
        return gain / n_bytes
    return float("inf") if gain >= 0 else float("-inf")


def load_order(stacks: Sequence[Stack], level_bytes: LevelBytes) -> Order:
    """All levels above 0, best quality per byte first, never one before its parent."""
    heap: list[tuple[float, int, Step, Iterator[Step]]] = []
    for rank, stack in enumerate(stacks):
        _push(heap, rank, hull_steps(stack, level_bytes))
    order: list[tuple[str, str]] = []
    while heap:
        _, rank, step, rest = heapq.heappop(heap)
        order += [(level.tensor, level.tier) for level in step.levels]
        _push(heap, rank, rest)
    return tuple(order)


def average_order(stacks: Sequence[Stack], level_bytes: LevelBytes) -> Order:
    """Level by level over all tensors, each level sorted by what it alone takes off the loss.

    What BitStack's authors call "average" (arXiv 2410.23918): any two tensors differ by at most one
    level. They measure what a level takes off the perplexity; here it is its loss.
    """
    deepest = max(len(stack.levels) for stack in stacks)
    order: list[tuple[str, str]] = []
    for depth in range(1, deepest):
        levels = [stack.levels[depth - 1 : depth + 1] for stack in stacks if stack.levels[depth:]]
        levels.sort(key=lambda pair: pair[1].loss - pair[0].loss)
        order += [(level.tensor, level.tier) for _, level in levels]
    return tuple(order)


LOAD_ORDERS: Mapping[str, Callable[[Sequence[Stack], LevelBytes], Order]] = {
    "kl": load_order,
    "average": average_order,
}


def _push(
    heap: list[tuple[float, int, Step, Iterator[Step]]], rank: int, rest: Iterator[Step]
) -> None:
    step = next(rest, None)
    if step is not None:
        heapq.heappush(heap, (-step.gain_per_byte, rank, step, rest))


@dataclass(frozen=True)
class Depths:
    """A tier for every tensor, with the weights' bytes in memory."""

    tiers: Mapping[str, str]
    weights_bytes: int

    def tier(self, name: str) -> str:
        """The tier of tensor ``name``."""
        return self.tiers[name]


def tier_at(stack: Stack, tier: str) -> str:
    """The tier this stack has when the whole model is asked for ``tier``.

    Narrow rows have the type that llama-quantize falls back to, what is never quantized has its one
    tier, and a tensor without the statistics that ``tier`` needs has its lowest.

    Raises:
        UsageError: The chain was converted without that tier, or its levels are not all here.
    """
    if len(stack.levels) == 1 and stack.levels[0].tier == SOURCE:
        return SOURCE
    if tier in stack.tiers:
        return tier
    if tier not in TYPES and tier != SOURCE:
        stack.depth_of(tier)
    wanted = tier if tier == SOURCE else type_for(tier, stack.cols)
    if wanted == stack.source_type:
        wanted = SOURCE
    if wanted not in stack.tiers and wanted != SOURCE and TYPES[wanted].needs_imatrix:
        return stack.tiers[0]
    stack.depth_of(wanted)
    return wanted


def uniform(
    stacks: Sequence[Stack],
    tier_of: Callable[[Stack], str],
    bytes_of: TierBytes = resident_bytes,
) -> Depths:
    """The depths at which every tensor has the tier that ``tier_of`` names."""
    tiers = {stack.name: tier_of(stack) for stack in stacks}
    return Depths(tiers, sum(bytes_of(stack, tiers[stack.name]) for stack in stacks))


def fill(
    stacks: Sequence[Stack],
    order: Order,
    weights_bytes: int,
    bytes_of: TierBytes = resident_bytes,
) -> Depths:
    """The depths that ``order`` reaches within ``weights_bytes`` of memory for weights.

    Levels that no longer fit are passed over, together with those that stand on them; a later,
    smaller level of another tensor may still fit. Of the depths reached each tensor has the one
    with the least loss.

    Args:
        stacks: All tensors.
        order: Over the levels above 0.
        weights_bytes: For all of them.
        bytes_of: Bytes in memory of a tensor at a tier.

    Raises:
        DoesNotFitError: Not even level 0 of every tensor fits.
    """
    by_name = {stack.name: stack for stack in stacks}
    depth = dict.fromkeys(by_name, 0)
    left = weights_bytes - uniform(stacks, lambda stack: stack.tiers[0], bytes_of).weights_bytes
    if left < 0:
        raise DoesNotFitError(
            f"weights need {format_size(weights_bytes - left)} at the lowest depth, the budget "
            f"leaves them {format_size(max(weights_bytes, 0))}; raise the budget by "
            f"{format_size(-left)}"
        )
    for name, tier in order:
        stack = by_name[name]
        if depth[name] + 1 >= len(stack.tiers) or stack.tiers[depth[name] + 1] != tier:
            continue  # its parent was passed over
        cost = bytes_of(stack, tier) - bytes_of(stack, stack.tiers[depth[name]])
        if cost <= left:
            left -= cost
            depth[name] += 1
    return uniform(stacks, lambda stack: _best_tier(stack, depth[stack.name]), bytes_of)


def _best_tier(stack: Stack, depth: int) -> str:
    """The tier up to level ``depth`` with the least loss; the highest of equal ones."""
    best = min(range(depth + 1), key=lambda d: (stack.levels[d].loss, -d))
    return stack.tiers[best]
