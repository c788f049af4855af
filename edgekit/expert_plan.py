"""Plans for mixtures of experts: all experts resident where they fit, else some of them."""

from dataclasses import replace

from edgekit.catalog import Catalog
from edgekit.errors import DoesNotFitError, UsageError
from edgekit.expert_budget import PAGING_BYTES, SomeResident, expert_stacks, paged
from edgekit.footprint import Memory, memory_of
from edgekit.plan import (
    Plan,
    batch_and_memory,
    context_of,
    plan_budget,
    plan_of,
    shape_in,
    shorter,
    too_small,
)
from edgekit.planner import Depths, fill, uniform
from edgekit.routing.facts import is_expert_tensor


def plan_any(
    catalog: Catalog,
    budget_bytes: int,
    context: int | None = None,
    kv_type: str = "f16",
    held: int | None = None,
    *,
    expert_cache: int | None = None,
    pager: bool = True,
) -> Plan:
    """The best plan within ``budget_bytes``.

    Args:
        catalog, budget_bytes, context, kv_type, held: As for `plan_budget`.
        expert_cache: Resident experts per layer; ``None`` keeps all where they fit at the lowest
            depth, else as many as fit.
        pager: False plans for all experts always.

    Raises:
        UsageError: ``expert_cache`` makes no sense for this model, or the pager is off.
        DoesNotFitError: Not even the experts of one token fit.
    """
    n_experts, n_used = experts_of(catalog)
    if expert_cache is not None:
        _check_cache(catalog, expert_cache, n_experts, n_used, pager)
        if expert_cache >= n_experts:
            return plan_budget(catalog, budget_bytes, context, kv_type, held)
        return plan_paged(catalog, budget_bytes, context, kv_type, held, expert_cache)
    try:
        return plan_budget(catalog, budget_bytes, context, kv_type, held)
    except DoesNotFitError:
        if not pager or not _saves(catalog, n_experts, n_used):
            raise
    return plan_paged(catalog, budget_bytes, context, kv_type, held)


def experts_of(catalog: Catalog) -> tuple[int, int]:
    """Experts of a layer, and those a token takes; zeros for a dense model."""
    found = expert_stacks(catalog.stacks)
    prefix = catalog.manifest.architecture
    n_used = catalog.manifest.model.get(f"{prefix}.expert_used_count", 0)
    return (found[0].n_experts, int(n_used)) if found and n_used else (0, 0)


def plan_paged(
    catalog: Catalog,
    budget_bytes: int,
    context: int | None = None,
    kv_type: str = "f16",
    held: int | None = None,
    expert_cache: int | None = None,
) -> Plan:
    """A plan with only some experts resident.

    With ``expert_cache`` the rest of the budget buys depth, as always. Without, experts stay at
    their lowest tier, where reading one costs least; as many as fit are resident, and what is left
    raises dense tensors.

    Raises:
        DoesNotFitError: Not even the experts of one token fit, or not ``expert_cache`` of them.
    """
    shape, (n_experts, n_used) = shape_in(catalog), experts_of(catalog)
    n_tokens = context_of(shape, context)
    n = n_used if expert_cache is None else expert_cache
    bounds = _weights(catalog, n, 0), _weights(catalog, n, -1)
    batch, memory = batch_and_memory(
        shape, n_tokens, kv_type, held, bounds, budget_bytes - PAGING_BYTES
    )
    memory = _paging(memory)
    left = budget_bytes - memory.total
    if bounds[0] > left:
        needs = {
            length: _paging(memory_of(shape, length, kv_type, batch, held)).total
            for length in shorter(n_tokens)
        }
        what = f"the lowest depth with {n} of {n_experts} experts per layer resident"
        raise DoesNotFitError(too_small(what, bounds[0], memory, budget_bytes, n_tokens, needs))
    if expert_cache is None:
        while n + 1 < n_experts and _weights(catalog, n + 1, 0) <= left:
            n += 1
    depths = _depths(catalog, n, left, dense_only=expert_cache is None)
    pool = paged(catalog.stacks, depths, n, n_used, catalog.manifest.experts)
    batch = min(batch, pool.longest_batch)
    plan = plan_of(catalog, depths, memory, budget_bytes, n_tokens, batch, kv_type)
    return replace(plan, held_bytes=held, paged=pool)


def with_pager(memory: Memory, plan: Plan) -> Memory:
    """``memory`` with what paging takes, where ``plan`` has experts on demand."""
    return memory if plan.paged is None else _paging(memory)


def _paging(memory: Memory) -> Memory:
    return replace(memory, overhead_bytes=memory.overhead_bytes + PAGING_BYTES)


def _saves(catalog: Catalog, n_experts: int, n_used: int) -> bool:
    """Whether the experts of one token, paged, take less than all of them; not in a small model."""
    lowest = uniform(catalog.stacks, lambda stack: stack.tiers[0]).weights_bytes
    return n_used < n_experts and _weights(catalog, n_used, 0) + PAGING_BYTES < lowest


def _weights(catalog: Catalog, n: int, depth: int) -> int:
    """Resident weights with ``n`` experts per layer, all tensors at one end of their stacks."""
    resident = SomeResident(n)
    return sum(resident(stack, stack.tiers[depth]) for stack in catalog.stacks)


def _depths(catalog: Catalog, n: int, weights_bytes: int, *, dense_only: bool) -> Depths:
    order = catalog.order(catalog.manifest.resident_order)
    if dense_only:
        order = tuple(key for key in order if not is_expert_tensor(key[0]))
    return fill(catalog.stacks, order, weights_bytes, SomeResident(n))


def _check_cache(catalog: Catalog, cache: int, n_experts: int, n_used: int, pager: bool) -> None:
    if not n_experts:
        raise UsageError(f"{catalog.folder} has no experts; leave --expert-cache out")
    if not pager:
        raise UsageError("--expert-cache and --no-pager exclude each other; give one")
    if cache < n_used:
        raise UsageError(
            f"a token takes {n_used} experts in a layer, --expert-cache {cache} holds fewer; give "
            f"{n_used} to {n_experts}"
        )
