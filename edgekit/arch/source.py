"""A tensor of a checkpoint in llama.cpp's row order and type, read some rows at a time."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.checkpoint import Checkpoint

ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4}


@dataclass(frozen=True)
class Piece:
    """Rows ``[first, first + n_rows)`` of a checkpoint's tensor, seen as a matrix."""

    tensor: str
    first: int
    n_rows: int


@dataclass(frozen=True, eq=False)
class SourceTensor:
    """One tensor of the GGUF at tier ``source``.

    Attributes:
        name: GGUF name.
        shape: In numpy order; experts come first, ``(experts, rows, cols)``.
        source_type: ggml type: BF16, F16 or F32. 1-D tensors, norms and routers are F32.
        quantizable: llama-quantize would quantize it.
        pieces: Where its rows come from, in order.
        heads: Not 0: the two halves of each of that many heads are interleaved row by row.
        shift: Added to every value.
        constant: The values, for a tensor that follows from the config alone.
    """

    name: str
    shape: tuple[int, ...]
    source_type: str
    quantizable: bool
    checkpoint: Checkpoint = field(repr=False)
    pieces: tuple[Piece, ...] = ()
    heads: int = 0
    shift: float = 0.0
    constant: npt.NDArray[np.float32] | None = field(default=None, repr=False)

    @property
    def cols(self) -> int:
        """Values in a row."""
        return self.shape[-1]

    @property
    def n_rows(self) -> int:
        """Rows over all experts; a 1-D tensor is one row."""
        return math.prod(self.shape[:-1])

    @property
    def n_weights(self) -> int:
        """Values in the tensor."""
        return math.prod(self.shape)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row at tier source."""
        return self.cols * ITEM_BYTES[self.source_type]

    def rows(self, start: int = 0, stop: int | None = None) -> npt.NDArray[np.uint8]:
        """Rows ``[start, stop)``, reading only those from the mapped checkpoint.

        Returns:
            uint8 ``[stop - start, row_bytes]``, to be read only: little-endian values of
            ``source_type`` in the GGUF's row order, experts one after another. BF16, F16 and F32
            bits are unchanged unless the tensor is widened or shifted.
        """
        stop = self.n_rows if stop is None else stop
        if not 0 <= start <= stop <= self.n_rows:
            raise IndexError(f"'{self.name}' has {self.n_rows} rows, not [{start}, {stop})")
        if self.constant is not None:
            return _raw(self.constant.reshape(self.n_rows, self.cols)[start:stop])
        parts = [_raw(self._values(*part)) for part in self._overlap(start, stop)]
        if not parts:
            return np.zeros((0, self.row_bytes), np.uint8)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _overlap(self, start: int, stop: int) -> Iterator[tuple[Piece, int, int]]:
        """Pieces that hold rows ``[start, stop)``, each with the range inside it."""
        at = 0
        for piece in self.pieces:
            low, high = max(start - at, 0), min(stop - at, piece.n_rows)
            if low < high:
                yield piece, low, high
            at += piece.n_rows

    def _values(self, piece: Piece, low: int, high: int) -> npt.NDArray[Any]:
        """Rows of a piece as an array of ``source_type`` (uint16 for BF16), ``[n, cols]``."""
        read = self.checkpoint.read
        if not self.heads:
            got = read(piece.tensor, slice(piece.first + low, piece.first + high))
        elif len(self.shape) == 1:
            got = read(piece.tensor)[interleaved(self.heads, self.cols)][None]
        else:
            order = interleaved(self.heads, piece.n_rows)[low:high]
            got = read(piece.tensor)[order]
        is_bf16 = self.checkpoint.tensors[piece.tensor].dtype == "BF16"
        if self.source_type == "F32":
            got = widened(got, is_bf16)
        return got + np.float32(self.shift) if self.shift else got


def interleaved(heads: int, n_rows: int) -> npt.NDArray[np.intp]:
    """Row order of Q or K for a graph that rotates neighbouring rows.

    Hugging Face pairs row ``i`` of a head with row ``i + half``; the result lists ``0, half, 1,
    half + 1, ...`` for each head.
    """
    order: npt.NDArray[np.intp] = np.arange(n_rows, dtype=np.intp).reshape(heads, 2, -1)
    return order.swapaxes(1, 2).reshape(-1)


def widened(values: npt.NDArray[Any], is_bf16: bool) -> npt.NDArray[np.float32]:
    """Values as float32, exactly; BF16 comes as uint16 bits."""
    if not is_bf16:
        return values.astype(np.float32, copy=False)
    wide: npt.NDArray[np.uint32] = values.astype(np.uint32) << np.uint32(16)
    return wide.view(np.float32)


def _raw(values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """The bytes of ``[n, cols]`` as uint8 ``[n, row bytes]``; copies only what is unaligned."""
    aligned = np.require(values, requirements=["C", "A"])
    return aligned.view(np.uint8).reshape(len(values), -1)
