"""Importance matrices in llama.cpp's own format, and the weights llama-quantize takes from them.

A file has, for each weight matrix, the sum over all tokens of the squared input of every column,
and the number of tokens; per expert for a tensor of experts. Written as llama-imatrix writes it
(GGUF, ``general.type`` imatrix); its older ``.dat`` files are read too. Semantics: llama.cpp's
``tools/imatrix/imatrix.cpp``, ``common/imatrix-loader.cpp``, ``load_imatrix`` in
``tools/quantize/quantize.cpp``.
"""

import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGUFValueType

from edgekit.errors import RefusedError
from edgekit.exporters.gguf import (
    MAGIC,
    MAX_NAME_BYTES,
    Gguf,
    TensorInfo,
    read_header,
    tensor_offsets,
    write_gguf,
)
from edgekit.exporters.gguf_values import array, shown, string, u32

F32Array = npt.NDArray[np.float32]

SUMS, COUNTS = ".in_sum2", ".counts"
DATASETS, CHUNK_COUNT, CHUNK_SIZE = (
    f"imatrix.{key}" for key in ("datasets", "chunk_count", "chunk_size")
)
EMBEDDING = "token_embd.weight"


@dataclass(frozen=True, eq=False)
class Entry:
    """Statistics of one tensor.

    Attributes:
        sums: float32 ``[experts, cols]``, sums of squared inputs; one row for a dense tensor.
        counts: float32 ``[experts]``, whole numbers of tokens; some files have a single count for
            all rows.
    """

    sums: F32Array
    counts: F32Array

    def weights(self) -> F32Array:
        """Mean squares, float32 ``[experts, cols]``; all ones for an expert that saw no token."""
        sums = self.sums.reshape(len(self.counts), -1)
        counts = self.counts[:, None]
        means = np.divide(sums, counts, out=np.ones_like(sums), where=counts > 0)
        return means.reshape(self.sums.shape)


@dataclass(frozen=True, eq=False)
class Imatrix:
    """Statistics of a model.

    Attributes:
        entries: GGUF tensor name -> statistics.
        datasets: Names of the texts.
        chunk_count: Chunks of text that were run.
        chunk_size: Tokens per chunk; 0 where an old file does not say.
        name: What messages call it.
    """

    entries: Mapping[str, Entry]
    datasets: tuple[str, ...] = ()
    chunk_count: int = 0
    chunk_size: int = 0
    name: str = "imatrix"

    def weights_for(self, name: str, n_experts: int, cols: int) -> F32Array | None:
        """What llama-quantize weighs the columns of a tensor with.

        Args:
            name: GGUF name.
            n_experts: Experts of the tensor, 1 for a dense one.
            cols: Columns of the tensor.

        Returns:
            float32 ``[n_experts, cols]``, or ``None`` where the file says nothing of this tensor:
            llama-quantize then quantizes it without weights, and so for a token embedding of
            another width.

        Raises:
            RefusedError: The statistics have another width: they are of another model.
        """
        entry = self.entries.get(name)
        if entry is None:
            return None
        if entry.sums.size == n_experts * cols:
            return entry.weights().reshape(n_experts, cols)
        if name == EMBEDDING:
            return None
        raise RefusedError(
            f"{self.name}: tensor {shown(name)} has statistics of {entry.sums.size} columns, the "
            f"model needs {n_experts} x {cols}; give the imatrix of this model"
        )

    def missing(self, names: Iterable[str]) -> tuple[str, ...]:
        """Those of ``names`` that have no statistics, to tell the user."""
        return tuple(name for name in names if name not in self.entries)

    def starved(self) -> dict[str, int]:
        """Tensors with experts that saw no token -> how many; their columns weigh all alike."""
        empty = {name: int((entry.counts == 0).sum()) for name, entry in self.entries.items()}
        return {name: n for name, n in empty.items() if n}


