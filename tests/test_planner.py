"""Load orders and fills against brute force: every choice of tiers is tried."""

import math
from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import DoesNotFitError, UsageError
from edgekit.planner import (
    fill,
    hull_steps,
    load_order,
    resident_bytes,
    resident_step,
    stored_step,
    tier_at,
)
from edgekit.stack import SOURCE, Level, Part, Stack

# bytes of 256 weights, as in ggml-common.h: block of Q2_K, Q4_K, Q8_0 (8 of 34), BF16
BLOCK_BYTES = {"Q2_K": 84, "Q3_K": 110, "Q4_K": 144, "Q6_K": 210, "Q8_0": 272, SOURCE: 512}
TIERS = tuple(BLOCK_BYTES)


def make_stack(
    name: str,
    losses: dict[str, float],
    shape: tuple[int, ...] = (1, 256),
    stored: int = 64,
    source_type: str = "BF16",
) -> Stack:
    """A stack whose levels have ``losses`` and take ``stored`` bytes each."""
    levels, parent = [], None
    for tier, loss in losses.items():
        levels.append(Level(name, tier, parent, "nested", (Part(0, stored, ""),), loss))
        parent = tier
    return Stack(name, shape, source_type, tuple(levels))


@st.composite
def stacks_of(draw: st.DrawFn) -> list[Stack]:
    """Two to four tensors of different sizes with two to four tiers each and falling losses."""
    found = []
    for i in range(draw(st.integers(2, 4))):
        tiers = draw(st.lists(st.sampled_from(TIERS), min_size=2, max_size=4, unique=True))
        tiers.sort(key=TIERS.index)
        losses = draw(
            st.lists(st.integers(0, 1000), min_size=len(tiers), max_size=len(tiers), unique=True)
        )
        falling = sorted(losses, reverse=True)
        rows = draw(st.integers(1, 5))
        found.append(
            make_stack(f"t{i}", dict(zip(tiers, map(float, falling), strict=True)), (rows, 256))
        )
    return found


def bytes_of(stack: Stack, tier: str) -> int:
    return stack.shape[0] * BLOCK_BYTES[tier]


def choices(stacks: list[Stack]) -> list[tuple[int, float]]:
    """(bytes, loss) of every way to give each tensor a tier."""
    return [
        (
            sum(bytes_of(s, lv.tier) for s, lv in zip(stacks, levels, strict=True)),
            sum(lv.loss for lv in levels),
        )
        for levels in product(*(s.levels for s in stacks))
    ]


def lagrangian_bound(stacks: list[Stack], budget: int) -> float:
    """The best lower bound on the loss within ``budget`` that a price per byte can prove."""
    points = [[(bytes_of(s, lv.tier), lv.loss) for lv in s.levels] for s in stacks]
    prices = {0.0} | {
        (a[1] - b[1]) / (b[0] - a[0])
        for rows in points
        for a, b in product(rows, rows)
        if b[0] > a[0]
    }
    return max(
        sum(min(loss + price * n for n, loss in rows) for rows in points) - price * budget
        for price in prices
        if price >= 0
    )


def loss_of(stacks: list[Stack], tiers: dict[str, str]) -> float:
    return sum(lv.loss for s in stacks for lv in s.levels if lv.tier == tiers[s.name])


@settings(max_examples=60)
@given(stacks_of(), st.floats(0, 1))
def test_a_fill_is_within_one_step_of_the_lagrangian_bound_and_of_the_knapsack(
    stacks: list[Stack], share: float
) -> None:
    all_choices = choices(stacks)
    least, most = min(n for n, _ in all_choices), max(n for n, _ in all_choices)
    budget = least + round(share * (most - least))
    depths = fill(stacks, load_order(stacks, resident_step), budget)
    ours = loss_of(stacks, dict(depths.tiers))
    exact = min(loss for n, loss in all_choices if n <= budget)
    bound = lagrangian_bound(stacks, budget)
    biggest = max(step.gain for s in stacks for step in hull_steps(s, resident_step))
    assert bound <= exact + 1e-6
    assert exact <= ours
    assert ours <= bound + biggest + 1e-6
    assert depths.weights_bytes == sum(bytes_of(s, depths.tier(s.name)) for s in stacks) <= budget


