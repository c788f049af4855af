"""GGUF files: a strict reader of the header, and a writer that streams tensors.

llama.cpp ends the process when it meets some kinds of malformed header, so no byte of a GGUF goes
to native code before `read_header` has accepted it. Format: ggml's ``docs/gguf.md``; what llama.cpp
itself asks for beyond it (unique names, at most 63 bytes each, tensor data back to back in order of
declaration): ``ggml/src/gguf.cpp``.
"""

import io
import itertools
import math
import os
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from gguf import GGML_QUANT_SIZES, GGUFValueType

from edgekit.errors import RefusedError
from edgekit.exporters.gguf_values import (
    MAX_KEY_BYTES,
    HeaderBytes,
    Value,
    pack_string,
    pack_value,
    shown,
)

MAGIC = b"GGUF"
VERSION = 3
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1024**2
MAX_NAME_BYTES = 63  # GGML_MAX_NAME is 64, its last byte a NUL
MAX_HEADER_BYTES = 128 * 1024**2  # a vocabulary of 262 144 tokens with merges makes 20 MiB
MIN_PAIR_BYTES = 13  # length, one type, one byte
MIN_TENSOR_BYTES = 32  # length, number of extents, one extent, type, offset
_ALIGNMENT_KEY = "general.alignment"
_USUAL_KEY = re.compile(r"[a-z0-9_.\-]+")

