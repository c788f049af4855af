"""Measure what budgets buy: KL divergence and perplexity at a dozen sizes."""

from collections.abc import Iterator
from dataclasses import asdict

from edgekit.artifact import Artifact
from edgekit.assembly import Assembly
from edgekit.evaluate import Reference, evaluate
from edgekit.manifest import Json
from edgekit.planner import Depths, fill, uniform
from edgekit.progress import Progress
from edgekit.samples import HELDOUT_TEXT

N_SIZES = 12
N_TOKENS = 4096  # a dozen passes over them take minutes for a model of 1 B weights on two cores


def measure(artifact: Artifact, progress: Progress) -> tuple[Json, ...]:
    """Quality on text that was not calibrated on, one row per size, fewest bytes first.

    The reference is the highest depth of every tensor: the original values when ``source`` is among
    the tiers.
    """
    sizes = list(dict.fromkeys(depths.weights_bytes for depths in _sizes(artifact)))
    progress.start("measure", len(sizes) + 1)
    text = HELDOUT_TEXT.read_text(encoding="utf-8")
    top = uniform(artifact.stacks, lambda stack: stack.tiers[-1])
    rows = []
    with Reference.open(Assembly(artifact, top), text, n_tokens=N_TOKENS) as reference:
        progress.advance(1)
        for depths in _sizes(artifact):
            quality = evaluate(Assembly(artifact, depths), reference)
            rows.append(_row(artifact, depths, asdict(quality)))
            progress.advance(1)
    return tuple(rows)


def _sizes(artifact: Artifact) -> Iterator[Depths]:
    """Depths along the resident order, from the least to the most bytes, evenly in ratio."""
    stacks, order = artifact.stacks, artifact.order(artifact.manifest.resident_order)
    least = uniform(stacks, lambda stack: stack.tiers[0]).weights_bytes
    most = uniform(stacks, lambda stack: stack.tiers[-1]).weights_bytes
    seen: set[int] = set()
    for i in range(N_SIZES):
        depths = fill(stacks, order, round(least * (most / least) ** (i / (N_SIZES - 1))))
        if depths.weights_bytes not in seen:
            seen.add(depths.weights_bytes)
            yield depths


def _row(artifact: Artifact, depths: Depths, quality: Json) -> Json:
    bits = 8 * depths.weights_bytes / artifact.manifest.n_parameters
    figures = {
        key: _rounded(quality[key])
        for key in ("kl_mean", "kl_p99", "top1_agreement", "ppl", "ref_ppl")
    }
    return {
        "weights_bytes": depths.weights_bytes,
        "bits_per_weight": round(bits, 4),
        "n_tokens": quality["n_tokens"],
        **figures,
    }


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")
