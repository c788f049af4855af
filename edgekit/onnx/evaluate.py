"""Score an artifact's ONNX part on a text, as it ships: activations in 8 bits."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgekit.errors import UsageError
from edgekit.evaluate import BATCH, Quality, Reference, compare
from edgekit.exporters.onnx_configs import MODEL_LAST
from edgekit.exporters.onnx_store import DEPTHS
from edgekit.measure import reference_source
from edgekit.onnx.artifact import OnnxArtifact, open_onnx
from edgekit.onnx.cache import model_folder
from edgekit.onnx.plan import context_of, depth_of, plan_onnx
from edgekit.onnx_runtime.runner import OrtRunner
from edgekit.text import read_text

F32Array = npt.NDArray[np.float32]


def evaluate_onnx(
    folder: Path,
    text: Path,
    *,
    tier: str | None = None,
    budget: int | None = None,
    reference: Path | None = None,
    context: int,
) -> Quality:
    """Score the artifact in ``folder``.

    Args:
        folder: Of an artifact with an ONNX part.
        text: UTF-8 file.
        tier: ``2bit``, ``4bit`` or ``8bit``; without it and ``budget``, the highest that is here.
        budget: The depth that a process of that many bytes would load.
        reference: GGUF, checkpoint or artifact to compare with; None: the artifact's own original
            weights, which need its GGUF part.
        context: Tokens per chunk.

    Raises:
        UsageError: There is no such tier, or nothing to compare with.
    """
    artifact = open_onnx(folder, 0, remember=True)
    depth = _depth(artifact, tier, budget)
    artifact.check(depth, remember=True)
    if reference is None and not artifact.manifest.has_gguf:
        raise UsageError(
            f"{folder} holds no original weights to compare with; give --reference CHECKPOINT"
        )
    with ExitStack() as stack:
        source = reference_source(folder if reference is None else reference, stack)
        opened = stack.enter_context(Reference.open(source, read_text(text), context=context))
        model = stack.enter_context(model_folder(artifact, depth))
        rows = logits_of(artifact, model, opened)
        return compare(rows, opened, artifact.part.depth_bytes(depth))


def logits_of(artifact: OnnxArtifact, model: Path, reference: Reference) -> Iterator[F32Array]:
    """Logits of the scored positions, some rows at a time, in order."""
    longest = max(len(ids) for ids in reference.sequences.ids)
    n_ctx = context_of(artifact.part, longest)
    runner = OrtRunner(model / MODEL_LAST, artifact.part.facts, n_ctx, BATCH, 0)
    try:
        pairs = zip(reference.sequences.ids, reference.sequences.first, strict=True)
        for ids, first in pairs:
            runner.truncate(0)
            tokens = ids[:-1].tolist()  # what follows the last token is unknown
            for at in range(0, len(tokens), BATCH):
                batch = tokens[at : at + BATCH]
                keep = len(batch) - min(max(first - at, 0), len(batch))
                rows = runner.step(batch, max(keep, 1))
                if keep:
                    yield rows
    finally:
        runner.close()


def _depth(artifact: OnnxArtifact, tier: str | None, budget: int | None) -> int:
    if budget is not None:
        return depth_of(plan_onnx(artifact.part, budget, depths=artifact.depths))
    if tier is None:
        return artifact.depths[-1]
    known = {f"{depth}bit": depth for depth in DEPTHS}
    if tier not in known:
        raise UsageError(f"ONNX has no tier {tier}; choose {', '.join(known)}")
    return known[tier]