def write_imatrix(imatrix: Imatrix, path: Path) -> None:
    """Write llama.cpp's imatrix GGUF; equal statistics give equal bytes, the rename is atomic."""
    tensors, data = [], []
    for name, entry in sorted(imatrix.entries.items()):
        tensors.append(TensorInfo(name + SUMS, "F32", entry.sums.shape))
        tensors.append(TensorInfo(name + COUNTS, "F32", (len(entry.counts), 1)))
        data += [[np.ascontiguousarray(entry.sums, "<f4")], [entry.counts.astype("<f4")]]
    metadata = {
        "general.type": string("imatrix"),
        DATASETS: array(GGUFValueType.STRING, imatrix.datasets),
        CHUNK_COUNT: u32(imatrix.chunk_count),
        CHUNK_SIZE: u32(imatrix.chunk_size),
    }
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        with partial.open("xb") as file:
            write_gguf(file, metadata, tensors, data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_imatrix(path: Path) -> Imatrix:
    """Read an imatrix of edgekit, of llama-imatrix (GGUF), or an old ``.dat``.

    Raises:
        RefusedError: The file is corrupt or is something else.
    """
    if not path.is_file():
        raise RefusedError(f"{path} is no file; give an imatrix made by edgekit or llama-imatrix")
    with path.open("rb") as file:
        is_gguf = file.read(len(MAGIC)) == MAGIC
    imatrix = _read_gguf(path) if is_gguf else _read_legacy(path)
    for name, entry in imatrix.entries.items():
        _check_entry(path, name, entry)
    return imatrix


def _check_entry(path: Path, name: str, entry: Entry) -> None:
    for what, values in (("sums", entry.sums), ("counts", entry.counts)):
        if not np.isfinite(values).all() or values.min() < 0:
            raise _refuse(path, f"{what} of {shown(name)} are not all finite and 0 or more")
    if entry.sums.size % len(entry.counts):
        raise _refuse(
            path,
            f"{shown(name)} has {entry.sums.size} sums and {len(entry.counts)} counts, which do "
            f"not divide them",
        )


def _refuse(path: Path, what: str) -> RefusedError:
    return RefusedError(f"{path}: {what}; make the imatrix again")


def _read_gguf(path: Path) -> Imatrix:
    header = read_header(path)
    if header.get("general.type") != "imatrix":
        kind = header.get("general.type", header.get("general.architecture", "unknown"))
        raise RefusedError(f"{path}: is a GGUF of type {shown(str(kind))}, not an imatrix")
    lacking = [key for key in (DATASETS, CHUNK_COUNT, CHUNK_SIZE) if key not in header.metadata]
    if lacking:
        raise _refuse(path, f"has no {', '.join(lacking)}")
    tensors = _read_tensors(path, header)
    names = {name.removesuffix(end) for name in tensors for end in (SUMS, COUNTS)} - set(tensors)
    for name in sorted(names):
        if name + SUMS not in tensors or name + COUNTS not in tensors:
            raise _refuse(path, f"{shown(name)} has not both sums and counts")
    if not names:
        raise _refuse(path, "holds no statistics")
    entries = {
        name: Entry(_matrix(tensors[name + SUMS]), np.rint(tensors[name + COUNTS].reshape(-1)))
        for name in sorted(names)
    }
    datasets = header.get(DATASETS)
    if not isinstance(datasets, list) or not all(isinstance(item, str) for item in datasets):
        raise _refuse(path, f"{DATASETS} is no list of names")
    counts = [header.get(key) for key in (CHUNK_COUNT, CHUNK_SIZE)]
    if not all(type(count) is int and 0 <= count < 2**32 for count in counts):
        raise _refuse(path, f"{CHUNK_COUNT} or {CHUNK_SIZE} is no count")
    return Imatrix(entries, tuple(datasets), counts[0], counts[1], str(path))


def _matrix(values: F32Array) -> F32Array:
    return values.reshape(-1, values.shape[-1])


def _read_tensors(path: Path, header: Gguf) -> dict[str, F32Array]:
    data = np.memmap(path, np.uint8, "r")
    found = {}
    for tensor, offset in zip(
        header.tensors, tensor_offsets(header.tensors, header.alignment), strict=True
    ):
        if not tensor.name.endswith((SUMS, COUNTS)):
            continue
        if tensor.type_name != "F32":
            raise _refuse(path, f"{shown(tensor.name)} is {tensor.type_name}, needs F32")
        start = header.data_offset + offset
        values = data[start : start + tensor.n_bytes].view("<f4").reshape(tensor.shape)
        found[tensor.name] = np.array(values, np.float32)
    return found


class _Legacy:
    """Reads the old binary format: int32 lengths and values, little-endian."""

    def __init__(self, path: Path) -> None:
        self.path, self.data, self.position = path, path.read_bytes(), 0

    @property
    def left(self) -> int:
        return len(self.data) - self.position

    def take(self, n: int) -> bytes:
        if n < 0 or n > self.left:
            raise _refuse(
                self.path, f"is no imatrix: {n} bytes at byte {self.position}, {self.left} are left"
            )
        self.position += n
        return self.data[self.position - n : self.position]

    def i32(self) -> int:
        return int(struct.unpack("<i", self.take(4))[0])

    def text(self, limit: int) -> str:
        n = self.i32()
        data = self.take(n if n <= limit else -1)
        try:
            return data.split(b"\0")[0].decode("utf-8")
        except UnicodeDecodeError as error:
            raise _refuse(self.path, "is no imatrix: a name is not UTF-8") from error


def _read_legacy(path: Path) -> Imatrix:
    file = _Legacy(path)
    n_entries = file.i32()
    if n_entries < 1:
        raise _refuse(path, f"is no imatrix: it declares {n_entries} entries")
    entries = {}
    for _ in range(n_entries):
        name = file.text(MAX_NAME_BYTES)
        n_calls, n_values = file.i32(), file.i32()
        if n_values < 1 or n_calls < 0:
            raise _refuse(path, f"is no imatrix: {shown(name)} has {n_values} values")
        sums = np.frombuffer(file.take(4 * n_values), "<f4").astype(np.float32)
        # sums are means times calls; without calls llama-quantize takes them as they are
        entries[name] = Entry(sums[None], np.array([max(n_calls, 1)], np.float32))
    chunks = file.i32() if file.left else 0
    datasets = (file.text(1 << 16),) if file.left else ()
    return Imatrix(entries, datasets, max(chunks, 0), 0, str(path))
