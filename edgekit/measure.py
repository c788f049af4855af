"""Measure what budgets buy: an artifact's KL divergence and perplexity, at one depth or a dozen."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from edgekit.artifact import Artifact, open_artifact
from edgekit.assembly import Assembly
from edgekit.errors import UsageError
from edgekit.evaluate import CONTEXT, Quality, Reference, Source, evaluate, perplexity
from edgekit.manifest import MANIFEST_NAME, Json
from edgekit.plan import plan_budget, plan_tier
from edgekit.planner import Depths, fill, uniform
from edgekit.progress import Progress
from edgekit.samples import heldout_text
from edgekit.text import read_text

N_SIZES = 12
N_TOKENS = 4096  # a dozen passes over them take minutes for a model of 1 B weights on two cores


def measure(
    artifact: Artifact, progress: Progress, n_threads: int | None = None
) -> tuple[Json, ...]:
    """Quality on text that was not calibrated on, one row per size, fewest bytes first.

    The reference is the highest depth of every tensor: the original values when ``source`` is among
    the tiers.
    """
    sizes = list(sizes_of(artifact))
    progress.start("measure", len(sizes) + 1)
    text, rows = heldout_text(), []
    with (
        Assembly(artifact, highest_depths(artifact)) as top,
        Reference.open(top, text, n_tokens=N_TOKENS, n_threads=n_threads) as reference,
    ):
        progress.advance(1)
        for depths in sizes:
            with Assembly(artifact, depths) as source:
                quality = evaluate(source, reference, n_threads=n_threads)
            rows.append(_row(artifact, depths, asdict(quality)))
            progress.advance(1)
    return tuple(rows)


def evaluate_path(
    model: Path,
    text: Path,
    *,
    tier: str | None = None,
    budget: int | None = None,
    reference: Path | None = None,
    context: int = CONTEXT,
) -> Quality:
    """Score an artifact or a GGUF on a text.

    Args:
        model: The folder of an artifact, or a GGUF.
        text: UTF-8 file.
        tier: Of an artifact: every tensor at this tier.
        budget: Of an artifact: the plan for a process of that many bytes; without either, its
            highest depth.
        reference: GGUF, checkpoint or artifact to compare with; ``None`` takes an artifact's own
            highest depth, and compares a GGUF with nothing.
        context: Tokens per chunk.

    Raises:
        UsageError: A tier or budget is given for a GGUF, or the two models have other tokens.
    """
    words = read_text(text)
    with ExitStack() as stack:
        if model.is_dir():
            artifact = stack.enter_context(open_artifact(model))
            depths = _depths(artifact, tier, budget)
            source: Source = stack.enter_context(Assembly(artifact, depths))
            highest = highest_depths(artifact)
            other: Source | None = stack.enter_context(Assembly(artifact, highest))
        elif tier is None and budget is None:
            source, other = model, None
        else:
            raise UsageError(f"{model} has one depth; --tier and --budget are for artifacts")
        if reference is not None:
            other = _source(reference, stack)
        if other is None:
            return perplexity(source, words, context=context)
        opened = stack.enter_context(Reference.open(other, words, context=context))
        return evaluate(source, opened)


def _depths(artifact: Artifact, tier: str | None, budget: int | None) -> Depths:
    if tier is not None:
        return plan_tier(artifact, tier).depths
    if budget is not None:
        return plan_budget(artifact, budget).depths
    return highest_depths(artifact)


def _source(path: Path, stack: ExitStack) -> Source:
    if not (path / MANIFEST_NAME).is_file():
        return path
    artifact = stack.enter_context(open_artifact(path))
    return stack.enter_context(Assembly(artifact, highest_depths(artifact)))


def highest_depths(artifact: Artifact) -> Depths:
    """Every tensor with all its levels: the original values where ``source`` is among the tiers."""
    return uniform(artifact.stacks, lambda stack: stack.tiers[-1])


def sizes_of(artifact: Artifact) -> Iterator[Depths]:
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
        for key in ("kl_mean", "kl_error", "kl_p99", "top1_agreement", "ppl", "ref_ppl")
    }
    return {
        "weights_bytes": depths.weights_bytes,
        "bits_per_weight": round(bits, 4),
        "n_tokens": quality["n_tokens"],
        **figures,
    }


def _rounded(value: float) -> float:
    return float(f"{max(value, 0.0):.5g}")  # a KL of equal models may round below 0
