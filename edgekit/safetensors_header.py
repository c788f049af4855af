"""Our own strict reader of safetensors headers; it runs before any other code sees the file.

Format: 8 bytes little-endian header length, a JSON object ``name -> {dtype, shape, data_offsets}``,
then the data. The rules are those of the format's specification, with no tolerance: see
https://github.com/huggingface/safetensors#format.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekit.errors import RefusedError, UnsupportedError

MAX_HEADER_BYTES = 100_000_000  # the cap of the safetensors library itself
MAX_NAME = 512
MAX_DIMS = 8  # no checkpoint tensor has more than four
# dtype -> bytes per element; sub-byte types are left out, so a file with them is refused
DTYPES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class TensorRef:
    """Where a tensor lies: bytes ``[start, stop)`` of ``file``, row-major, little-endian."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    stop: int

    @property
    def cols(self) -> int:
        """Length of the last dimension (1 for a scalar)."""
        return self.shape[-1] if self.shape else 1

    @property
    def n_rows(self) -> int:
        """Rows of the tensor seen as a matrix of its last dimension."""
        return math.prod(self.shape[:-1])


def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """``object_pairs_hook`` of `json` that refuses an object with the same key twice.

    Raises:
        ValueError: A key is there twice.
    """
    data: dict[str, Any] = {}
    for key, value in pairs:
        if key in data:
            raise ValueError(f"the key {key!r} is there twice")
        data[key] = value
    return data


def read_header(path: Path) -> dict[str, TensorRef]:
    """Tensors of a safetensors file, in the order of their data.

    Raises:
        RefusedError: The header is not sound: length, JSON, duplicate names, dtype, shape against
            length, holes, overlap or bytes after the last tensor.
        UnsupportedError: A tensor has an FP8 dtype.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or length > min(size - 8, MAX_HEADER_BYTES) or length < 2:
            raise RefusedError(
                f"{path.name} has {size} bytes and a header of {length}; "
                f"it must fit the file and {MAX_HEADER_BYTES} bytes: download it again"
            )
        raw = file.read(length)
    begin = 8 + length
    refs = {
        name: _tensor(path, name, entry, begin)
        for name, entry in _entries(path, raw).items()
        if name != "__metadata__"
    }
    refs = dict(sorted(refs.items(), key=lambda item: (item[1].start, item[1].stop)))
    _check_contiguous(path, refs, begin, size)
    return refs


def _entries(path: Path, raw: bytes) -> dict[str, Any]:
    if raw[:1] != b"{":
        raise RefusedError(
            f"{path.name} has a header that is no JSON object; it is not safetensors"
        )
    try:
        data = json.loads(raw.decode("utf-8"), object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as error:
        raise RefusedError(f"{path.name} has a header that is not sound JSON: {error}") from error
    meta = data.get("__metadata__", {})
    if not isinstance(meta, dict) or not all(isinstance(v, str) for v in meta.values()):
        raise RefusedError(f"{path.name} has a __metadata__ that is not a table of strings")
    return dict(data)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _tensor(path: Path, name: str, entry: Any, begin: int) -> TensorRef:
    where = f"{path.name}: tensor {name!r:.200}"
    if not name.isprintable() or not 0 < len(name) <= MAX_NAME:
        raise RefusedError(f"{where} needs a printable name of at most {MAX_NAME} characters")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise RefusedError(f"{where} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise RefusedError(f"{where} has the dtype {dtype!r:.80}; known: {', '.join(DTYPES)}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(map(_is_count, shape)):
        raise RefusedError(
            f"{where} has the shape {shape!r:.80}; up to {MAX_DIMS} sizes are needed"
        )
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise RefusedError(f"{where} has the data_offsets {offsets!r:.80}; two are needed")
    n_bytes = math.prod(shape) * DTYPES[dtype]
    if offsets[1] - offsets[0] != n_bytes:
        raise RefusedError(
            f"{where} has {offsets[1] - offsets[0]} bytes; {dtype} {shape!r:.80} needs {n_bytes}"
        )
    if dtype.startswith("F8"):
        raise UnsupportedError(
            f"{where} is {dtype}: already quantized; use the original BF16, F16 or F32 checkpoint"
        )
    return TensorRef(dtype, tuple(shape), path, begin + offsets[0], begin + offsets[1])


def _check_contiguous(path: Path, refs: dict[str, TensorRef], begin: int, size: int) -> None:
    at = begin
    for name, ref in refs.items():
        if ref.start != at:
            what = "overlaps the tensor before it" if ref.start < at else "leaves a hole before it"
            raise RefusedError(f"{path.name}: tensor {name!r:.200} {what}; download it again")
        at = ref.stop
    if at != size:
        raise RefusedError(
            f"{path.name} has {size} bytes and its tensors end at {at}; download it again"
        )
