"""What each budget buys, as one plain object: the data behind `edgekit profile`'s page.

Everything is read from the manifest; with ``measure`` budgets are tried on this machine too. Every
number of the page is one of this object's.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from math import inf
from pathlib import Path

from edgekit import __version__
from edgekit.catalog import Catalog, open_catalog
from edgekit.devices.profile import Device
from edgekit.errors import DoesNotFitError, RefusedError
from edgekit.footprint import CELLS, kv_bytes, kv_choices
from edgekit.manifest import Json
from edgekit.plan import Plan, context_of, expected_kl, least_bytes, plan_budget, shape_in
from edgekit.planner import resident_bytes, resident_step, tier_at, uniform
from edgekit.speed import Prediction, predict

N_BUDGETS = 16
N_MAPS = 4  # budgets whose bits per weight are drawn tensor by tensor
MOST_CONTEXT = 1 << 17  # tokens; where the growth of the KV cache ends
ONCE = "once"  # the column of tensors that are in no layer


@dataclass(frozen=True)
class Facts:
    """What the artifact is; bytes."""

    name: str
    architecture: str
    n_parameters: int
    license: str | None
    source_bytes: int
    artifact_bytes: int
    base_bytes: int
    levels_bytes: int
    separate_bytes: int
    longest_context: int


@dataclass(frozen=True)
class TierRow:
    """A tier for every tensor: what a dedicated file would hold."""

    tier: str
    weights_bytes: int
    bits_per_weight: float


@dataclass(frozen=True)
class Stair:
    """One step of the load order: weights in memory, and the KL divergence left."""

    weights_bytes: int
    expected_kl: float


@dataclass(frozen=True)
class BudgetRow:
    """A plan; bytes. ``by_tier`` has the weights of every tier, lowest first."""

    budget_bytes: int
    total_bytes: int
    weights_bytes: int
    kv_bytes: int
    compute_bytes: int
    overhead_bytes: int
    by_tier: Mapping[str, int]
    bits_per_weight: float
    expected_kl: float | None
    batch: int


@dataclass(frozen=True)
class BitMap:
    """Bits per weight, ``[roles][columns]`` of `Profile.roles` and `Profile.columns`."""

    budget_bytes: int
    bits_per_weight: float
    bits: tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True)
class CacheRow:
    """Bytes of the KV cache for a context, by type."""

    context: int
    by_type: Mapping[str, int]


@dataclass(frozen=True)
class DeviceRow:
    """What a device gets: its plan and predicted speed, or what it lacks.

    Attributes:
        device: The profile.
        budget_bytes: What one app may hold there.
        plan: ``None`` where not even the lowest depth fits.
        predicted: Its speed.
        needs: Why nothing fits.
    """

    device: Device
    budget_bytes: int
    plan: BudgetRow | None
    predicted: Prediction | None
    needs: str | None


@dataclass(frozen=True)
class Profile:
    """Everything that the page shows.

    Attributes:
        context: Tokens that plans are made for.
        kv_type: Of their KV caches.
        least_bytes: The smallest budget.
        reference_ppl: Perplexity of the source.
        quality: Rows that were measured when the artifact was made, fewest bytes first.
        peers: Rows of other tools' files of the same model: ``tool``, ``name``, ``weights_bytes``,
            ``kl_mean``.
        measured: What `edgekit.trials.measured` found, or ``None``.
        experts: Of the manifest's ``n_experts``, ``n_used``, ``hit_curves``, ``verdict``; or empty.
    """

    edgekit: str
    artifact: Facts
    context: int
    kv_type: str
    least_bytes: int
    reference_ppl: float | None
    tiers: tuple[TierRow, ...]
    quality: tuple[Json, ...]
    stairs: tuple[Stair, ...]
    peers: tuple[Json, ...]
    budgets: tuple[BudgetRow, ...]
    roles: tuple[str, ...]
    columns: tuple[str, ...]
    maps: tuple[BitMap, ...]
    cache: tuple[CacheRow, ...]
    devices: tuple[DeviceRow, ...]
    measured: Json | None
    experts: Json

    def as_json(self) -> Json:
        """The same as dictionaries and lists."""
        body: Json = json.loads(json.dumps(asdict(self)))
        return body


Measurer = Callable[[Catalog, Sequence[Plan]], Json]  # budgets from the smallest to the largest


def profile(
    folder: Path,
    devices: Sequence[Device],
    *,
    context: int | None = None,
    kv_type: str = "f16",
    peers: Sequence[Json] = (),
    measured: Measurer | None = None,
) -> Profile:
    """Describe the artifact in ``folder``.

    Args:
        folder: Its manifest is all that is read, unless ``measured`` is given.
        devices: To predict for.
        context: Tokens; ``None`` takes 4096 or the model's own.
        kv_type: ``f16``, ``q8_0`` or ``q4_0``.
        peers: Rows as `read_peers` gives them.
        measured: Tries budgets on this machine.

    Raises:
        UsageError: There is no artifact. RefusedError: it is corrupt.
    """
    catalog = open_catalog(folder)
    shape, manifest = shape_in(catalog), catalog.manifest
    n_tokens = context_of(shape, context)
    plans = budget_plans(catalog, n_tokens, kv_type)
    roles, columns = _axes(catalog)
    quality, tiers = tuple(manifest.quality), _tiers(catalog)
    return Profile(
        edgekit=__version__,
        artifact=_facts(catalog, tiers),
        context=n_tokens,
        kv_type=kv_type,
        least_bytes=least_bytes(catalog, n_tokens, kv_type),
        reference_ppl=quality[-1].get("ref_ppl") if quality else None,
        tiers=tiers,
        quality=quality,
        stairs=_stairs(catalog),
        peers=tuple(peers),
        budgets=tuple(_row(catalog, plan) for plan in plans),
        roles=roles,
        columns=columns,
        maps=tuple(_bit_map(catalog, plan, roles, columns) for plan in _spread(plans, N_MAPS)),
        cache=_cache(catalog),
        devices=tuple(device_row(catalog, d, n_tokens, kv_type) for d in devices),
        measured=measured(catalog, plans) if measured else None,
        experts=_experts(manifest.experts),
    )


def budget_plans(catalog: Catalog, context: int, kv_type: str) -> list[Plan]:
    """Plans from the smallest budget to everything at its highest tier, evenly in weights.

    Even in ratio of weights, as quality is; plans of equal weights are left out.
    """
    roomy = plan_budget(catalog, 1 << 62, context, kv_type)
    least = least_bytes(catalog, context, kv_type)
    rest, most = roomy.memory.total, roomy.depths.weights_bytes
    lowest = uniform(catalog.stacks, lambda stack: stack.tiers[0]).weights_bytes
    weights = [lowest * (most / lowest) ** (i / (N_BUDGETS - 1)) for i in range(N_BUDGETS)]
    budgets = [least, *(round(w) + rest for w in weights[1:])]
    plans: dict[int, Plan] = {}
    for budget in sorted(max(least, budget) for budget in budgets):
        plan = plan_budget(catalog, budget, context, kv_type)
        plans.setdefault(plan.depths.weights_bytes, plan)
    return list(plans.values())


def device_row(catalog: Catalog, device: Device, context: int, kv_type: str) -> DeviceRow:
    """What ``device`` gets."""
    budget = device.budget_bytes
    try:
        plan = plan_budget(catalog, budget, context, kv_type)
    except DoesNotFitError as error:
        return DeviceRow(device, budget, None, None, str(error))
    speed = predict(device, catalog, plan)
    return DeviceRow(device, budget, _row(catalog, plan), speed, None)


def read_peers(path: Path) -> tuple[Json, ...]:
    """Rows of other tools' files, as ``tests/bench/peers`` writes them: the list ``models``.

    Raises:
        RefusedError: The file is no such list.
    """
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        rows: list[Json] = [
            {
                "tool": str(row["tool"]),
                "name": str(row["name"]),
                "weights_bytes": int(row["weights_bytes"]),
                "kl_mean": float(row["kl_mean"]),
            }
            for row in body["models"]
        ]
        if not all(0 <= row["kl_mean"] < inf and row["weights_bytes"] > 0 for row in rows):
            raise ValueError("a number is out of range")
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise RefusedError(
            f"{path} holds no list of models with tool, name, weights_bytes and kl_mean: {error}"
        ) from error
    return tuple(sorted(rows, key=lambda row: row["weights_bytes"]))


def _facts(catalog: Catalog, tiers: Sequence[TierRow]) -> Facts:
    m = catalog.manifest
    stored = m.base.n_bytes + m.levels.n_bytes
    return Facts(
        name=m.name,
        architecture=m.architecture,
        n_parameters=m.n_parameters,
        license=m.source.get("license"),
        source_bytes=sum(
            f["bytes"] for f in m.source.get("files", ()) if f["name"].endswith(".safetensors")
        ),
        artifact_bytes=stored,
        base_bytes=m.base.n_bytes,
        levels_bytes=m.levels.n_bytes,
        separate_bytes=sum(row.weights_bytes for row in tiers),
        longest_context=shape_in(catalog).context,
    )


def _tiers(catalog: Catalog) -> tuple[TierRow, ...]:
    n, rows = catalog.manifest.n_parameters, []
    for tier in catalog.manifest.tiers:
        size = sum(resident_bytes(stack, tier_at(stack, tier)) for stack in catalog.manifest.stacks)
        rows.append(TierRow(tier, size, 8 * size / n))
    return tuple(rows)


def _stairs(catalog: Catalog) -> tuple[Stair, ...]:
    """The expected KL divergence after every step of the load order; none without measurements."""
    quality = catalog.manifest.quality
    if not quality:
        return ()
    steps = [uniform(catalog.stacks, lambda stack: stack.tiers[0]).weights_bytes]
    for name, tier in catalog.order(catalog.manifest.resident_order):
        stack = catalog.stack(name)
        steps.append(resident_step(stack, stack.depth_of(tier) - 1))
    return tuple(Stair(n, expected_kl(quality, n) or 0.0) for n in accumulate(steps))


def _row(catalog: Catalog, plan: Plan) -> BudgetRow:
    by_tier: dict[str, int] = defaultdict(int)
    for stack in catalog.stacks:
        tier = plan.depths.tier(stack.name)
        by_tier[tier] += resident_bytes(stack, tier)
    names = [*catalog.manifest.tiers, *(t for t in by_tier if t not in catalog.manifest.tiers)]
    memory = plan.memory
    return BudgetRow(
        budget_bytes=plan.budget_bytes or plan.total_bytes,
        total_bytes=plan.total_bytes,
        weights_bytes=plan.depths.weights_bytes,
        kv_bytes=memory.kv_bytes,
        compute_bytes=memory.compute_bytes,
        overhead_bytes=memory.overhead_bytes,
        by_tier={tier: by_tier[tier] for tier in names if tier in by_tier},
        bits_per_weight=plan.bits_per_weight,
        expected_kl=plan.expected_kl,
        batch=plan.batch,
    )


def _axes(catalog: Catalog) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Roles of matrices in the order of the base, and layers; what is in no layer comes last."""
    places = [_place(s.name) for s in catalog.stacks if len(s.shape) > 1]
    roles = dict.fromkeys(role for role, _ in places)
    layers = dict.fromkeys(column for _, column in places if column != ONCE)
    columns = [*sorted(layers, key=int), *([ONCE] if any(c == ONCE for _, c in places) else [])]
    return tuple(roles), tuple(columns)


