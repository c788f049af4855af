"""Choose a cut among candidates by measured loss: which layers go, how the ratio is shared out.

Trials are cheap: Wanda's metric and no tuning, on the probe tokens. On the sample models that
finds the combination that is best after tuning as well (docs/pruning.md).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from edgekit.checkpoint import Checkpoint
from edgekit.errors import UnsupportedError
from edgekit.progress import Progress
from edgekit.pruning.cut import Cut, is_allowed, kept, ratio_of, whole
from edgekit.pruning.layers import Ids, Layers
from edgekit.pruning.metrics import METRICS
from edgekit.pruning.search import Probe, best_cut, evolve, removal_order
from edgekit.pruning.stages import Recipe
from edgekit.pruning.walk import Walk

Json = dict[str, Any]

TRIAL = Recipe(METRICS["wanda"], tunes=False)


@dataclass(frozen=True, eq=False)
class Chooser:
    """What choosing needs.

    Attributes:
        checkpoint, dense: The dense model.
        search: Generations of the evolutionary search over layers; 0: greedy removal only.
        seed: Of that search.
    """

    checkpoint: Checkpoint
    dense: Layers
    search: int = 0
    seed: int = 0

    def choose(self, cuts: Sequence[Cut], ids: Ids, progress: Progress) -> tuple[Cut, list[Json]]:
        """The best of ``cuts``, its layers named, and the loss of each that was tried.

        Raises:
            UnsupportedError: llama.cpp's graph cannot do without as many layers as all cuts remove.
        """
        n_most = max(self._n_gone(cut) for cut in cuts)
        if len(cuts) == 1 and n_most == 0:
            return cuts[0], []
        probe = Probe.of(self.checkpoint, self.dense, ids)
        progress.start("choose", n_most)
        order = removal_order(probe, n_most, self._allows, progress.advance)
        named = [
            self._with_layers(cut, probe, order) for cut in cuts if self._n_gone(cut) <= len(order)
        ]
        if not named:
            raise UnsupportedError(
                f"llama.cpp's {self.dense.mapping.arch.model_type} graph needs layers that this "
                "ratio would remove; give --layers 0"
            )
        if len(named) == 1:
            return named[0], []
        best, losses = best_cut(named, lambda cut: self._trial(probe, cut))
        mapping = self.dense.mapping
        return best, [
            {"kept": kept(mapping, cut), "ratio": ratio_of(mapping, cut), "kl": loss}
            for cut, loss in losses.items()
        ]

    def _n_gone(self, cut: Cut) -> int:
        return self.dense.mapping.hyper.n_layers - len(cut.layers)

    def _with_layers(self, cut: Cut, probe: Probe, order: Sequence[int]) -> Cut:
        """The cut with the layers that measured least important gone."""
        removed = tuple(order[: self._n_gone(cut)])
        if self.search and removed:
            removed = evolve(probe, removed, self.search, self.seed, self._allows)
        return self._without(cut, removed)

    def _without(self, cut: Cut, removed: Sequence[int]) -> Cut:
        every = range(self.dense.mapping.hyper.n_layers)
        return replace(cut, layers=tuple(i for i in every if i not in removed))

    def _allows(self, removed: Sequence[int]) -> bool:
        cut = self._without(whole(self.dense.mapping), removed)
        return is_allowed(dict(self.checkpoint.config), self.dense.mapping, cut)

    def _trial(self, probe: Probe, cut: Cut) -> float:
        """The loss per removed share: combinations differ a little in what they remove."""
        final = Walk(self.checkpoint, self.dense, cut, TRIAL).finish([probe.ids])
        return probe.divergence(final.pruned[0]) / ratio_of(self.dense.mapping, cut)
