"""Write down what routers choose: by running the checkpoint, or by listening to llama.cpp."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgekit.arch import Mapping, map_checkpoint
from edgekit.checkpoint import Checkpoint
from edgekit.errors import EdgekitError, UsageError
from edgekit.llama import Context, Listener, Model, VirtualFile, open_model
from edgekit.progress import Progress, Silent
from edgekit.provenance import file_hash
from edgekit.routing.trace import Json, Trace, trace_of
from edgekit.samples import CALIBRATION_TEXT
from edgekit.text import Ids, read_text, token_chunks, vocabulary

if TYPE_CHECKING:
    from edgekit.float_model import FloatModel

CHUNK_TOKENS = 512  # of a sequence, as in the paper of SRP and SCH
MAX_CHUNKS = 16  # 8192 tokens; 32768 move a hit rate by two points on the samples


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


def trace_model(
    source: Path | VirtualFile,
    text: Path | None = None,
    *,
    max_chunks: int = MAX_CHUNKS,
    chunk_tokens: int = CHUNK_TOKENS,
    name: str = "",
    n_threads: int | None = None,
    progress: Progress | None = None,
) -> Trace:
    """Listen to the routers of a GGUF while llama.cpp reads a text.

    Args:
        source: A file, or an object that gives its bytes.
        text, max_chunks, progress: As for `trace_checkpoint`.
        chunk_tokens: Of a sequence.
        name: Of the model, for the provenance.
        n_threads: Of llama.cpp; ``None`` takes the physical cores.

    Raises:
        UsageError: The model has no experts, or the text is too short.
    """
    path, progress = text or CALIBRATION_TEXT, progress or Silent()
    with open_model(source) as model:
        header, prefix = model.header, model.header.get("general.architecture")
        n_experts = int(header.get(f"{prefix}.expert_count", 0) or 0)
        if not n_experts:
            raise UsageError(f"{name or source} has no experts, so there is nothing to trace")
        size = min(chunk_tokens, model.n_ctx_train)
        chunks = token_chunks(model, read_text(path), size, max_chunks, str(path))
        progress.start("trace", len(chunks))
        runs = []
        for chunk in chunks:
            runs.append(_heard(model, chunk, int(header.get(f"{prefix}.block_count")), n_experts))
            progress.advance(1)
    layers = tuple(sorted(runs[0]))
    ids = np.concatenate([np.stack([run[layer] for layer in layers], axis=1) for run in runs])
    starts = tuple(range(0, chunks.size, chunks.shape[1]))
    told = {"runtime": "llama.cpp", "model": name or str(source)} | text_facts(path)
    return trace_of(ids, n_experts, starts, layers, None, told)


def _heard(
    model: Model, ids: Ids, n_blocks: int, n_experts: int
) -> dict[int, npt.NDArray[np.int32]]:
    """What each block's router chose for every token, ``[tokens, used]``."""
    found = dict[int, Any]()

    def keep(block: int, _: Any) -> None:
        found[block] = listener.topk().copy()

    listener = Listener(n_blocks, n_experts, keep, always=True)
    n = len(ids)  # logits of all tokens, or the last layer sees only some
    with Context(model, n, n_batch=n, n_outputs=n, listener=listener) as context:
        context.decode([int(i) for i in ids], "all")
    return found
