"""Mixed tiers for tensors of experts, by integer program.

All experts of a layer's tensor share one stored type, so what can be mixed are tensors: each takes
one tier, their bytes stay within a budget, and the sum of costs is least. That is PMQ's program of
MC (Huang et al., arXiv 2410.06270, section 3.2) over tensors instead of experts, without its
constraints on how many experts have how many bits. Solved exactly by HiGHS through SciPy.

The planner's greedy order needs no solver on the device; bench_expert_mix.py measures it against
this.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from edgekit.errors import DoesNotFitError, EdgekitError
from edgekit.planner import resident_bytes
from edgekit.stack import Stack

Costs = Mapping[tuple[str, str], float]  # (tensor, tier) -> what is lost at that tier


def mixed_tiers(stacks: Sequence[Stack], weights_bytes: int, costs: Costs) -> dict[str, str]:
    """The tiers with the least sum of costs within ``weights_bytes`` in memory.

    Args:
        stacks: Tensors to choose for.
        weights_bytes: For all of them.
        costs: Of every tier that may be chosen; others are not.

    Raises:
        DoesNotFitError: The lowest tiers take more.
        EdgekitError: The solver gives up.
    """
    choices = [(s.name, tier, resident_bytes(s, tier)) for s in stacks for tier in s.tiers]
    choices = [choice for choice in choices if choice[:2] in costs]
    rows = {stack.name: i for i, stack in enumerate(stacks)}
    one_each = np.zeros((len(rows), len(choices)))
    for column, (name, _, _) in enumerate(choices):
        one_each[rows[name], column] = 1
    sizes = np.array([n for _, _, n in choices], float)
    found = milp(
        np.array([costs[name, tier] for name, tier, _ in choices]),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(sizes[None] / weights_bytes, -np.inf, 1),
        ],
        bounds=Bounds(0, 1),
        integrality=np.ones(len(choices)),
        options={"mip_rel_gap": 1e-9},
    )
    if found.status == 2:
        raise DoesNotFitError(
            f"the lowest tiers of {len(rows)} tensors exceed {weights_bytes} bytes"
        )
    if found.x is None:
        raise EdgekitError(f"the integer program was not solved: {found.message}")
    return {
        name: tier for (name, tier, _), taken in zip(choices, found.x, strict=True) if taken > 0.5
    }


def measured_costs(stacks: Sequence[Stack]) -> dict[tuple[str, str], float]:
    """The losses that the conversion measured: second-order KL divergence of each tensor."""
    return {(level.tensor, level.tier): level.loss for s in stacks for level in s.levels}
