"""Which features of a linear map stay: a table of metrics, ours and the baselines.

A feature is a neuron of a feed-forward block (rows of gate and up, a column of down) or one output
of a head (a column of the output projection); heads are judged as whole query groups. A baseline
scores features, sums over a group, and keeps the highest.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from edgekit.errors import UnknownNameError
from edgekit.pruning.solve import leverage, select

Tensor = Any


@dataclass(frozen=True, eq=False)
class Site:
    """A linear map ``y = W x`` whose features can go, with what calibration saw of them.

    Attributes:
        weight: W, ``[rows, n]``.
        gram: Makes ``E[x x^T]`` over all tokens, float64 ``[n, n]``: half a GiB of 8192 features,
            so nobody keeps it. Of experts ``x`` is weighed by the router, and zero for tokens
            routed elsewhere.
        mean: ``E[x]``, float64 ``[n]``.
        makers: Squared norm of the rows that make each feature (gate and up, or V), ``[n]``.
        effect: First-order effect of each feature on the loss, ``[n]``, for Taylor; else None.
    """

    weight: Tensor
    gram: Callable[[], Tensor]
    mean: Tensor
    makers: Tensor
    effect: Tensor | None = None


@dataclass(frozen=True)
class Metric:
    """A way to choose.

    Attributes:
        scores: Importance of every feature, ``[n]``.
        keep: Chooses blocks itself instead of by ``scores``: (site, n kept, block).
        whole: Importance of a map that goes as a whole (an expert) instead of the sum of scores.
        needs_effect: `Site.effect` is needed: a backward pass over activations.
    """

    scores: Callable[[Site], Tensor]
    keep: Callable[[Site, int, int], Tensor] | None = None
    whole: Callable[[Site], Tensor] | None = None
    needs_effect: bool = False

    def kept(self, site: Site, n_kept: int, block: int = 1) -> Tensor:
        """Indices of the ``n_kept`` blocks of consecutive features that stay, ascending."""
        if self.keep is not None:
            return self.keep(site, n_kept, block)
        return highest(self.scores(site).view(-1, block).sum(1), n_kept)

    def total(self, site: Site) -> float:
        """Importance of the map as a whole."""
        return float(self.scores(site).sum() if self.whole is None else self.whole(site))


def highest(scores: Tensor, n: int) -> Tensor:
    """Indices of the ``n`` highest scores, ascending; of equal ones the first."""
    return scores.argsort(descending=True, stable=True)[:n].sort().values


def _energy(site: Site) -> Tensor:
    """Mean square of the map's output: what vanishes with it."""
    weight = site.weight.double()
    return ((weight @ site.gram()) * weight).sum()


def _columns(site: Site) -> Tensor:
    return site.weight.double().square().sum(0)


def _magnitude(site: Site) -> Tensor:
    """Norm of all weights of the feature (LLM-Pruner's L2, arXiv 2305.11627)."""
    return (_columns(site) + site.makers.double()).sqrt()


def _wanda(site: Site) -> Tensor:
    """Wanda-sp: mean of ``|W| * |x|`` (Wanda, arXiv 2306.11695; structured in FLAP's code)."""
    return site.weight.double().abs().mean(0) * site.gram().diagonal().sqrt()


def _flap(site: Site) -> Tensor:
    """WIFV: variance of the feature times its squared column (FLAP, arXiv 2312.11983).

    FLAP standardizes scores per layer to share widths out between layers; widths here are uniform.
    """
    return (site.gram().diagonal() - site.mean.square()) * _columns(site)


def _taylor(site: Site) -> Tensor:
    """``|sum of w * dL/dw|`` of the feature's column, equal to ``|sum of x * dL/dx|`` over tokens.

    LLM-Pruner's first-order importance of a group; the loss is that of the calibration text.
    """
    assert site.effect is not None
    return site.effect.double().abs()


METRICS: Mapping[str, Metric] = {
    "condition": Metric(
        _columns, lambda site, n, block: select(site.weight, site.gram(), n, block), _energy
    ),
    "leverage": Metric(lambda site: leverage(site.gram()), whole=_energy),
    "magnitude": Metric(_magnitude),
    "wanda": Metric(_wanda),
    "flap": Metric(_flap),
    "taylor": Metric(_taylor, needs_effect=True),
}


def get_metric(name: str) -> Metric:
    """Look a metric up.

    Raises:
        UnknownNameError: No such metric.
    """
    try:
        return METRICS[name]
    except KeyError:
        raise UnknownNameError("metric", name, METRICS) from None
