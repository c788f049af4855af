"""Which layers go, and how the ratio is shared out: both by measured loss.

A layer's importance is its effect on the output: the KL divergence from the dense model's
predictions on probe tokens once the layer is gone. It is measured again after each removal, because
removing two unimportant layers may be worse than removing others (EvoPress, arXiv 2410.14649).
Where there are many layers, only those whose input and output lie closest in angle (ShortGPT's
block influence, arXiv 2403.03853) are measured.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

import numpy as np
import torch

from edgekit.checkpoint import Checkpoint
from edgekit.evaluate import kl_divergence
from edgekit.pruning.cut import Cut
from edgekit.pruning.layers import Ids, Layers
from edgekit.pruning.weights import read_layer

Tensor = Any

SHORTLIST = 6  # layers measured per removal, of those closest in angle
OFFSPRING = 4  # of each generation of the search
MAX_TRIALS = 8  # combinations of layers, groups, neurons and experts that are tried


@dataclass(frozen=True, eq=False)
class Probe:
    """Tokens whose predictions are compared, and what the dense model says about them.

    Attributes:
        checkpoint, layers: The dense model.
        ids: ``[B, T]``; positions of the second half are compared.
        logits: Of the dense model there, float32 ``[n, vocab]``.
        inputs: Input of every layer, ``[B, T, hidden]``; the last is the final stream.
    """

    checkpoint: Checkpoint
    layers: Layers
    ids: Ids
    logits: Tensor
    inputs: tuple[Tensor, ...]

    @classmethod
    def of(cls, checkpoint: Checkpoint, layers: Layers, ids: Ids) -> "Probe":
        """Run the dense model."""
        inputs = [layers.start(checkpoint, ids)]
        for index in range(layers.mapping.hyper.n_layers):
            weights = read_layer(layers.mapping, index)
            inputs.append(layers.run(index, weights, inputs[-1]).out)
        logits = layers.logits(checkpoint, second_half(inputs[-1]))
        return cls(checkpoint, layers, ids, logits, tuple(inputs))

    def divergence(self, hidden: Tensor) -> float:
        """Mean KL from the dense model of a final stream ``[B, T, hidden]``, nats."""
        logits = self.layers.logits(self.checkpoint, second_half(hidden))
        return float(kl_divergence(self.logits.numpy(), logits.numpy()).mean())

    def without(self, removed: Sequence[int]) -> float:
        """The loss after ``removed`` layers are skipped, nothing tuned."""
        first = min(removed)
        hidden = self.inputs[first]
        for index in range(first, self.layers.mapping.hyper.n_layers):
            if index not in removed:
                weights = read_layer(self.layers.mapping, index)
                hidden = self.layers.run(index, weights, hidden).out
        return self.divergence(hidden)

    def angles(self, removed: Sequence[int]) -> dict[int, float]:
        """Mean angle between input and output of each layer that is left, in half turns."""
        hidden, found = self.inputs[0], {}
        for index in range(self.layers.mapping.hyper.n_layers):
            if index not in removed:
                weights = read_layer(self.layers.mapping, index)
                out = self.layers.run(index, weights, hidden).out
                cosine = torch.cosine_similarity(hidden, out, -1).clamp(-1, 1)
                found[index] = float(cosine.arccos().mean() / np.pi)
                hidden = out
        return found

    def perplexity(self, hidden: Tensor) -> float:
        """Perplexity of a final stream on the second half of each sequence."""
        first = hidden.shape[1] // 2
        logits = self.layers.logits(self.checkpoint, second_half(hidden))
        logits = logits.view(len(self.ids), -1, logits.shape[-1])[:, :-1].flatten(0, 1)
        targets = torch.from_numpy(self.ids[:, first + 1 :].flatten())
        return float(torch.nn.functional.cross_entropy(logits, targets).exp())


def second_half(hidden: Tensor) -> Tensor:
    """Rows ``[n, hidden]`` of the positions that have half a context to look at."""
    return hidden[:, hidden.shape[1] // 2 :].reshape(-1, hidden.shape[-1])


def removal_order(
    probe: Probe,
    n_most: int,
    allows: Callable[[tuple[int, ...]], bool] = lambda removed: True,
    advance: Callable[[int], None] = lambda n: None,
) -> list[int]:
    """Layers in the order in which they go, importance measured again after each.

    Args:
        probe: Of the dense model.
        n_most: Layers that may go at most.
        allows: Whether llama.cpp's graph can do without a set of layers.
        advance: Told each removal.
    """
    order: list[int] = []
    while len(order) < n_most:
        angles = probe.angles(order)
        left = [i for i in sorted(angles, key=angles.__getitem__) if allows((*order, i))]
        losses = {i: probe.without([*order, i]) for i in left[:SHORTLIST]}
        if not losses:
            break
        order.append(min(losses, key=losses.__getitem__))
        advance(1)
    return order


def evolve(
    probe: Probe,
    removed: Sequence[int],
    generations: int,
    seed: int,
    allows: Callable[[tuple[int, ...]], bool] = lambda removed: True,
) -> tuple[int, ...]:
    """A better set of as many layers, by swapping one at a time (EvoPress's level switch)."""
    best = tuple(sorted(removed))
    n_layers = probe.layers.mapping.hyper.n_layers
    if not 0 < len(best) < n_layers:
        return best
    losses, chance = {best: probe.without(best)}, random.Random(seed)
    for _ in range(generations):
        for _ in range(OFFSPRING):
            gone = chance.choice(best)
            back = chance.choice([i for i in range(n_layers) if i not in best])
            child = tuple(sorted({*best, back} - {gone}))
            if child not in losses and allows(child):
                losses[child] = probe.without(child)
        best = min(losses, key=losses.__getitem__)
    return best


def best_cut(cuts: Sequence[Cut], loss: Callable[[Cut], float]) -> tuple[Cut, dict[Cut, float]]:
    """Climb from combination to neighbouring combination while the measured loss falls.

    Args:
        cuts: All of about the same number of parameters.
        loss: Measures one; called at most `MAX_TRIALS` times.

    Returns:
        The best, and the loss of all that were measured.
    """
    here = max(cuts, key=lambda cut: (cut.kv_heads, len(cut.layers), cut.experts))
    losses = {here: loss(here)}
    while len(losses) < min(MAX_TRIALS, len(cuts)):
        fresh = sorted((c for c in cuts if c not in losses), key=lambda c: _distance(c, here))
        for cut in fresh[: min(2, MAX_TRIALS - len(losses))]:
            losses[cut] = loss(cut)
        best = min(losses, key=losses.__getitem__)
        if best == here:
            break
        here = best
    return min(losses, key=losses.__getitem__), losses


def _distance(one: Cut, two: Cut) -> float:
    """How differently two cuts share the ratio out; widths as shares of the larger."""
    pairs = zip(_counts(one), _counts(two), strict=True)
    return sum(abs(a - b) / max(a, b, 1) for a, b in pairs)


def _counts(cut: Cut) -> tuple[int, ...]:
    return (len(cut.layers), *astuple(replace(cut, layers=()))[1:])