@settings(max_examples=200)
@given(stacks_of(), st.floats(0, 1))
def test_a_fill_is_never_worse_than_exhaustive_search_by_more_than_one_level(
    stacks: list[Stack], share: float
) -> None:
    all_choices = choices(stacks)
    least, most = min(n for n, _ in all_choices), max(n for n, _ in all_choices)
    budget = least + round(share * (most - least))
    ours = loss_of(stacks, dict(fill(stacks, load_order(stacks, resident_step), budget).tiers))
    exact = min(loss for n, loss in all_choices if n <= budget)
    biggest = max(a.loss - b.loss for s in stacks for a, b in pairwise(s.levels))
    assert exact <= ours <= exact + biggest + 1e-6


@settings(max_examples=60)
@given(stacks_of())
def test_at_every_corner_of_the_hull_greedy_is_the_exact_knapsack(stacks: list[Stack]) -> None:
    all_choices = choices(stacks)
    order = load_order(stacks, resident_step)
    steps = sorted(
        (step for s in stacks for step in hull_steps(s, resident_step)),
        key=lambda step: -step.gain_per_byte,
    )
    budget = min(n for n, _ in all_choices)
    for step in steps:
        budget += step.n_bytes
        ours = loss_of(stacks, dict(fill(stacks, order, budget).tiers))
        # steps of equal slope may be taken in another order, then greedy is a step behind
        ties = [s.gain for s in steps if math.isclose(s.gain_per_byte, step.gain_per_byte)]
        exact = min(loss for n, loss in all_choices if n <= budget)
        assert exact <= ours <= exact + (max(ties) if len(ties) > 1 else 0) + 1e-6


@settings(max_examples=60)
@given(stacks_of())
def test_hull_steps_get_flatter_and_no_tier_lies_below_them(stacks: list[Stack]) -> None:
    for stack in stacks:
        steps = list(hull_steps(stack, resident_step))
        assert [lv.tier for step in steps for lv in step.levels] == list(stack.tiers[1:])
        slopes = [step.gain_per_byte for step in steps]
        assert slopes == sorted(slopes, reverse=True)
        corners = [(bytes_of(stack, stack.tiers[0]), stack.levels[0].loss)]
        for step in steps:
            corners.append((corners[-1][0] + step.n_bytes, corners[-1][1] - step.gain))
        for level in stack.levels:
            at = bytes_of(stack, level.tier)
            for (x0, y0), (x1, y1) in pairwise(corners):
                if x0 <= at <= x1:
                    assert level.loss >= y0 + (y1 - y0) * (at - x0) / (x1 - x0) - 1e-6


@settings(max_examples=60)
@given(stacks_of())
def test_an_order_has_every_level_once_after_its_parent(stacks: list[Stack]) -> None:
    for level_bytes in (resident_step, stored_step):
        order = load_order(stacks, level_bytes)
        assert sorted(order) == sorted((s.name, t) for s in stacks for t in s.tiers[1:])
        for stack in stacks:
            assert [t for name, t in order if name == stack.name] == list(stack.tiers[1:])
        assert order == load_order(stacks, level_bytes)


def test_equal_slopes_are_taken_in_the_order_of_the_tensors() -> None:
    losses = {"Q2_K": 4.0, "Q4_K": 2.0, SOURCE: 0.0}
    names = ("b", "a", "c")
    order = load_order([make_stack(n, losses) for n in names], resident_step)
    assert order[:3] == (("b", "Q4_K"), ("a", "Q4_K"), ("c", "Q4_K"))
    assert order[3:] == (("b", SOURCE), ("a", SOURCE), ("c", SOURCE))


def test_the_steepest_step_comes_first_and_skips_a_tier_above_the_hull() -> None:
    # a: Q4_K saves 1 of 10 for 60 bytes, Q8_0 all 10 for 188: both levels are one step of 10/188
    # b: 8 for 60 bytes is steeper still
    a = make_stack("a", {"Q2_K": 10.0, "Q4_K": 9.0, "Q8_0": 0.0})
    b = make_stack("b", {"Q2_K": 8.0, "Q4_K": 0.0})
    assert load_order([a, b], resident_step) == (("b", "Q4_K"), ("a", "Q4_K"), ("a", "Q8_0"))


