"""What goes first when the budget falls: empty context, precise cache, depth, everything."""

from dataclasses import replace

import pytest
from converted import plain, tiny

from edgekit.catalog import Catalog, open_catalog
from edgekit.errors import DoesNotFitError
from edgekit.footprint import BATCHES, memory_of
from edgekit.plan import Plan, plan_budget, shape_in
from edgekit.planner import resident_bytes
from edgekit.surrender import RECOMPUTED_TOKENS, surrender

CONTEXT = 16384  # 16 MiB of cache: more than the weights


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    folder = tmp_path_factory.mktemp("surrender")
    checkpoint = tiny(folder / "c", "llama", width="wide", max_position_embeddings=CONTEXT)
    return open_catalog(plain(checkpoint, folder / "a").artifact)


@pytest.fixture(scope="module")
def home(catalog: Catalog) -> Plan:
    return plan_budget(catalog, 1 << 30, CONTEXT)


@pytest.fixture(autouse=True)
def nothing_hides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small caches and buffers show beside what loading takes for a moment."""
    monkeypatch.setattr("edgekit.footprint.loading_bytes", lambda shape, n_threads: 0)


def test_what_fits_as_it_was_stays_as_it_was(catalog: Catalog, home: Plan) -> None:
    kept = surrender(catalog, home, home, home.total_bytes, 100)
    assert kept == replace(home, budget_bytes=home.total_bytes)


def test_empty_context_goes_first(catalog: Catalog, home: Plan) -> None:
    least = home.depths.weights_bytes + memory_of(shape_in(catalog), CONTEXT, "f16", 32).total
    plan = surrender(catalog, home, home, least - 1, 5000)
    assert (plan.context, plan.kv_type, plan.depths) == (5120, "f16", home.depths)  # whole cells


def test_then_the_precision_of_the_cache(catalog: Catalog, home: Plan) -> None:
    used = RECOMPUTED_TOKENS
    wide = replace(home, context=used)
    least = home.depths.weights_bytes + memory_of(shape_in(catalog), used, "f16", 32).total
    smaller = home.depths.weights_bytes + memory_of(shape_in(catalog), used, "q8_0", 32).total
    assert smaller < least
    plan = surrender(catalog, wide, wide, least - 1, used)
    assert (plan.context, plan.kv_type, plan.depths) == (used, "q8_0", home.depths)


def test_a_long_conversation_keeps_its_cache_type(catalog: Catalog, home: Plan) -> None:
    used = 8 * RECOMPUTED_TOKENS
    for present in ("f16", "q8_0"):
        loaded = replace(home, kv_type=present)
        for budget in range(home.total_bytes, home.total_bytes - (18 << 20), -(1 << 20)):
            try:
                plan = surrender(catalog, home, loaded, budget, used)
            except DoesNotFitError:
                break
            assert plan.kv_type == present
            assert plan.context >= used


def test_then_depth_and_at_last_everything(catalog: Catalog, home: Plan) -> None:
    used, weights, budget = 4096, [], home.total_bytes
    with pytest.raises(DoesNotFitError):
        while True:
            plan = surrender(catalog, home, home, budget, used)
            assert plan.total_bytes <= budget == plan.budget_bytes
            assert plan.context in (CONTEXT, used)
            weights.append((plan.batch, plan.depths.weights_bytes))
            budget -= 64 << 10
    for batch in BATCHES:
        of_batch = [n for b, n in weights if b == batch]
        assert of_batch == sorted(of_batch, reverse=True)
    lowest = sum(resident_bytes(stack, stack.tiers[0]) for stack in catalog.stacks)
    assert weights[0][1] == home.depths.weights_bytes > 2 * lowest
    assert lowest <= weights[-1][1] <= lowest + (64 << 10)


def test_a_batch_shrinks_before_a_tier_goes(catalog: Catalog, home: Plan) -> None:
    shape, used = shape_in(catalog), CONTEXT
    smallest = home.depths.weights_bytes + memory_of(shape, CONTEXT, "f16", 32).total
    plan = surrender(catalog, home, home, smallest, used)
    assert (plan.batch, plan.depths, plan.context) == (32, home.depths, CONTEXT)
