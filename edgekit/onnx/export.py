"""A model as files for ONNX Runtime: data files, one graph per depth, and what runtimes read."""

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekit.arch import Mapping as TensorMapping
from edgekit.arch.decoder import decoder_of
from edgekit.checkpoint import Checkpoint
from edgekit.codecs.job import Source
from edgekit.errors import EdgekitError
from edgekit.exporters.onnx_configs import CONFIG, GENAI, carried_files, config_json, genai_json
from edgekit.exporters.onnx_decoder import Decoder
from edgekit.exporters.onnx_store import DEPTHS, weights_at
from edgekit.imatrix import Imatrix
from edgekit.onnx.feedback import Feedback
from edgekit.onnx.slicing import slice_model
from edgekit.onnx_part import Facts, OnnxPart, graph_name
from edgekit.progress import Progress
from edgekit.publish import HashingWriter
from edgekit.stack import FileRecord

DEFAULT_BLOCK = 64


@dataclass(frozen=True)
class OnnxModel:
    """What is exported.

    Attributes:
        tensors: Of the whole model, at tier source, under llama.cpp's names.
        decoder: What the graph computes.
        config: config.json.
        folder: Where the tokenizer's files are.
        imatrix: Importance of columns; None: all alike.
        feedback: Carries errors on from column to column; None: without.
    """

    tensors: Sequence[Source]
    decoder: Decoder
    config: Mapping[str, Any]
    folder: Path
    imatrix: Imatrix | None = None
    feedback: Feedback | None = None


def decoder_in(checkpoint: Checkpoint, mapping: TensorMapping) -> Decoder:
    """The decoder that a checkpoint is; errors as `edgekit.arch.decoder.decoder_of`."""
    name = f"{checkpoint.folder}/config.json"
    return decoder_of(mapping.arch, mapping.hyper, checkpoint.config, name)


def onnx_model(
    checkpoint: Checkpoint, mapping: TensorMapping, imatrix: Imatrix | None
) -> OnnxModel:
    """A checkpoint as it is exported."""
    decoder = decoder_in(checkpoint, mapping)
    return OnnxModel(mapping.tensors, decoder, checkpoint.config, checkpoint.folder, imatrix)


def require_onnx() -> None:
    """Check that what writes graphs is installed.

    Raises:
        EdgekitError: It is not.
    """
    try:
        import edgekit.exporters.onnx_files  # noqa: F401
    except ImportError as error:
        raise EdgekitError(
            f"writing ONNX needs the package {error.name}; pip install 'edgekit[onnx]'"
        ) from error


def export_onnx(
    model: OnnxModel, folder: Path, progress: Progress, *, block: int = DEFAULT_BLOCK, jobs: int = 1
) -> OnnxPart:
    """Write all files into ``folder``, which is made.

    Raises:
        EdgekitError: The package onnx is missing.
        UnsupportedError: ONNX Runtime's operators cannot compute the model.
        RefusedError: A weight is NaN or infinite.
    """
    require_onnx()
    from edgekit.exporters.onnx_files import write_graph

    folder.mkdir()
    with ThreadPoolExecutor(jobs) as pool:
        sliced = slice_model(
            model.tensors,
            model.decoder,
            folder,
            block=block,
            imatrix=model.imatrix,
            feedback=model.feedback,
            pool=pool,
            ahead=2 * jobs,
            progress=progress,
        )
    files = [FileRecord(*record) for record in sliced.files]
    for depth in DEPTHS:
        path = folder / graph_name(depth)
        write_graph(path, model.decoder, weights_at(sliced.tensors, depth))
        files.append(_record(path))
    for name, data in small_files(model, graph_name(DEPTHS[-1])).items():
        with HashingWriter(folder / name) as out:
            out.write(data)
            files.append(out.record)
    return OnnxPart(block, facts_of(model), tuple(files), sliced.tensors, sliced.errors)


def small_files(model: OnnxModel, graph: str) -> dict[str, bytes]:
    """Name and content of every file but graphs and data; ``graph`` is what genai opens."""
    return {
        CONFIG: config_json(model.config),
        GENAI: genai_json(model.decoder, model.config, model.folder, graph),
        **carried_files(model.folder),
    }


def facts_of(model: OnnxModel) -> Facts:
    """What memory follows from."""
    d = model.decoder
    widths = [t.shape[-2] for t in model.tensors if ".ffn_" in t.name and len(t.shape) > 1]
    return Facts(
        n_layers=d.n_layers,
        n_heads=d.n_heads,
        n_kv_heads=d.n_kv_heads,
        head=d.head,
        hidden=d.hidden,
        feed_forward=max(widths) * max(1, d.n_used),
        vocab=d.vocab,
        context=d.context,
    )


def _record(path: Path) -> FileRecord:
    data = path.read_bytes()
    return FileRecord(path.name, len(data), hashlib.sha256(data).hexdigest())