def test_stored_and_resident_orders_weigh_their_own_bytes() -> None:
    big = make_stack("big", {"Q2_K": 2.0, "Q4_K": 0.0}, (8, 256), stored=10)
    small = make_stack("small", {"Q2_K": 1.0, "Q4_K": 0.0}, (1, 256), stored=1000)
    assert load_order([small, big], resident_step)[0][0] == "small"  # 1/60 against 2/480
    assert load_order([small, big], stored_step)[0][0] == "big"  # 2/10 against 1/1000


@settings(max_examples=60)
@given(stacks_of(), st.floats(0, 1))
def test_no_next_level_fits_in_what_a_fill_leaves(stacks: list[Stack], share: float) -> None:
    least = sum(bytes_of(s, s.tiers[0]) for s in stacks)
    most = sum(bytes_of(s, s.tiers[-1]) for s in stacks)
    budget = least + round(share * (most - least))
    depths = fill(stacks, load_order(stacks, resident_step), budget)
    left = budget - depths.weights_bytes
    assert left >= 0
    for stack in stacks:
        depth = stack.tiers.index(depths.tier(stack.name)) + 1
        if depth < len(stack.tiers):
            assert (
                bytes_of(stack, stack.tiers[depth]) - bytes_of(stack, stack.tiers[depth - 1]) > left
            )


@pytest.mark.parametrize(("tier", "n_bytes"), [(t, 6 * n) for t, n in BLOCK_BYTES.items()])
def test_resident_bytes_are_ggmls_block_sizes(tier: str, n_bytes: int) -> None:
    assert resident_bytes(make_stack("t", {tier: 1.0}, (3, 2, 256)), tier) == n_bytes


def test_a_budget_below_the_lowest_depth_says_what_is_missing() -> None:
    stack = make_stack("t", {"Q2_K": 1.0, "Q4_K": 0.0}, (100, 256))  # 8400 bytes at Q2_K
    assert fill([stack], load_order([stack], resident_step), 8400).tiers == {"t": "Q2_K"}
    with pytest.raises(DoesNotFitError) as error:
        fill([stack], load_order([stack], resident_step), 8399)
    assert str(error.value) == (
        "weights need 8.20 KiB at the lowest depth, the budget leaves them 8.20 KiB; "
        "raise the budget by 1 bytes"
    )
    with pytest.raises(DoesNotFitError, match=r"leaves them 0 bytes; raise .* by 8\.20 KiB"):
        fill([stack], load_order([stack], resident_step), -1)


def narrow(cols: int, *tiers: str, source_type: str = "BF16") -> Stack:
    return make_stack("t", dict.fromkeys(tiers, 0.0), (2, cols), source_type=source_type)


@pytest.mark.parametrize(
    ("stack", "tier", "wanted"),
    [
        (narrow(256, *TIERS), "Q3_K", "Q3_K"),
        (narrow(96, "Q4_0", "Q5_0", "Q8_0", SOURCE), "Q2_K", "Q4_0"),
        (narrow(96, "Q4_0", "Q5_0", "Q8_0", SOURCE), "Q3_K", "Q4_0"),
        (narrow(96, "Q4_0", "Q5_0", "Q8_0", SOURCE), "Q4_K", "Q5_0"),
        (narrow(96, "Q4_0", "Q5_0", "Q8_0", SOURCE), "Q6_K", "Q8_0"),
        (narrow(96, "Q4_0", "Q5_0", "Q8_0", SOURCE), SOURCE, SOURCE),
        (narrow(80, "F16", SOURCE), "Q2_K", "F16"),  # no multiple of 32
        (narrow(80, "F16", SOURCE), "Q8_0", "F16"),
        (narrow(80, SOURCE, source_type="F16"), "Q4_K", SOURCE),  # already F16
        (narrow(96, SOURCE, source_type="F32"), "Q4_K", SOURCE),  # never quantized
        (narrow(96, "Q8_0", SOURCE, source_type="F16"), "F16", SOURCE),  # the source is F16
    ],
)
def test_a_tier_of_the_model_is_the_type_llama_quantize_falls_back_to(
    stack: Stack, tier: str, wanted: str
) -> None:
    assert tier_at(stack, tier) == wanted


def test_a_tier_that_was_not_stored_is_an_error_that_lists_the_others() -> None:
    with pytest.raises(UsageError, match="t has no tier Q6_K; choose one it has: Q2_K, Q4_K"):
        tier_at(narrow(256, "Q2_K", "Q4_K"), "Q6_K")
