"""What a trace tells a loader: the ``experts`` field of a manifest.

Everything is measured on the trace; a verdict may be that caching brings nothing.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.routing.consistency import sch, srp
from edgekit.routing.replay import POLICIES, hit_rates
from edgekit.routing.trace import Json, Trace

SEGMENTS = (4, 16, 64)  # tokens; 16 is what the paper compares models by
RHOS = (1, 2, 3)  # caches in units of the experts that a token takes
CACHES = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)  # the same, of the hit curves
REPLAYED_TOKENS = 4096  # of a longer trace, for curves and SCH
SUCCESSORS = 8  # kept of each expert's transitions
LEAST_GAIN = 0.05  # hit rate above that of random routing; below, a cache does not pay
POLICY = "pool"  # what the loader does


def summarize(trace: Trace) -> Json:
    """Histograms, transitions, hit curves, SRP, SCH, a recommended cache and a verdict."""
    short = trace.spread(REPLAYED_TOKENS)
    capacities = _capacities(trace)
    rates = {policy: hit_rates(short, policy, capacities) for policy in POLICIES}
    recommended, gain = _recommended(capacities, rates[POLICY].mean(axis=1), trace.n_experts)
    hit_rate = float(rates[POLICY].mean(axis=1)[capacities.index(recommended)])
    return {
        "n_experts": trace.n_experts,
        "n_used": trace.n_used,
        "layers": list(trace.layers),
        "trace": trace.provenance | {"n_tokens": trace.n_tokens, "n_sequences": len(trace.starts)},
        "histogram": _histogram(trace).tolist(),
        "top_share": _top_share(trace),
        "next_token": _successors(token_transitions(trace)),
        "next_layer": _successors(layer_transitions(trace)),
        "hit_curves": [_curve(policy, capacities, rate) for policy, rate in rates.items()],
        "srp": [_srp(trace, segment) for segment in SEGMENTS],
        "sch": [row for segment in SEGMENTS for row in _sch(short, segment)],
        "recommended": {
            "experts_per_layer": recommended,
            "hit_rate": round(hit_rate, 4),
            "gain_over_random": round(gain, 4),
        },
        "verdict": _verdict(trace, recommended, hit_rate, gain),
    }


def token_transitions(trace: Trace) -> npt.NDArray[np.int64]:
    """How often an expert is taken one token after another one, ``[layers, from, to]``."""
    n_layers, n = trace.experts.shape[1], trace.n_experts
    counts = np.zeros((n_layers, n, n), np.int64)
    for ids in trace.sequences():
        for layer in range(n_layers):
            here = ids[:, layer].astype(np.int64)
            np.add.at(counts[layer], (here[:-1, :, None], here[1:, None, :]), 1)
    return counts


def layer_transitions(trace: Trace) -> npt.NDArray[np.int64]:
    """How often an expert is taken one layer after another one, ``[layers - 1, from, to]``."""
    n_layers, n = trace.experts.shape[1], trace.n_experts
    counts = np.zeros((max(0, n_layers - 1), n, n), np.int64)
    ids = trace.experts.astype(np.int64)
    for layer in range(n_layers - 1):
        np.add.at(counts[layer], (ids[:, layer, :, None], ids[:, layer + 1, None, :]), 1)
    return counts


def _histogram(trace: Trace) -> npt.NDArray[np.int64]:
    """Tokens per expert, ``[layers, experts]``."""
    rows = trace.experts.reshape(trace.n_tokens, -1, trace.n_used).transpose(1, 0, 2)
    return np.stack([np.bincount(row.ravel(), minlength=trace.n_experts) for row in rows])


def _top_share(trace: Trace) -> float:
    """Share of all uses that goes to the tenth of the experts used most, mean over layers."""
    counts = np.sort(_histogram(trace), axis=1)[:, ::-1]
    n = max(1, round(trace.n_experts / 10))
    return round(float((counts[:, :n].sum(axis=1) / counts.sum(axis=1)).mean()), 4)


def _successors(counts: npt.NDArray[np.int64]) -> list[list[list[list[int]]]]:
    """For each layer and expert the likeliest successors, ``[[expert, count], ...]``."""
    rows = []
    for layer in counts:
        best = np.argsort(-layer, axis=1, kind="stable")[:, :SUCCESSORS]
        rows.append(
            [
                [[int(e), int(row[e])] for e in to if row[e]]
                for row, to in zip(layer, best, strict=True)
            ]
        )
    return rows


def _capacities(trace: Trace) -> list[int]:
    sizes = {min(trace.n_experts, round(c * trace.n_used)) for c in CACHES}
    return sorted(sizes | {trace.n_experts})


def _curve(policy: str, capacities: Sequence[int], rates: npt.NDArray[Any]) -> Json:
    return {
        "policy": policy,
        "experts_per_layer": list(capacities),
        "hit_rate": [round(float(rate), 4) for rate in rates.mean(axis=1)],
    }


def _srp(trace: Trace, segment: int) -> Json:
    value = srp(trace, segment)
    return {
        "segment": segment,
        "model": round(value.model, 4),
        "cache_ratio": round(value.cache_ratio, 3),
        "layers": [round(layer, 4) for layer in value.layers],
    }


def _sch(trace: Trace, segment: int) -> list[Json]:
    rows = []
    for rho in RHOS:
        size = min(rho * trace.n_used, trace.n_experts)
        layers = sch(trace, segment, size)
        rows.append(
            {
                "segment": segment,
                "rho": rho,
                "model": round(float(np.mean(layers)), 4),
                "layers": [round(layer, 4) for layer in layers],
            }
        )
    return rows


def _recommended(
    capacities: Sequence[int], rates: npt.NDArray[Any], n_experts: int
) -> tuple[int, float]:
    """The cache whose hit rate is farthest above its share of the experts, and by how much.

    Routers that choose at random give every cache the hit rate of its share.
    """
    gains = [float(rate) - c / n_experts for c, rate in zip(capacities, rates, strict=True)]
    inner = [i for i, c in enumerate(capacities) if c < n_experts] or [0]
    best = max(inner, key=lambda i: gains[i])
    return capacities[best], gains[best]


def _verdict(trace: Trace, cache: int, hit_rate: float, gain: float) -> str:
    told = (
        f"a cache of {cache} of {trace.n_experts} experts per layer has {hit_rate:.0%} of what "
        f"tokens ask for, {cache / trace.n_experts:.0%} if routers chose at random"
    )
    if cache >= trace.n_experts or gain < LEAST_GAIN:
        return f"no benefit: {told}"
    return f"benefit: {told}"
