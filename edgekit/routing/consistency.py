"""How local routing is: SRP and SCH of a trace.

Definitions of "Not All Models Suit Expert Offloading: On Local Routing Consistency of
Mixture-of-Expert Models", arXiv 2505.16056; tests/bench/compare_moe_lrc.py runs the authors' own
code beside these.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgekit.routing.trace import Ids, Trace

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Srp:
    """Segment routing best performance.

    Attributes:
        segment: Tokens of a segment, m.
        model: The best F1 of one threshold over all experts of all layers.
        cache_ratio: Experts that this router keeps, in units of those that a token takes.
        layers: The best F1 with a threshold for each layer.
    """

    segment: int
    model: float
    cache_ratio: float
    layers: tuple[float, ...]


def srp(trace: Trace, segment: int) -> Srp:
    """The best F1 of keeping an expert through a segment when ``f`` of its tokens take it.

    Segments are all windows of ``segment`` tokens inside a sequence.

    Args:
        trace: With at least one sequence as long as a segment, else the values are 0.
        segment: Tokens.
    """
    counts = segment_counts(trace, segment).sum(axis=1)  # [layers, segment + 1]
    layers = tuple(_best_f1(row, segment)[0] for row in counts)
    model, cache_ratio = _best_f1(counts.sum(axis=0), segment)
    return Srp(segment, model, cache_ratio, layers)


def segment_counts(trace: Trace, segment: int) -> Counts:
    """How many segments take an expert ``f`` times, int64 ``[layers, experts, segment + 1]``."""
    n_layers, n_experts = trace.experts.shape[1], trace.n_experts
    counts = np.zeros((n_layers, n_experts, segment + 1), np.int64)
    for ids in trace.sequences():
        if len(ids) < segment:
            continue
        for layer in range(n_layers):
            used = np.zeros((len(ids) + 1, n_experts), np.int32)
            np.put_along_axis(used[1:], ids[:, layer].astype(np.int64), 1, axis=1)
            total = used.cumsum(axis=0)
            times = total[segment:] - total[:-segment]  # [windows, experts]
            for f in range(segment + 1):
                counts[layer, :, f] += (times == f).sum(axis=0)
    return counts


def _best_f1(counts: Counts, segment: int) -> tuple[float, float]:
    """The best F1 over thresholds, and what is kept at it over what is used."""
    f = np.arange(segment + 1)
    matched = (f * counts)[::-1].cumsum()[::-1]
    kept = segment * counts[::-1].cumsum()[::-1]
    used = matched[0]
    scores = 2 * matched / np.maximum(kept + used, 1)
    best = int(scores.argmax())
    return float(scores[best]), float(kept[best] / used) if used else 0.0


def sch(trace: Trace, segment: int, cache: int) -> tuple[float, ...]:
    """Segment cache best hit rate of a cache of ``cache`` experts, for each layer.

    Evicted is whoever is taken least by the tokens up to ``segment`` ahead, the one used longest
    ago among those. As in the paper's code, experts that fill a cache that is not full count as
    hits; sequences begin with an empty cache, and the mean is over sequences.
    """
    n_layers = trace.experts.shape[1]
    sequences = list(trace.sequences())
    return tuple(
        float(
            np.mean([_sch_of(ids[:, layer], trace.n_experts, segment, cache) for ids in sequences])
        )
        for layer in range(n_layers)
    )


def _sch_of(ids: Ids, n_experts: int, segment: int, cache: int) -> float:
    tokens = ids.tolist()
    ahead = [0] * n_experts  # uses by the tokens in the window
    stamp, clock = [0] * n_experts, 0
    held: set[int] = set()
    hits, n_seen, seen = 0, 0, [False] * n_experts
    for token in tokens[:segment]:
        for expert in token:
            ahead[expert] += 1
    for i, token in enumerate(tokens):
        before = frozenset(held)
        for expert in token:
            hits += expert in before or (not seen[expert] and n_seen < cache)
            n_seen += not seen[expert]
            seen[expert] = True
            if expert not in held:
                if len(held) == cache:
                    held.remove(min(held, key=lambda e: (ahead[e], stamp[e])))
                held.add(expert)
            clock += 1
            ahead[expert], stamp[expert] = ahead[expert] - 1, clock
        if i + segment < len(tokens):
            for expert in tokens[i + segment]:
                ahead[expert] += 1
    return hits / ids.size
