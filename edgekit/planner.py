"""Load orders and plans: which levels to load first, and what a budget buys.

A load order is greedy on the lower convex hull of (bytes, loss) of every tensor: the next step is
always the one that lowers the loss most per byte. On hulls, greedy is the Lagrangian optimum at
every budget it reaches exactly (Shoham & Gersho, "Efficient bit allocation for an arbitrary set of
quantizers", IEEE Trans. ASSP 1988).
"""

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from edgekit.errors import DoesNotFitError
from edgekit.kernels.ggml import TYPES, row_bytes, type_for
from edgekit.manifest import Order
from edgekit.sizes import format_size
from edgekit.stack import SOURCE, Level, Stack

ResidentBytes = Callable[[Stack, str], int]  # bytes in memory at a tier
LevelBytes = Callable[[Stack, int], int]  # cost in bytes of going from depth to depth + 1


def resident_bytes(stack: Stack, tier: str) -> int:
    """Bytes of the tensor in memory at ``tier``: plain blocks of its ggml type."""
    rows = stack.n_weights // stack.cols
    return rows * row_bytes(stack.type_at(tier), stack.cols)


def resident_step(stack: Stack, depth: int) -> int:
    """Memory that level ``depth`` adds over the one below it."""
    tiers = stack.tiers
    return resident_bytes(stack, tiers[depth]) - resident_bytes(stack, tiers[depth - 1])


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
        """Loss removed per byte; a step that costs nothing comes first."""
        return self.gain / self.n_bytes if self.n_bytes > 0 else float("inf")


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
    n_bytes, gain = costs[stop] - costs[start], losses[start] - losses[stop]
    return gain / n_bytes if n_bytes > 0 else float("inf")


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
    wanted = tier if tier == SOURCE else type_for(tier, stack.cols)
    if wanted == stack.source_type:
        wanted = SOURCE
    if wanted not in stack.tiers and wanted != SOURCE and TYPES[wanted].needs_imatrix:
        return stack.tiers[0]
    stack.depth_of(wanted)
    return wanted


def uniform(stacks: Sequence[Stack], tier_of: Callable[[Stack], str]) -> Depths:
    """The depths at which every tensor has the tier that ``tier_of`` names."""
    tiers = {stack.name: tier_of(stack) for stack in stacks}
    return Depths(tiers, sum(resident_bytes(stack, tiers[stack.name]) for stack in stacks))


def fill(
    stacks: Sequence[Stack],
    order: Order,
    weights_bytes: int,
    resident: ResidentBytes = resident_bytes,
) -> Depths:
    """The depths that ``order`` reaches within ``weights_bytes`` of memory for weights.

    Levels that no longer fit are passed over, together with those that stand on them; a later,
    smaller level of another tensor may still fit.

    Args:
        stacks: All tensors.
        order: Over the levels above 0.
        weights_bytes: For all of them.
        resident: Bytes in memory of a tensor at a tier.

    Raises:
        DoesNotFitError: Not even level 0 of every tensor fits.
    """
    by_name = {stack.name: stack for stack in stacks}
    depth = dict.fromkeys(by_name, 0)
    left = weights_bytes - sum(resident(stack, stack.tiers[0]) for stack in stacks)
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
        tiers = stack.tiers[depth[name] : depth[name] + 2]
        cost = resident(stack, tiers[1]) - resident(stack, tiers[0])
        if cost <= left:
            left -= cost
            depth[name] += 1
    return uniform(stacks, lambda stack: stack.tiers[depth[stack.name]])
