"""A plan: budget and context in, the depth of every tensor out, with every byte accounted for."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from edgekit.catalog import Catalog
from edgekit.errors import DoesNotFitError, UsageError
from edgekit.expert_budget import Paged, SomeResident, paged_json
from edgekit.footprint import BATCHES, Memory, Shape, memory_of, shape_of
from edgekit.manifest import Json
from edgekit.planner import Depths, fill, resident_bytes, tier_at, uniform
from edgekit.sizes import format_size

EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"  # GGUF names
LEAST_KL = 1e-9  # where a measured KL is 0, so that its logarithm is a number
DEFAULT_CONTEXT = 4096  # tokens, or the model's own context when that is shorter
# Of a budget, for compute buffers: a larger batch reads prompts faster, but takes from the weights
COMPUTE_SHARE = 1 / 32
LEAST_CONTEXT = 256  # that a message proposes: one step of llama.cpp's cache


@dataclass(frozen=True)
class Plan:
    """The depth of every tensor within a budget; bytes.

    Attributes:
        budget_bytes: What the process may hold resident; ``None`` where only the weights were
            limited.
        context: Tokens.
        batch: Tokens of a prompt computed at once.
        kv_type: Key of `KV_TYPES`.
        memory: Everything but weights.
        depths: Tier of every tensor.
        bits_per_weight: Of the weights in memory.
        expected_kl: Mean KL divergence to the source, interpolated from what ``convert`` measured;
            ``None`` where it measured nothing.
        held_bytes: What the process held before; ``None`` where a usual one was assumed.
        repack: llama.cpp may lay weights out for its fastest kernels; counted in ``memory``.
        paged: Experts on demand; ``None`` where all weights are resident.
    """

    budget_bytes: int | None
    context: int
    batch: int
    kv_type: str
    memory: Memory
    depths: Depths
    bits_per_weight: float
    expected_kl: float | None
    held_bytes: int | None = None
    repack: bool = False
    paged: Paged | None = None

    @property
    def weights_bytes(self) -> int:
        """Weights in memory: all of them, or without the experts that wait on disk."""
        return self.depths.weights_bytes - (self.paged.saved_bytes if self.paged else 0)

    @property
    def total_bytes(self) -> int:
        """Weights and everything else."""
        return self.weights_bytes + self.memory.total


def shape_in(catalog: Catalog) -> Shape:
    """The facts of the artifact's model that memory follows from."""
    manifest = catalog.manifest
    facts = manifest.header_bytes, manifest.memory, catalog.chunk
    return shape_of(manifest.architecture, manifest.model, *facts)


def plan_budget(
    catalog: Catalog,
    budget_bytes: int,
    context: int | None = None,
    kv_type: str = "f16",
    held: int | None = None,
) -> Plan:
    """The best depths that a process of ``budget_bytes`` can hold.

    Args:
        catalog: The artifact, or its manifest alone.
        budget_bytes: For the whole process.
        context: Tokens; ``None`` takes `DEFAULT_CONTEXT` or the model's own.
        kv_type: Key of `KV_TYPES`.
        held: Bytes the process holds already; ``None`` takes what one usually does.

    Raises:
        DoesNotFitError: Even the lowest depth is too large; the message says what would fit.
    """
    shape = shape_in(catalog)
    n_tokens = context_of(shape, context)
    lowest = uniform(catalog.stacks, lambda stack: stack.tiers[0]).weights_bytes
    highest = uniform(catalog.stacks, lambda stack: stack.tiers[-1]).weights_bytes
    batch, memory = batch_and_memory(
        shape, n_tokens, kv_type, held, (lowest, highest), budget_bytes
    )
    if lowest + memory.total > budget_bytes:
        needs = {n: memory_of(shape, n, kv_type, batch, held).total for n in shorter(n_tokens)}
        raise DoesNotFitError(
            too_small("the lowest depth", lowest, memory, budget_bytes, n_tokens, needs)
        )
    order = catalog.order(catalog.manifest.resident_order)
    depths = fill(catalog.stacks, order, budget_bytes - memory.total)
    plan = plan_of(catalog, depths, memory, budget_bytes, n_tokens, batch, kv_type)
    return replace(plan, held_bytes=held)


