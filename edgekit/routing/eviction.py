"""Who leaves the pool of resident experts: the expert that is least likely to be needed soon.

Layers take their turns in a fixed order, token after token, so plain "least recently used" over
all layers would evict just what the next layers are about to ask for. What counts here is how stale
an expert will be when its layer's turn comes, in whole tokens; among equals the one that weighed
least in its token, then the one whose turn is farthest away.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

RANKS = 64  # places among the experts of a token that are told apart


def rank(place: int) -> int:
    """How much the expert at ``place`` counts, the heaviest being at 0."""
    return max(0, RANKS - 1 - place)


@dataclass(frozen=True, eq=False)
class Uses:
    """What is resident and when it was used.

    Attributes:
        resident: bool ``[layers, experts]``.
        last: uint32 of the same shape: the pass (a token, or a batch of the prompt) that took it
            last, times `RANKS`, plus `rank` of its place among the experts of that pass.
    """

    resident: npt.NDArray[np.bool_]
    last: npt.NDArray[np.uint32]

    @classmethod
    def empty(cls, n_layers: int, n_experts: int) -> "Uses":
        """Nothing is resident."""
        shape = n_layers, n_experts
        return cls(np.zeros(shape, bool), np.zeros(shape, np.uint32))


def victims(
    uses: Uses, layer: int, stays: npt.NDArray[np.bool_], n: int
) -> Iterator[tuple[int, int]]:
    """The ``n`` experts to evict first while ``layer`` is computed, as (layer, expert).

    Args:
        uses: Not changed.
        layer: Whose experts are needed at the moment.
        stays: bool ``[layers, experts]``: who may not go.
        n: How many; fewer are given where fewer may go.
    """
    n_layers, n_experts = uses.resident.shape
    until_turn = (np.arange(n_layers) - layer - 1) % n_layers  # 0: the next layer
    is_over = np.arange(n_layers) <= layer  # this token is done with them: a token older next time
    freshness = uses.last.astype(np.int64) - RANKS * is_over[:, None]
    worth = freshness * n_layers - until_turn[:, None]
    flat = np.flatnonzero(uses.resident & ~stays)
    if n < len(flat):
        flat = flat[np.argpartition(worth.ravel()[flat], n - 1)[:n]]
    for place in flat[np.argsort(worth.ravel()[flat], kind="stable")]:
        yield int(place) // n_experts, int(place) % n_experts