def _place(name: str) -> tuple[str, str]:
    """Role and column of a tensor: ``blk.3.attn_q.weight`` is ``attn_q`` in ``3``."""
    parts = name.removesuffix(".weight").split(".")
    if len(parts) >= 3 and parts[0] == "blk" and parts[1].isdigit():
        return ".".join(parts[2:]), parts[1]
    return ".".join(parts), ONCE


def _bit_map(catalog: Catalog, plan: Plan, roles: Sequence[str], columns: Sequence[str]) -> BitMap:
    bits = {
        _place(s.name): 8 * resident_bytes(s, plan.depths.tier(s.name)) / s.n_weights
        for s in catalog.stacks
        if len(s.shape) > 1
    }
    rows = tuple(tuple(bits.get((role, column)) for column in columns) for role in roles)
    return BitMap(plan.budget_bytes or plan.total_bytes, plan.bits_per_weight, rows)


def _cache(catalog: Catalog) -> tuple[CacheRow, ...]:
    shape = shape_in(catalog)
    most = min(MOST_CONTEXT, max(shape.context, 2 * CELLS))
    contexts = [CELLS << i for i in range(20) if CELLS << i <= most]
    types = kv_choices(shape)
    return tuple(CacheRow(n, {kind: kv_bytes(shape, n, kind) for kind in types}) for n in contexts)


def _experts(told: Json) -> Json:
    """Of what the manifest tells of its experts, what the page shows."""
    if not told.get("hit_curves"):
        return {}
    return {key: told[key] for key in ("n_experts", "n_used", "hit_curves", "verdict")}


def _spread(plans: Sequence[Plan], n: int) -> list[Plan]:
    """``n`` of ``plans``, the first and the last among them, evenly."""
    last = len(plans) - 1
    places = dict.fromkeys(round(i * last / max(1, n - 1)) for i in range(n))
    return [plans[i] for i in places]
