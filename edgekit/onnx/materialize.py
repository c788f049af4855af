"""An ordinary ONNX model folder at one depth: whole codes, composed of planes bit for bit.

The folder is what the Hugging Face hub has for transformers.js (``onnx/model.onnx`` with its data
beside it), and opens in onnxruntime-genai too.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgekit.disk import disk_full_reported, folder_bytes, require_free, require_new_folder
from edgekit.errors import RefusedError, UsageError
from edgekit.exporters.onnx_blocks import composed
from edgekit.exporters.onnx_configs import (
    CONFIG,
    GENAI,
    MODEL,
    MODEL_LAST,
    carried_files,
    config_json,
    genai_json,
)
from edgekit.exporters.onnx_decoder import Array, Decoder, Quantized, Term
from edgekit.exporters.onnx_store import DataFile, Planes
from edgekit.onnx.artifact import OnnxArtifact
from edgekit.publish import move_into_place

DATA = f"{MODEL}_data"
CHUNK_BYTES = 1 << 22  # of a plane in memory at a time
NEWEST = [1, 32]  # of onnxruntime: the experts' accuracy_level
OVERHEAD_BYTES = 1 << 20  # graphs and small files, at most
U8Array = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class OnnxMaterialized:
    """The folder written; ``tensors`` as ``{name, tier}``, a tier being a number of bits."""

    path: str
    bytes: int
    seconds: float
    tensors: tuple[dict[str, str], ...]


def materialize_onnx(
    artifact: OnnxArtifact, depth: int, output: Path, *, force: bool = False
) -> OnnxMaterialized:
    """Write the model folder of a depth to ``output``, which appears when it is whole.

    Raises:
        UsageError: ``output`` exists and force is off.
        DiskFullError: There is not enough room.
    """
    started = time.monotonic()
    check_output(output, force)
    require_free(output.parent, whole_bytes(artifact, depth), f"writing {output}")
    partial = output.with_name(f".{output.name}.partial-{os.getpid()}")
    try:
        with disk_full_reported(f"writing {output}", "make room and repeat"):
            write_folder(artifact, depth, partial)
        move_into_place(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    seconds = round(time.monotonic() - started, 3)
    return OnnxMaterialized(str(output), folder_bytes(output), seconds, tiers(artifact, depth))


def check_output(output: Path, force: bool) -> None:
    """Check that the folder ``output`` may be made.

    Raises:
        UsageError: It exists and force is off or it is none of ours, it is a file or a link, or its
            folder is missing.
    """
    require_new_folder(output, force, GENAI)
    if not output.absolute().parent.is_dir():
        raise UsageError(f"{output.parent} is no folder; make it first, or choose another -o")


def preview(artifact: OnnxArtifact, depth: int, output: Path) -> OnnxMaterialized:
    """What `materialize_onnx` would write; writes nothing."""
    return OnnxMaterialized(str(output), whole_bytes(artifact, depth), 0.0, tiers(artifact, depth))


def tiers(artifact: OnnxArtifact, depth: int) -> tuple[dict[str, str], ...]:
    """Name and bits of every matrix at a depth."""
    return tuple({"name": m.name, "tier": f"{m.depth(depth)}bit"} for m in artifact.part.matrices)


def whole_bytes(artifact: OnnxArtifact, depth: int) -> int:
    """Bytes of the folder, but for the graphs' few."""
    return artifact.part.depth_bytes(depth) + OVERHEAD_BYTES


def write_folder(
    artifact: OnnxArtifact, depth: int, folder: Path, *, for_here: bool = False
) -> None:
    """Write graph, data and small files into ``folder``, which is made.

    Args:
        artifact: Checked for this depth.
        depth: Of all matrices; some have a higher one.
        folder: A new one.
        for_here: Write graphs for the onnxruntime that is installed here, `MODEL_LAST` as well,
            whose head runs for the last positions only.

    Raises:
        RefusedError: The manifest lacks a tensor of the model, or has it in another form.
    """
    from edgekit.exporters.onnx_files import write_graph

    decoder = artifact.decoder()
    (folder / MODEL).parent.mkdir(parents=True)
    weights: dict[str, Array | Quantized] = {}
    with DataFile(folder / DATA) as file:
        for name, item in artifact.part.store.items():
            if isinstance(item, Planes):
                weights[name] = _written_matrix(artifact, item, depth, file)
            else:
                values = artifact.read(item.place).view(np.float32)
                weights[name] = file.add(values.reshape(item.shape))
    is_portable = not (for_here and is_newest())
    for name in (MODEL, MODEL_LAST) if for_here else (MODEL,):
        path, has_keep = folder / name, name == MODEL_LAST
        try:
            write_graph(path, decoder, weights, is_portable=is_portable, has_keep=has_keep)
        except (KeyError, ValueError, AssertionError) as error:
            raise RefusedError(
                f"{artifact.folder}/edgekit.json: its tensors are not those of the model that "
                f"config.json describes ({error!r:.80}); get the artifact again"
            ) from error
    for name, data in _small_files(artifact, decoder).items():
        (folder / name).write_bytes(data)


def is_newest() -> bool:
    """Whether the onnxruntime here knows what graphs that are not portable say."""
    try:
        parts = version("onnxruntime").split(".")
    except PackageNotFoundError:
        return False
    return [int(part) for part in parts[:2]] >= NEWEST


def _small_files(artifact: OnnxArtifact, decoder: Decoder) -> dict[str, bytes]:
    config = artifact.config()
    return {
        CONFIG: config_json(config),
        GENAI: genai_json(decoder, config, artifact.files, MODEL),
        **carried_files(artifact.files),
    }


def _written_matrix(artifact: OnnxArtifact, item: Planes, depth: int, file: DataFile) -> Quantized:
    """Append whole codes and scales of a matrix."""
    start, n_bytes = file.begin(), 0
    for codes in whole_codes(artifact.read, item, depth):
        file.append(codes)
        n_bytes += codes.nbytes
    bits, planes = item.depth(depth), item.at(depth)
    shape = (*item.shape[:-1], item.blocks, item.block * bits // 8)
    stored = Array(shape, "uint8", file.end(start))
    last = planes.terms[-1].scales
    scales = file.add(artifact.read(last.place).view(np.float16).reshape(last.shape))
    return Quantized(item.shape, item.block, (Term(bits, stored, scales),))


def whole_codes(read: Callable[..., U8Array], item: Planes, depth: int) -> Iterator[U8Array]:
    """The codes of a matrix at a depth, composed of its planes, some bytes at a time."""
    first, *rest = item.at(depth).terms
    lowest, *above = (read(term.codes.place) for term in (first, *rest))
    for low in range(0, len(lowest), CHUNK_BYTES):
        high = min(low + CHUNK_BYTES, len(lowest))
        codes, bits, wider = lowest[low:high], first.bits, 1
        for plane, term in zip(above, rest, strict=True):
            assert term.bits == bits, "planes of a code double its bits"
            codes = composed(codes, plane[low * wider : high * wider], bits)
            bits, wider = 2 * bits, 2 * wider
        yield codes