def batch_and_memory(
    shape: Shape,
    n_tokens: int,
    kv_type: str,
    held: int | None,
    weights: tuple[int, int],
    budget_bytes: int,
) -> tuple[int, Memory]:
    """The largest batch whose compute buffers are small, or fit beside the most weights.

    Args:
        shape, n_tokens, kv_type, held: As for `memory_of`.
        weights: The least and the most bytes of weights there may be.
        budget_bytes: For the whole process.

    Returns:
        The batch and what is needed besides weights; the smallest where none fits.
    """
    lowest, highest = weights
    for batch in BATCHES:
        memory = memory_of(shape, n_tokens, kv_type, batch, held)
        is_small = memory.compute_bytes <= COMPUTE_SHARE * budget_bytes
        if (lowest if is_small else highest) + memory.total <= budget_bytes:
            break
    return batch, memory


def least_bytes(catalog: Catalog, context: int, kv_type: str = "f16") -> int:
    """The smallest budget that `plan_budget` has a plan for."""
    lowest = uniform(catalog.stacks, lambda stack: stack.tiers[0]).weights_bytes
    return lowest + memory_of(shape_in(catalog), context, kv_type, BATCHES[-1]).total


def with_repacking(catalog: Catalog, plan: Plan) -> Plan:
    """The plan with repacked weights where their bytes fit the budget too, else as it is.

    Repacking is in place but for two things: a tensor is held twice while it is repacked, and an
    embedding that is the output head as well stays in both forms.
    """
    if plan.paged is not None:  # repacked weights lie elsewhere
        return plan
    sizes = {s.name: resident_bytes(s, plan.depths.tier(s.name)) for s in catalog.stacks}
    twice = 0 if OUTPUT in sizes else sizes.get(EMBEDDING, 0)
    loading = max(0, max(sizes.values()) - plan.memory.kv_bytes - plan.memory.compute_bytes)
    total = plan.total_bytes + twice + loading
    if plan.budget_bytes is not None and total > plan.budget_bytes:
        return plan
    overhead = plan.memory.overhead_bytes + twice + loading
    return replace(plan, repack=True, memory=replace(plan.memory, overhead_bytes=overhead))


def plan_weights(catalog: Catalog, weights_bytes: int) -> Plan:
    """The best depths whose weights take at most ``weights_bytes``."""
    order = catalog.order(catalog.manifest.resident_order)
    depths = fill(catalog.stacks, order, weights_bytes)
    return _unlimited(catalog, depths)


def plan_tier(catalog: Catalog, tier: str) -> Plan:
    """Every tensor at ``tier``, as llama-quantize's pure mode would have it.

    Raises:
        UsageError: The artifact has no such tier, or not all of its levels are here.
    """
    if tier not in catalog.manifest.tiers:
        raise UsageError(
            f"{catalog.folder} has no tier {tier}; it has {', '.join(catalog.manifest.tiers)}"
        )
    return _unlimited(catalog, uniform(catalog.stacks, lambda stack: tier_at(stack, tier)))


def _unlimited(catalog: Catalog, depths: Depths) -> Plan:
    shape = shape_in(catalog)
    context = context_of(shape, None)
    memory = memory_of(shape, context, "f16")
    return plan_of(catalog, depths, memory, None, context, BATCHES[0], "f16")


def plan_of(
    catalog: Catalog,
    depths: Depths,
    memory: Memory,
    budget_bytes: int | None,
    context: int,
    batch: int,
    kv_type: str,
) -> Plan:
    """The plan with what follows from its depths."""
    bits = 8 * depths.weights_bytes / catalog.manifest.n_parameters
    kl = expected_kl(catalog.manifest.quality, depths.weights_bytes)
    return Plan(budget_bytes, context, batch, kv_type, memory, depths, bits, kl)


def context_of(shape: Shape, asked: int | None) -> int:
    """Tokens of context: those asked for, else `DEFAULT_CONTEXT` or the model's own.

    Raises:
        UsageError: More or fewer are asked for than there can be.
    """
    if asked is None:
        return min(DEFAULT_CONTEXT, shape.context)
    if not 1 <= asked <= 1 << 24:
        raise UsageError(f"context {asked} is out of range; give 1 to {1 << 24} tokens")
    return asked


