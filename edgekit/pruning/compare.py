"""Every metric and every stage at equal parameters: the table behind ``prune --report``."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgekit.arch import map_checkpoint
from edgekit.checkpoint import Checkpoint
from edgekit.errors import UnsupportedError
from edgekit.progress import Progress, Silent
from edgekit.pruning.choose import Chooser
from edgekit.pruning.cut import Cut, candidates, kept, n_parameters, ratio_of, whole
from edgekit.pruning.layers import Ids, Layers
from edgekit.pruning.metrics import METRICS
from edgekit.pruning.search import Probe
from edgekit.pruning.stages import Recipe
from edgekit.pruning.taylor import Effects, effects
from edgekit.pruning.texts import batches, tokens
from edgekit.pruning.walk import Walk

Json = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One way to prune.

    Attributes:
        metric: Key of `METRICS`.
        tunes: With mask tuning.
        shifts: With FLAP's bias instead.
        shares: ``chosen`` by measured loss, ``layers`` only, or ``widths`` only.
    """

    metric: str
    tunes: bool = True
    shifts: bool = False
    shares: str = "chosen"


ROWS: Mapping[str, Row] = {
    "hybrid, condition, tuned (ours)": Row("condition"),
    "hybrid, condition": Row("condition", tunes=False),
    "hybrid, leverage, tuned": Row("leverage"),
    "hybrid, magnitude": Row("magnitude", tunes=False),
    "hybrid, Wanda-sp": Row("wanda", tunes=False),
    "hybrid, Wanda-sp, tuned": Row("wanda"),
    "hybrid, FLAP": Row("flap", tunes=False),
    "hybrid, FLAP with its bias": Row("flap", tunes=False, shifts=True),
    "hybrid, Taylor": Row("taylor", tunes=False),
    "layers only": Row("condition", tunes=False, shares="layers"),
    "layers only, tuned": Row("condition", shares="layers"),
    "widths only, condition": Row("condition", tunes=False, shares="widths"),
    "widths only, condition, tuned": Row("condition", shares="widths"),
    "widths only, Wanda-sp": Row("wanda", tunes=False, shares="widths"),
}


class Comparison:
    """Prunes one checkpoint in many ways, keeping only the figures."""

    def __init__(
        self,
        folder: Path,
        *,
        text: Path | None = None,
        n_tokens: int = 1 << 13,
        multiple: int = 256,
        progress: Progress | None = None,
    ) -> None:
        """Run the dense model once; arguments as in `edgekit.pruning.prune.Options`."""
        self.checkpoint = Checkpoint.open(folder)
        self.mapping = map_checkpoint(self.checkpoint)
        self.multiple, self.progress = multiple, progress or Silent()
        self.dense = Layers(self.mapping, self.checkpoint.config)
        self.fit, self.probe, held = tokens(self.checkpoint, self.mapping, text, n_tokens)
        self.measured = Probe.of(self.checkpoint, self.dense, held)
        self._effects: list[Effects] = []
        self._known: dict[tuple[Row, Cut], Json] = {}

    def rows(self, ratio: float) -> list[Json]:
        """Figures of every way at about ``ratio``; ways that cannot come near it are left out."""
        cuts = {shares: self._cut(ratio, shares) for shares in ("chosen", "layers", "widths")}
        found = []
        self.progress.start(f"at {ratio:.0%}", len(ROWS))
        for name, row in ROWS.items():
            cut = cuts[row.shares]
            if cut is not None:
                found.append({"name": name, "ratio_asked": ratio, **self._figures(row, cut)})
            self.progress.advance(1)
        return found

    def _cut(self, ratio: float, shares: str) -> Cut | None:
        try:
            cuts = self._cuts(ratio, shares)
            chooser = Chooser(self.checkpoint, self.dense)
            return chooser.choose(cuts, self.probe, Silent())[0] if cuts else None
        except UnsupportedError:
            return None

    def _cuts(self, ratio: float, shares: str) -> list[Cut]:
        """What `_cut` chooses from; of layers only, the nearest however far it is."""
        if shares != "layers":
            n_removed = 0 if shares == "widths" else None
            return candidates(self.mapping, ratio, self.multiple, n_removed)
        full = whole(self.mapping)
        fewer = [replace(full, layers=full.layers[:n]) for n in range(1, len(full.layers))]
        return sorted(fewer, key=lambda cut: abs(ratio_of(self.mapping, cut) - ratio))[:1]

    def _figures(self, row: Row, cut: Cut) -> Json:
        """Of one way; where shares chosen and shares given come to one cut, it is run once."""
        key = replace(row, shares=""), cut
        if key not in self._known:
            self._known[key] = self._run(row, cut)
        return self._known[key]

    def _run(self, row: Row, cut: Cut) -> Json:
        started = time.monotonic()
        metric = METRICS[row.metric]
        seen = self._of_taylor() if metric.needs_effect else []
        walk = Walk(self.checkpoint, self.dense, cut, Recipe(metric, row.tunes, row.shifts), seen)
        hidden = walk.finish(batches(self.fit, self.mapping), [self.measured.ids]).others[0]
        return {
            "kept": kept(self.mapping, cut),
            "removed_layers": sorted({*whole(self.mapping).layers} - {*cut.layers}),
            "ratio": ratio_of(self.mapping, cut),
            "n_parameters": n_parameters(self.mapping, cut),
            "kl_mean": self.measured.divergence(hidden),
            "ppl": self.measured.perplexity(hidden),
            "seconds": round(time.monotonic() - started, 1),
        }

    def _of_taylor(self) -> list[Effects]:
        if not self._effects:
            parts: list[Ids] = batches(self.fit, self.mapping)
            self._effects = effects(self.checkpoint, self.dense, parts)
        return self._effects
