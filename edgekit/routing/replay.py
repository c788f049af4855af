"""Replay a trace against a cache of experts: any policy, any size.

``lru``, ``lfu`` and ``belady`` are caches of every layer for itself. ``pool`` is what the loader
does: one pool of slots for all layers (`edgekit.routing.eviction`). Experts of the token at hand
are never evicted; a cache begins empty and lives on from one sequence to the next.
"""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from edgekit.errors import UnknownNameError, UsageError
from edgekit.routing.eviction import RANKS, Uses, rank, victims
from edgekit.routing.trace import Ids, Trace

Scores = npt.NDArray[np.float64]
Score = Callable[[Ids, int], npt.NDArray[np.float64]]
LAYER_POLICIES = ("lru", "lfu", "belady")
POLICIES = (*LAYER_POLICIES, "pool")


def hit_rates(trace: Trace, policy: str, capacities: Sequence[int]) -> npt.NDArray[np.float64]:
    """Hit rates ``[capacities, layers]`` of caches of so many experts for each layer.

    Raises:
        UnknownNameError: No such policy.
        UsageError: A capacity does not hold the experts of one token.
    """
    if policy not in POLICIES:
        raise UnknownNameError("policy", policy, POLICIES)
    if min(capacities) < trace.n_used:
        raise UsageError(
            f"a cache of {min(capacities)} does not hold the {trace.n_used} experts of a token"
        )
    if policy == "pool":
        hits = np.stack([_pool_hits(trace, capacity) for capacity in capacities])
    else:
        hits = _layer_hits(trace, policy, np.asarray(capacities))
    return hits / (trace.n_tokens * trace.n_used)


def _layer_hits(
    trace: Trace, policy: str, capacities: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    n_layers, n_experts = trace.experts.shape[1], trace.n_experts
    at = np.arange(n_layers)[:, None]
    held = np.zeros((len(capacities), n_layers, n_experts), bool)
    hits = np.zeros((len(capacities), n_layers), np.int64)
    scores = _Scores(policy, trace)
    # the smallest that stays, counted from the end of a sorted row
    place = n_experts - np.minimum(capacities, n_experts)[:, None, None]
    for t, ids in enumerate(trace.experts.astype(np.int64)):
        hits += held[:, at, ids].sum(axis=2)
        held[:, at, ids] = True
        score = scores.after(t, ids).copy()
        score[at, ids] = np.inf
        row = np.where(held, score, -np.inf)
        least = np.take_along_axis(np.sort(row, axis=2), place, axis=2)
        held &= row >= least
    return hits


class _Scores:
    """How much each expert is worth keeping, float64 ``[layers, experts]``, after each token."""

    def __init__(self, policy: str, trace: Trace) -> None:
        self._policy, self._trace = policy, trace
        self._at = np.arange(trace.experts.shape[1])[:, None]
        self._order = np.arange(trace.n_used, 0, -1) / (trace.n_used + 1)  # ties: the heavier stays
        self._scores = np.zeros((trace.experts.shape[1], trace.n_experts))
        self._next = _next_uses(trace) if policy == "belady" else None

    def after(self, t: int, ids: npt.NDArray[np.int64]) -> Scores:
        """No two are equal, or a cache would keep more than it holds."""
        recent = (t + self._order) / (self._trace.n_tokens + 2)  # in (0, 1), grows
        if self._policy == "lru":
            self._scores[self._at, ids] = recent
        elif self._policy == "lfu":  # the one used longest ago goes among equals
            self._scores[self._at, ids] = np.floor(self._scores[self._at, ids]) + 1 + recent
        else:
            assert self._next is not None
            self._scores[self._at, ids] = -self._next[t] + recent
        return self._scores


def _next_uses(trace: Trace) -> npt.NDArray[np.int64]:
    """The token that takes each chosen expert next, ``[tokens, layers, used]``."""
    far = 2 * trace.n_tokens
    upcoming = np.full((trace.experts.shape[1], trace.n_experts), far, np.int64)
    at = np.arange(trace.experts.shape[1])[:, None]
    found = np.empty(trace.experts.shape, np.int64)
    for t in range(trace.n_tokens - 1, -1, -1):
        ids = trace.experts[t].astype(np.int64)
        found[t] = upcoming[at, ids]
        upcoming[at, ids] = t
    return found


def _pool_hits(trace: Trace, capacity: int) -> npt.NDArray[np.int64]:
    """Hits of each layer with ``capacity`` times the number of layers slots for all of them."""
    n_layers = trace.experts.shape[1]
    uses = Uses.empty(n_layers, trace.n_experts)
    ranks = np.array([rank(place) for place in range(trace.n_used)])
    slots, n_held = capacity * n_layers, 0
    hits = np.zeros(n_layers, np.int64)
    stays = np.zeros_like(uses.resident)
    for t, token in enumerate(trace.experts.astype(np.int64)):
        for layer, ids in enumerate(token):
            held = uses.resident[layer, ids]
            hits[layer] += held.sum()
            n_held += int((~held).sum())
            uses.resident[layer, ids] = True
            uses.last[layer, ids] = RANKS * (t + 1) + ranks
            if n_held > slots:
                stays[layer, ids] = True
                for row, expert in victims(uses, layer, stays, n_held - slots):
                    uses.resident[row, expert] = False
                stays[layer, ids] = False
                n_held = slots
    return hits