def shorter(context: int) -> list[int]:
    """Contexts that a message may propose, longest first."""
    return [n for i in range(1, 20) if (n := context >> i) >= LEAST_CONTEXT]


def too_small(
    what: str, lowest: int, memory: Memory, budget: int, context: int, needs: Mapping[int, int]
) -> str:
    """One line: what is needed, what there is, which budget or context would fit.

    Args:
        what: Would be loaded.
        lowest: Its bytes of weights.
        memory: All else that it needs at ``context``.
        budget: What there is, bytes.
        context: Tokens that are asked for.
        needs: All else that it needs, bytes, at shorter contexts, longest first.
    """
    need = lowest + memory.total
    fitting = next((n for n, rest in needs.items() if lowest + rest <= budget), None)
    least = min(needs, default=context)
    least_need = lowest + needs.get(least, memory.total)
    hint = f"give --budget {_mib_up(need)}MiB"
    if fitting is not None:
        hint += f", or --context {fitting}"
    elif _mib_up(least_need) < _mib_up(need):
        hint += f", or {_mib_up(least_need)}MiB with --context {least}"
    return (
        f"{what} needs {format_size(need)} at a context of {context} "
        f"(weights {format_size(lowest)}, KV cache {format_size(memory.kv_bytes)}, compute "
        f"{format_size(memory.compute_bytes)}, process {format_size(memory.overhead_bytes)}), the "
        f"budget is {format_size(budget)}; {hint}"
    )


def _mib_up(n_bytes: int) -> int:
    return -(-n_bytes // 2**20)


def expected_kl(quality: Sequence[Json], weights_bytes: int) -> float | None:
    """Interpolate the measured KL at ``weights_bytes``: log KL is close to linear in bytes.

    A size that measured worse than a smaller one, as by one token that took another expert, counts
    as good as that: its plan holds all that the smaller one does.
    Below the first and above the last measured size the nearest value is given.
    """
    rows = sorted((row["weights_bytes"], row["kl_mean"]) for row in quality)
    least = accumulate((kl for _, kl in rows), min)
    points = [(n_bytes, kl) for (n_bytes, _), kl in zip(rows, least, strict=True)]
    if not points:
        return None
    before = [p for p in points if p[0] <= weights_bytes] or points[:1]
    after = [p for p in points if p[0] >= weights_bytes] or points[-1:]
    (x0, y0), (x1, y1) = before[-1], after[0]
    if x1 <= x0:
        return float(y0 if x0 <= weights_bytes else y1)
    share = (weights_bytes - x0) / (x1 - x0)
    logs = (math.log(max(y, LEAST_KL)) for y in (y0, y1))
    return math.exp(sum(log * part for log, part in zip(logs, (1 - share, share), strict=True)))


def plan_json(catalog: Catalog, plan: Plan) -> Json:
    """The plan as one JSON object; sizes in bytes."""
    size = SomeResident(plan.paged.experts_per_layer) if plan.paged else resident_bytes
    tiers = {s.name: plan.depths.tier(s.name) for s in catalog.stacks}
    tensors = [
        {"name": s.name, "tier": tiers[s.name], "bytes": size(s, tiers[s.name])}
        for s in catalog.stacks
    ]
    return {
        "fits": plan.budget_bytes is None or plan.total_bytes <= plan.budget_bytes,
        "budget_bytes": plan.budget_bytes,
        "context": plan.context,
        "batch": plan.batch,
        "kv_type": plan.kv_type,
        "repack": plan.repack,
        "weights_bytes": plan.weights_bytes,
        "kv_bytes": plan.memory.kv_bytes,
        "compute_bytes": plan.memory.compute_bytes,
        "overhead_bytes": plan.memory.overhead_bytes,
        "total_bytes": plan.total_bytes,
        "bits_per_weight": round(plan.bits_per_weight, 4),
        "expected_kl": plan.expected_kl,
        "experts": paged_json(plan.paged) if plan.paged else None,
        "tensors": tensors,
    }
