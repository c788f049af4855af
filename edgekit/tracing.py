"""Write down what routers choose: by running the checkpoint, or by listening to llama.cpp."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekit.arch import Mapping, map_checkpoint
from edgekit.checkpoint import Checkpoint
from edgekit.errors import EdgekitError, UsageError
from edgekit.progress import Progress, Silent
from edgekit.provenance import file_hash
from edgekit.routing.trace import Json, Trace, trace_of
from edgekit.samples import CALIBRATION_TEXT
from edgekit.text import read_text, token_chunks, vocabulary

if TYPE_CHECKING:
    from edgekit.float_model import FloatModel

CHUNK_TOKENS = 512  # of a sequence, as in the paper of SRP and SCH
MAX_CHUNKS = 16  # 8192 tokens: more move neither curves nor SRP by a point on the samples


def trace_checkpoint(
    checkpoint: Checkpoint,
    text: Path | None = None,
    *,
    mapping: Mapping | None = None,
    max_chunks: int = MAX_CHUNKS,
    progress: Progress | None = None,
) -> Trace:
    """Run the float32 model over a text and write its routers' choices down.

    Args:
        checkpoint: Of a mixture of experts, with tokenizer files.
        text: UTF-8 file; ``None`` takes the text that comes with edgekit.
        mapping: Of the checkpoint, when it is at hand.
        max_chunks: Sequences of 512 tokens to run.
        progress: Told every chunk.

    Raises:
        UsageError: The model has no experts, or the text is too short.
        DoesNotFitError: The largest layer does not fit into free memory.
    """
    try:
        from edgekit.float_model import FloatModel, batch_chunks, check_memory
    except ImportError as error:
        raise EdgekitError(
            f"tracing a checkpoint needs {error.name}; pip install edgekit[convert], or convert it "
            "and trace the artifact"
        ) from error
    path, progress = text or CALIBRATION_TEXT, progress or Silent()
    mapping = mapping or map_checkpoint(checkpoint)
    if not mapping.hyper.n_experts:
        raise UsageError(f"{checkpoint.folder} has no experts, so there is nothing to trace")
    size = min(CHUNK_TOKENS, mapping.hyper.context)
    check_memory(mapping, size, with_head=False, hint="close other programs")
    with vocabulary(checkpoint, mapping) as vocab:
        chunks = token_chunks(vocab, read_text(path), size, max_chunks, str(path))
    model = FloatModel(checkpoint, mapping)
    progress.start("trace", len(chunks))
    step, found = batch_chunks(mapping, size), list[list[tuple[Any, Any]]]()
    for start in range(0, len(chunks), step):
        with _recorded(model) as layers:
            model.hidden(chunks[start : start + step])
        found.append(layers)
        progress.advance(len(chunks[start : start + step]))
    ids, weights = (
        np.concatenate([np.stack([layer[i] for layer in run], axis=1) for run in found])
        for i in (0, 1)
    )
    starts = tuple(range(0, chunks.size, chunks.shape[1]))
    source = {"runtime": "transformers", "model": checkpoint.folder.resolve().name}
    told = source | text_facts(path)
    return trace_of(ids, mapping.hyper.n_experts, starts, None, weights, told)


def text_facts(path: Path) -> Json:
    """What a trace tells of its text."""
    return {"text": path.name, "text_sha256": file_hash(path)}


@contextmanager
def _recorded(model: "FloatModel") -> "Iterator[list[tuple[Any, Any]]]":
    """Ids and weights that each layer's router gives inside the block, ``[tokens, used]``."""
    layers, handles = list[tuple[Any, Any]](), []

    def keep(module: Any, inputs: Any, outputs: Any) -> None:
        _, weights, ids = outputs
        layers.append((ids.numpy(), weights.numpy()))

    for layer in model.model.model.layers:
        handles.append(layer.mlp.gate.register_forward_hook(keep))
    try:
        yield layers
    finally:
        for handle in handles:
            handle.remove()
