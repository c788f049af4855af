"""Graphs on disk: written without their weights, and checked for what they would read."""

import os
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto

from edgekit.disk import PLAIN
from edgekit.errors import RefusedError
from edgekit.exporters.onnx_decoder import Decoder, Weights
from edgekit.exporters.onnx_graph import FAST
from edgekit.exporters.onnx_model import build

MAX_GRAPH_BYTES = 1 << 26


def write_graph(
    path: Path,
    decoder: Decoder,
    weights: Weights,
    accuracy_level: int = FAST,
    *,
    is_portable: bool = True,
    has_keep: bool = False,
) -> None:
    """Write a decoder's graph to ``path``, a new file; its weights lie beside it already."""
    model = build(decoder, weights, accuracy_level, is_portable=is_portable, has_keep=has_keep)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | PLAIN
    with os.fdopen(os.open(path, flags, 0o644), "wb") as file:
        file.write(model.SerializeToString())
        file.flush()
        os.fsync(file.fileno())


def check_graph(data: bytes, name: str, sizes: dict[str, int]) -> None:
    """Check that a graph reads nothing but the data files beside it, each within its bytes.

    Args:
        data: The file.
        name: For messages.
        sizes: Bytes of each file that it may read.

    Raises:
        RefusedError: It is no graph, or a weight lies elsewhere.
    """
    if len(data) > MAX_GRAPH_BYTES:
        raise RefusedError(f"{name} has {len(data)} bytes, more than a graph without weights")
    try:
        model = onnx.ModelProto.FromString(data)
    except DecodeError as error:
        raise RefusedError(f"{name} is no ONNX graph ({error}); get the artifact again") from error
    attributes = [a for node in model.graph.node for a in node.attribute]
    if model.functions or any(a.HasField("g") or a.graphs for a in attributes):
        raise RefusedError(f"{name} has graphs within its graph; edgekit writes none: refused")
    sparse = [a for a in attributes if a.HasField("sparse_tensor") or a.sparse_tensors]
    if model.graph.sparse_initializer or sparse:
        raise RefusedError(f"{name} has sparse weights; edgekit writes none: refused")
    tensors = [t for a in attributes for t in (a.t, *a.tensors)]
    for tensor in (*model.graph.initializer, *tensors):
        if tensor.data_location == TensorProto.EXTERNAL:
            _check_external(tensor, name, sizes)


def _check_external(tensor: TensorProto, name: str, sizes: dict[str, int]) -> None:
    told = {entry.key: entry.value for entry in tensor.external_data}
    location = told.get("location", "")
    if location not in sizes:
        raise RefusedError(
            f"{name}: {tensor.name[:80]!a} lies in {location[:80]!a}, which is no data file of the "
            "artifact; refused"
        )
    texts = told.get("offset", "0"), told.get("length", "")
    if not all(text.isdecimal() and len(text) < 20 for text in texts):
        raise RefusedError(f"{name}: {tensor.name[:80]!a} has no place in {location}; refused")
    offset, length = map(int, texts)
    if offset + length > sizes[location]:
        raise RefusedError(
            f"{name}: {tensor.name[:80]!a} ends at {offset + length} of {location}, which has "
            f"{sizes[location]} bytes; get the artifact again"
        )