# name: (id, weights per block, bytes per block); Q2_0 is in llama.cpp but not in gguf 0.19
TYPES: dict[str, tuple[int, int, int]] = {
    kind.name: (kind.value, *GGML_QUANT_SIZES[kind]) for kind in GGML_QUANT_SIZES
} | {"Q2_0": (42, 64, 18)}
_TYPE_NAMES = {number: name for name, (number, _, _) in TYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as the header declares it.

    Attributes:
        name: At most 63 bytes of printable ASCII.
        type_name: ggml type, a key of `TYPES`.
        shape: Extents in numpy order, slowest first: ``(rows, cols)``, ``(experts, rows, cols)``.
    """

    name: str
    type_name: str
    shape: tuple[int, ...]

    @property
    def n_weights(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, ``shape[-1]`` weights."""
        _, block, block_bytes = TYPES[self.type_name]
        return self.shape[-1] // block * block_bytes

    @property
    def n_bytes(self) -> int:
        """Bytes of the whole tensor, without the padding behind it."""
        return math.prod(self.shape[:-1]) * self.row_bytes


@dataclass(frozen=True)
class Gguf:
    """The header of a GGUF file.

    Attributes:
        metadata: Key to value, in the order of the file.
        tensors: In the order of the file, which is the order of their data.
        alignment: Bytes; every tensor starts at a multiple of it.
        data_offset: Byte of the file where the first tensor starts.
    """

    metadata: dict[str, Value]
    tensors: tuple[TensorInfo, ...]
    alignment: int
    data_offset: int

    @property
    def data_end(self) -> int:
        """Byte behind the last tensor, its padding not counted."""
        offsets = tensor_offsets(self.tensors, self.alignment)
        return self.data_offset + (offsets[-1] + self.tensors[-1].n_bytes if offsets else 0)

    @property
    def unusual_keys(self) -> tuple[str, ...]:
        """Keys that llama.cpp reads but the naming rules of the format do not allow."""
        return tuple(key for key in self.metadata if not _USUAL_KEY.fullmatch(key))

    def get(self, key: str, default: Any = None) -> Any:
        """Return the plain value of ``key``, ``default`` when it is absent."""
        value = self.metadata.get(key)
        return default if value is None else value.value


def padded(n_bytes: int, alignment: int) -> int:
    """Round ``n_bytes`` up to a multiple of ``alignment``."""
    return -(-n_bytes // alignment) * alignment


def tensor_offsets(
    tensors: Sequence[TensorInfo], alignment: int = DEFAULT_ALIGNMENT
) -> tuple[int, ...]:
    """Return where each tensor starts, in bytes from the start of the data section."""
    sizes = (padded(tensor.n_bytes, alignment) for tensor in tensors[:-1])
    return tuple(itertools.accumulate(sizes, initial=0))[: len(tensors)]


def alignment_of(metadata: Mapping[str, Value], name: str = "GGUF") -> int:
    """Return ``general.alignment``, 32 where it is absent.

    Raises:
        RefusedError: It is no uint32, no power of two, or above 1 MiB.
    """
    value = metadata.get(_ALIGNMENT_KEY)
    if value is None:
        return DEFAULT_ALIGNMENT
    number = value.value
    if value.type != GGUFValueType.UINT32 or number.bit_count() != 1 or number > MAX_ALIGNMENT:
        raise RefusedError(
            f"{name}: general.alignment is {shown(repr(number))} of type {value.type.name}, needs "
            f"a UINT32 power of two up to {MAX_ALIGNMENT}; get the file again"
        )
    return int(number)


# reading


def read_header(
    source: str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO,
    *,
    file_size: int | None = None,
    allow_trailing: bool = True,
    name: str | None = None,
) -> Gguf:
    """Read and check the header of a GGUF file; no tensor data is read.

    Args:
        source: A path, the first bytes of a file, or a binary file at the start of the GGUF.
        file_size: Bytes of the whole file; ``None`` takes those of the source. With it, a prefix
            that holds the header is enough.
        allow_trailing: Accept bytes behind the last tensor and its padding, as llama.cpp does.
        name: What messages call the file; ``None`` takes the path.

    Raises:
        RefusedError: The header is not what llama.cpp would load safely, or the file ends early.
    """
    with _opened(source) as file:
        if file_size is None:
            start = file.tell()
            file_size = file.seek(0, os.SEEK_END) - start
            file.seek(start)
        title = name or (str(source) if isinstance(source, (str, os.PathLike)) else "GGUF")
        return _read(HeaderBytes(file, file_size, title), allow_trailing)


def _opened(source: Any) -> AbstractContextManager[BinaryIO]:
    if isinstance(source, (bytes, bytearray, memoryview)):
        return io.BytesIO(source)
    if not isinstance(source, (str, os.PathLike)):
        return nullcontext(source)
    if not Path(source).is_file():
        raise RefusedError(f"{source} is no file; give the path of a GGUF file")
    return open(source, "rb")


def _read(data: HeaderBytes, allow_trailing: bool) -> Gguf:
    n_tensors, n_pairs = _read_counts(data)
    metadata: dict[str, Value] = {}
    for index in range(n_pairs):
        key = _read_key(data, index, metadata)
        metadata[key] = data.value(key)
        _check_header_size(data)
    alignment = alignment_of(metadata, data.name)
    declared = []
    for index in range(n_tensors):
        declared.append(_read_tensor(data, index))
        _check_header_size(data)
    tensors = tuple(tensor for tensor, _ in declared)
    _check_unique(tensors, data.name)
    data_offset = padded(data.position, alignment)
    header = Gguf(metadata, tensors, alignment, data_offset)
    _check_layout(header, [offset for _, offset in declared], data, allow_trailing)
    return header


def _read_counts(data: HeaderBytes) -> tuple[int, int]:
    magic = data.take(4, "the magic")
    if magic != MAGIC:
        raise data.refuse(f"starts with {magic!r}, a GGUF file starts with {MAGIC!r}")
    version = data.u32("the version")
    if version not in (2, 3):
        raise data.refuse(f"is GGUF version {version}, versions 2 and 3 little-endian are read")
    n_tensors, n_pairs = data.u64("the tensor count"), data.u64("the metadata count")
    room = data.size - data.position
    if n_pairs * MIN_PAIR_BYTES + n_tensors * MIN_TENSOR_BYTES > room:
        raise data.refuse(
            f"declares {n_pairs} metadata values and {n_tensors} tensors, the file has {room} bytes"
        )
    return n_tensors, n_pairs


def _check_header_size(data: HeaderBytes) -> None:
    if data.position > MAX_HEADER_BYTES:
        raise data.refuse(f"the header is longer than {MAX_HEADER_BYTES} bytes")


def _read_key(data: HeaderBytes, index: int, seen: Mapping[str, Value]) -> str:
    key = data.string(f"key {index}", MAX_KEY_BYTES)
    if not key:
        raise data.refuse(f"key {index} is empty")
    if key in seen:
        raise data.refuse(f"key {shown(key)} appears twice")
    return key


def _read_tensor(data: HeaderBytes, index: int) -> tuple[TensorInfo, int]:
    name = data.string(f"the name of tensor {index}", MAX_NAME_BYTES)
    what = f"tensor {shown(name)}"
    n_dims = data.u32(what)
    if not 1 <= n_dims <= 4:
        raise data.refuse(f"{what} has {n_dims} dimensions, needs 1 to 4")
    extents = struct.unpack(f"<{n_dims}q", data.take(8 * n_dims, what))
    number = data.u32(what)
    if number not in _TYPE_NAMES:
        raise data.refuse(f"{what} has ggml type {number}, which is not known")
    tensor = TensorInfo(name, _TYPE_NAMES[number], extents[::-1])
    check_tensor(tensor, data.name)
    return tensor, data.u64(what)


def check_tensor(tensor: TensorInfo, name: str = "GGUF") -> None:
    """Check one tensor by llama.cpp's rules.

    Raises:
        RefusedError: The name, the number of dimensions, an extent or the type cannot be stored.
    """
    fault = _fault(tensor)
    if fault:
        raise RefusedError(f"{name}: tensor {shown(tensor.name)} {fault}; get the file again")


def _fault(tensor: TensorInfo) -> str | None:
    if not tensor.name.isascii() or not tensor.name.isprintable() or not tensor.name:
        return "has a name that is empty or not printable ASCII"
    if len(tensor.name) > MAX_NAME_BYTES:
        return f"has a name of {len(tensor.name)} bytes, at most {MAX_NAME_BYTES} fit"
    if tensor.type_name not in TYPES:
        return f"has type {shown(tensor.type_name)}, which is not known"
    if not 1 <= len(tensor.shape) <= 4 or min(tensor.shape) < 1:
        return f"has the shape {tensor.shape}, needs 1 to 4 extents of at least 1"
    if max(tensor.n_weights, tensor.n_bytes) >= 2**63:
        return f"has the shape {tensor.shape}, which is 2**63 weights or bytes or more"
    block = TYPES[tensor.type_name][1]
    if tensor.shape[-1] % block:
        return f"has {tensor.shape[-1]} columns, {tensor.type_name} needs a multiple of {block}"
    return None


def _check_unique(tensors: Iterable[TensorInfo], name: str) -> None:
    seen: set[str] = set()
    for tensor in tensors:
        if tensor.name in seen:
            raise RefusedError(f"{name}: tensor {shown(tensor.name)} appears twice")
        seen.add(tensor.name)


def _check_layout(
    header: Gguf, declared: Sequence[int], data: HeaderBytes, allow_trailing: bool
) -> None:
    expected = tensor_offsets(header.tensors, header.alignment)
    for tensor, offset, right in zip(header.tensors, declared, expected, strict=True):
        if offset != right:
            raise data.refuse(f"tensor {shown(tensor.name)} has offset {offset}, expected {right}")
    end = header.data_end
    if header.tensors and end > data.size:
        raise data.refuse(f"its tensors end at byte {end}, the file has {data.size} bytes")
    end = padded(end, header.alignment)
    if data.size > end and not allow_trailing:
        raise data.refuse(f"has {data.size - end} bytes behind its last tensor")


# writing


def header_bytes(metadata: Mapping[str, Value], tensors: Sequence[TensorInfo]) -> bytes:
    """Return the header of a version 3 file, zero-padded up to the data section.

    The alignment is ``general.alignment`` of the metadata, 32 without it. Equal arguments (order
    included) give equal bytes.

    Raises:
        RefusedError: llama.cpp would not read the result.
    """
    alignment = alignment_of(metadata)
    _check_unique(tensors, "GGUF")
    parts = [struct.pack("<4sIQQ", MAGIC, VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        parts += [pack_string(key), pack_value(key, value)]
    for tensor, offset in zip(tensors, tensor_offsets(tensors, alignment), strict=True):
        check_tensor(tensor)
        extents = tensor.shape[::-1]
        head = struct.pack(f"<I{len(extents)}Q", len(extents), *extents)
        parts += [pack_string(tensor.name), head]
        parts.append(struct.pack("<IQ", TYPES[tensor.type_name][0], offset))
    packed = b"".join(parts)
    return packed.ljust(padded(len(packed), alignment), b"\0")


def write_gguf(
    file: BinaryIO,
    metadata: Mapping[str, Value],
    tensors: Sequence[TensorInfo],
    data: Iterable[Iterable[Any]],
) -> int:
    """Write a GGUF at the current position of ``file`` and return its size in bytes.

    Args:
        file: Open for writing; the caller syncs and renames it.
        metadata: Key to value, written in this order.
        tensors: Written in this order.
        data: For each tensor its chunks: contiguous bytes-like objects, together ``n_bytes`` long.
            One chunk is held at a time.

    Raises:
        RefusedError: The header cannot be stored, or a tensor's chunks have another size.
    """
    alignment = alignment_of(metadata)
    head = header_bytes(metadata, tensors)
    file.write(head)
    n_written = len(head)
    for tensor, chunks in zip(tensors, data, strict=True):
        n_bytes = 0
        for chunk in chunks:
            view = memoryview(chunk).cast("B")
            n_bytes += view.nbytes
            file.write(view)
        if n_bytes != tensor.n_bytes:
            raise RefusedError(
                f"tensor {shown(tensor.name)} got {n_bytes} bytes, needs {tensor.n_bytes}"
            )
        file.write(bytes(padded(n_bytes, alignment) - n_bytes))
        n_written += padded(n_bytes, alignment)
    return n_written
