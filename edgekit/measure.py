"""Measure what budgets buy: an artifact's KL divergence and perplexity, at one depth or a dozen."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from edgekit.artifact import Artifact, open_artifact
from edgekit.assembly import Assembly
from edgekit.errors import EdgekitError, UsageError
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
    runtime: str = "llama",
    device: str = "cpu",
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
        runtime: Key of `RUNTIMES`: what runs the model; the reference always runs in llama.cpp, or
            in float32 where it is a checkpoint.
        device: Where ``runtime`` runs it.

    Raises:
        UsageError: A tier, budget or another runtime than llama.cpp is given for a GGUF, or the two
            models have other tokens.
    """
    words = read_text(text)
    with ExitStack() as stack:
        if not model.is_dir():
            if tier is not None or budget is not None or runtime != "llama" or device != "cpu":
                raise UsageError(
                    f"{model} has one depth, for llama.cpp on the CPU; --tier, --budget, --runtime "
                    "and --device are for artifacts"
                )
            if reference is None:
                return perplexity(model, words, context=context)
            other = Reference.open(reference_source(reference, stack), words, context=context)
            return evaluate(model, stack.enter_context(other))
        artifact = stack.enter_context(open_artifact(model))
        depths = _depths(artifact, tier, budget)
        highest = stack.enter_context(Assembly(artifact, highest_depths(artifact)))
        source = highest if reference is None else reference_source(reference, stack)
        opened = stack.enter_context(Reference.open(source, words, context=context))
        return RUNTIMES[runtime](artifact, depths, opened, device)


def _in_llama(artifact: Artifact, depths: Depths, reference: Reference, device: str) -> Quality:
    if device != "cpu":
        raise UsageError(f"llama.cpp runs on the CPU here, not on {device}; leave --device out")
    with Assembly(artifact, depths) as source:
        return evaluate(source, reference)


def _in_torch(artifact: Artifact, depths: Depths, reference: Reference, device: str) -> Quality:
    try:
        from edgekit.torch_runtime import run
    except ImportError as error:
        raise EdgekitError(
            f"--runtime torch needs {error.name}; pip install 'edgekit[convert]'"
        ) from error
    return run(artifact, depths, reference, device)


Run = Callable[[Artifact, Depths, Reference, str], Quality]
RUNTIMES: Mapping[str, Run] = {  # what a depth can be evaluated with
    "llama": _in_llama,
    "torch": _in_torch,
}


def _depths(artifact: Artifact, tier: str | None, budget: int | None) -> Depths:
    if tier is not None:
        return plan_tier(artifact, tier).depths
    if budget is not None:
        return plan_budget(artifact, budget).depths
    return highest_depths(artifact)


def reference_source(path: Path, stack: ExitStack) -> Source:
    """What a reference runs from: a GGUF, a checkpoint, or the highest depth of an artifact."""
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
