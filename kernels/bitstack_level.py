"""One level of the `bitstack` codec: signs times a product of small factors, as bytes and back.

A level adds ``sign * (u @ v)`` to a matrix, its columns taken in groups that each have factors of
their own: ``u`` has ``rank`` columns per group, ``v`` has ``rank`` rows. After "BitStack:
Fine-Grained Size Control for Compressed Large Language Models in Variable Memory Environments",
arXiv 2410.23918, section 2.

The bytes, integers little-endian, ``g = ceil(cols / group)``:

    u8          1, the format
    u8          kind of the factors: 0 float16, 1 int8 with a float16 scale per row and column
    u16         rank
    u32         group, columns that share a column of u; cols where there is one group
    f32         gain, a power of two, a factor of all
    u32         0
    f16 [cols], f16 [rows]                scales of v and of u, with kind 1 only
    f16 or i8   v [rank, cols], then u [rows, g * rank]
    u8          signs [rows, ceil(cols / 8)], column j in bit j % 8 of byte j // 8, set for plus
"""

import math
import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgekit.errors import RefusedError
from edgekit.kernels.ggml import ByteArray, F32Array

FORMAT = 1
MAX_RANK = 256
LARGEST = float(np.finfo(np.float32).max)
_HEAD = struct.Struct("<BBHIfI")
_DTYPES = (np.dtype("<f2"), np.dtype("i1"))
F16, I8 = range(2)  # kinds of factors


@dataclass(frozen=True, eq=False)
class Level:
    """One level of a matrix ``[rows, cols]``, or of some of its rows; arrays may be views.

    Attributes:
        rank: Columns of ``u`` per group.
        group: Columns of the matrix that share them.
        gain: Factor of everything, a power of two: it keeps float16 in its range.
        v: float16 or int8 ``[rank, cols]``.
        u: The same type, ``[rows, groups * rank]``.
        v_scale: float16 ``[cols]``; ``None`` with float16 factors.
        u_scale: float16 ``[rows]``; the same.
        signs: uint8 ``[rows, ceil(cols / 8)]``.
    """

    rank: int
    group: int
    gain: float
    v: npt.NDArray[np.generic]
    u: npt.NDArray[np.generic]
    v_scale: npt.NDArray[np.float16] | None
    u_scale: npt.NDArray[np.float16] | None
    signs: ByteArray

    @property
    def cols(self) -> int:
        """Columns of the matrix."""
        return int(self.v.shape[1])

    def rows(self, start: int, stop: int) -> "Level":
        """Rows ``[start, stop)``; nothing is copied."""
        scale = None if self.u_scale is None else self.u_scale[start:stop]
        u, signs = self.u[start:stop], self.signs[start:stop]
        return Level(self.rank, self.group, self.gain, self.v, u, self.v_scale, scale, signs)

    def left(self) -> F32Array:
        """``u`` with scale and gain, float32 ``[rows, groups * rank]``."""
        scaled = _scaled(self.u, None if self.u_scale is None else self.u_scale[:, None])
        return scaled * np.float32(self.gain)

    def right(self) -> F32Array:
        """``v`` with its scale, float32 ``[rank, cols]``."""
        return _scaled(self.v, self.v_scale)


def _scaled(values: npt.NDArray[np.generic], scale: npt.NDArray[np.float16] | None) -> F32Array:
    wide = values.astype(np.float32)
    return wide if scale is None else wide * scale.astype(np.float32)


def n_bytes(rows: int, cols: int, kind: int, rank: int, group: int) -> int:
    """Count the bytes of a level."""
    factors = rank * (cols + rows * math.ceil(cols / group)) * _DTYPES[kind].itemsize
    scales = 2 * (rows + cols) if kind == I8 else 0
    return _HEAD.size + scales + factors + rows * math.ceil(cols / 8)


def to_bytes(level: Level) -> bytes:
    """Write a level as the head of this file tells."""
    kind = F16 if level.u_scale is None else I8
    head = _HEAD.pack(FORMAT, kind, level.rank, level.group, level.gain, 0)
    arrays = (level.v_scale, level.u_scale, level.v, level.u, level.signs)
    return head + b"".join(array.tobytes() for array in arrays if array is not None)


def from_bytes(data: bytes | memoryview, rows: int, cols: int) -> Level:
    """Read the level of a matrix ``[rows, cols]``; its arrays are views of ``data``.

    Raises:
        RefusedError: The header is not one of this format, or does not add up to the bytes; a
            factor or scale is not finite, or so large that weights could not be.
    """
    head = _HEAD.unpack_from(data) if len(data) >= _HEAD.size else (0,) * 6
    fmt, kind, rank, group, gain, zero = head
    if (
        (fmt, zero) != (FORMAT, 0)
        or kind > I8
        or not 1 <= rank <= MAX_RANK
        or not 1 <= group <= cols
        or not (math.isfinite(gain) and gain > 0)
        or n_bytes(rows, cols, kind, rank, group) != len(data)
    ):
        raise RefusedError(
            f"a bitstack level of {len(data)} bytes has a header that does not fit its "
            f"{rows} x {cols} weights; it is corrupt"
        )
    at = _HEAD.size

    def take(dtype: np.dtype[np.generic], *shape: int) -> npt.NDArray[np.generic]:
        nonlocal at
        count = math.prod(shape)
        array = np.frombuffer(data, dtype, count, at).reshape(shape)
        at += count * dtype.itemsize
        return array

    half, dtype, groups = np.dtype("<f2"), _DTYPES[kind], math.ceil(cols / group)
    v_scale = take(half, cols) if kind == I8 else None
    u_scale = take(half, rows) if kind == I8 else None
    v, u = take(dtype, rank, cols), take(dtype, rows, groups * rank)
    signs = take(np.dtype("u1"), rows, math.ceil(cols / 8))
    left, right = gain * _largest(u, u_scale), rank * _largest(v, v_scale)
    if not (left <= LARGEST and right <= LARGEST and left * right <= LARGEST):  # NaN is not
        raise RefusedError(
            "a bitstack level has factors that are no finite numbers or too large for its "
            f"{rows} x {cols} weights; it is corrupt"
        )
    return Level(rank, group, gain, v, u, v_scale, u_scale, signs)  # type: ignore[arg-type]


def _largest(values: npt.NDArray[np.generic], scale: npt.NDArray[np.generic] | None) -> float:
    """What no value with its scale exceeds in size; NaN where one is none."""
    if scale is None:
        return float(np.abs(values).max())
    return 128 * float(np.abs(scale).max())


def pack_signs(values: F32Array) -> ByteArray:
    """The signs of ``[rows, cols]``, plus for zero, uint8 ``[rows, ceil(cols / 8)]``."""
    return np.packbits(values >= 0, axis=1, bitorder="little")


def unpack_signs(signs: ByteArray, cols: int) -> npt.NDArray[np.bool_]:
    """Where the sign is plus, bool ``[rows, cols]``."""
    return np.unpackbits(signs, axis=1, count=cols, bitorder="little").view(bool)
