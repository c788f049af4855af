"""Tiers mixed by integer program are the best there are."""

from itertools import product

import numpy as np
import pytest
from bench.expert_mix import measured_costs, mixed_tiers

from edgekit.errors import DoesNotFitError
from edgekit.planner import fill, load_order, resident_bytes, resident_step
from edgekit.stack import Level, Part, Stack

TIERS = ("Q2_K", "Q3_K", "Q4_K", "Q6_K")


def random_stacks(n: int, seed: int) -> list[Stack]:
    random = np.random.default_rng(seed)
    stacks = []
    for i in range(n):
        rows = int(random.integers(1, 9))
        losses = np.sort(random.random(len(TIERS)))[::-1]
        parents = (None, *TIERS)
        levels = tuple(
            Level(f"t{i}", tier, parent, "nested", (Part(0, 1, ""),), float(loss))
            for tier, parent, loss in zip(TIERS, parents, losses, strict=False)
        )
        stacks.append(Stack(f"t{i}", (rows, 256), "BF16", levels))
    return stacks


@pytest.mark.parametrize("seed", range(6))
def test_no_other_choice_of_tiers_is_better(seed):
    stacks = random_stacks(5, seed)
    costs = measured_costs(stacks)
    least = sum(resident_bytes(s, TIERS[0]) for s in stacks)
    most = sum(resident_bytes(s, TIERS[-1]) for s in stacks)
    for share in (0.0, 0.3, 0.7, 1.0):
        budget = round(least + share * (most - least))
        best = min(
            sum(costs[s.name, tier] for s, tier in zip(stacks, tiers, strict=True))
            for tiers in product(TIERS, repeat=len(stacks))
            if sum(map(resident_bytes, stacks, tiers)) <= budget
        )
        found = mixed_tiers(stacks, budget, costs)
        assert sum(resident_bytes(s, found[s.name]) for s in stacks) <= budget
        assert sum(costs[s.name, found[s.name]] for s in stacks) == pytest.approx(best)
        greedy = fill(stacks, load_order(stacks, resident_step), budget)
        assert sum(costs[s.name, greedy.tier(s.name)] for s in stacks) >= best - 1e-12


def test_what_does_not_fit_is_told():
    stacks = random_stacks(3, 0)
    with pytest.raises(DoesNotFitError):
        mixed_tiers(stacks, 10, measured_costs(stacks))
