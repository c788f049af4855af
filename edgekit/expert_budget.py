"""What a pool of experts takes of a budget, and what it costs to have only some of them.

Resident are the dense weights and, for each layer, a number of experts; the rest is read when it is
chosen. The pool is one for all layers: their numbers add up.
"""

import mmap
from collections.abc import Sequence
from dataclasses import dataclass

from edgekit.kernels.ggml import row_bytes
from edgekit.manifest import Json
from edgekit.planner import Depths, resident_bytes
from edgekit.routing.facts import hit_rate, is_expert_tensor
from edgekit.stack import Stack

PAGE = mmap.PAGESIZE
# Experts that are being read and decoded, the threads that do it, and what they keep
PAGING_BYTES = 12 << 20


@dataclass(frozen=True)
class Paged:
    """Experts on demand in a plan; bytes.

    Attributes:
        experts_per_layer: Resident ones, on average over layers.
        n_experts: Experts of a layer.
        n_used: Experts that a token takes in a layer.
        n_layers: Layers with experts.
        pool_bytes: All resident experts.
        experts_bytes: All experts, resident or not.
        hit_rate: Expected from the trace of the conversion; ``None`` without one.
        bytes_per_token: Read from disk for a token, expected; ``None`` without a trace.
    """

    experts_per_layer: int
    n_experts: int
    n_used: int
    n_layers: int
    pool_bytes: int
    experts_bytes: int
    hit_rate: float | None
    bytes_per_token: int | None

    @property
    def saved_bytes(self) -> int:
        """What is not resident."""
        return self.experts_bytes - self.pool_bytes

    @property
    def longest_batch(self) -> int:
        """Tokens whose experts the pool holds whatever they choose."""
        slots = self.experts_per_layer * self.n_layers
        return 1 << 30 if slots >= self.n_experts else max(1, slots // self.n_used)


def paged_bytes(n_bytes: int) -> int:
    """Bytes of the pages that a range of ``n_bytes`` can touch, wherever it begins."""
    return (n_bytes // PAGE + 2) * PAGE


def expert_stacks(stacks: Sequence[Stack]) -> tuple[Stack, ...]:
    """Tensors whose experts can be paged."""
    return tuple(stack for stack in stacks if is_expert_tensor(stack.name))


@dataclass(frozen=True)
class SomeResident:
    """Bytes in memory of a tensor with ``n`` of its experts resident; all of a dense one."""

    n: int

    def __call__(self, stack: Stack, tier: str) -> int:
        """Bytes of ``stack`` at ``tier``."""
        if not is_expert_tensor(stack.name):
            return resident_bytes(stack, tier)
        return self.n * paged_bytes(expert_bytes(stack, tier))


def expert_bytes(stack: Stack, tier: str) -> int:
    """Bytes of one expert of ``stack`` at ``tier``."""
    return stack.n_rows * row_bytes(stack.type_at(tier), stack.cols)


def paged(stacks: Sequence[Stack], depths: Depths, n: int, n_used: int, experts: Json) -> Paged:
    """The pool of ``n`` experts per layer at ``depths``; ``experts`` is the manifest's field."""
    found = expert_stacks(stacks)
    resident = SomeResident(n)
    pool = sum(resident(stack, depths.tier(stack.name)) for stack in found)
    whole = sum(resident_bytes(stack, depths.tier(stack.name)) for stack in found)
    layers = {stack.name.split(".")[1] for stack in found}
    rate = hit_rate(experts, n)
    one = sum(expert_bytes(stack, depths.tier(stack.name)) for stack in found)
    missed = None if rate is None else round((1 - rate) * n_used * one)
    n_experts = found[0].n_experts
    return Paged(n, n_experts, n_used, len(layers), pool, whole, rate, missed)


def paged_json(plan: Paged) -> Json:
    """What ``plan --json`` tells of experts on demand."""
    return {
        "experts_per_layer": plan.experts_per_layer,
        "n_experts": plan.n_experts,
        "n_used": plan.n_used,
        "pool_bytes": plan.pool_bytes,
        "experts_bytes": plan.experts_bytes,
        "expected_hit_rate": plan.hit_rate,
        "bytes_read_per_token": plan.bytes_per_token,
    }
