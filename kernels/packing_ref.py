"""Residuals in 2, 4, 8 or 16 bits each, in numpy: the definition that the compiled code must equal.

A stream takes the narrowest width whose window holds all but one in 512 of its residuals; those
outside are patched afterwards. Digits that share a byte are far apart in the stream (byte ``j`` of
``m`` holds residuals ``j``, ``j + m``, ...), so that packing is plain loops over bytes.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from edgekit.errors import RefusedError
from edgekit.kernels.ggml import ByteArray

I16Array = npt.NDArray[np.int16]
U16Array = npt.NDArray[np.uint16]

# Width in bits -> smallest residual of its window. Residuals are folded so that, in a one-bit
# step, +2 happens and -2 does not.
WINDOWS = {2: -1, 4: -8, 8: -128, 16: -32768}
PATCHED_SHARE = 512
FARTHEST = 0xFFFF  # the largest gap between patches; a patch that changes nothing bridges more


class Packed(NamedTuple):
    """A packed stream of ``n_residuals`` residuals.

    Attributes:
        width: 2, 4, 8 or 16 bits per residual.
        digits: uint8 ``[digit_bytes(width, n_residuals)]``.
        gaps: uint16, residuals between a patch and the one before it.
        values: int16, what the patches put there.
    """

    width: int
    n_residuals: int
    digits: ByteArray
    gaps: U16Array
    values: I16Array


class Level(NamedTuple):
    """A level as it is stored, but for zstd: `nested_ref.Parts` with the streams packed."""

    limits: npt.NDArray[np.uint32]
    streams: list[Packed]
    rest: ByteArray


def digit_bytes(width: int, count: int) -> int:
    """Count the bytes that ``count`` digits of ``width`` bits take."""
    return -(-count * width // 8)


def choose_width(residuals: I16Array) -> int:
    """Choose the narrowest width that leaves at most one residual in 512 to patches."""
    for width in (2, 4, 8):
        if PATCHED_SHARE * int(_outside(residuals, width).sum()) <= len(residuals):
            return width
    return 16


def pack(residuals: I16Array, width: int) -> Packed:
    """Pack residuals, int16 ``[count]``, into digits of ``width`` bits."""
    count = len(residuals)
    if width == 16:
        planes = residuals.astype("<i2").view(np.uint8).reshape(-1, 2).T.reshape(-1)
        return Packed(16, count, planes, np.zeros(0, np.uint16), np.zeros(0, np.int16))
    outside = _outside(residuals, width)
    per_byte, low = 8 // width, WINDOWS[width]
    digits = np.full(digit_bytes(width, count) * per_byte, -low, np.uint8)
    digits[:count] = np.where(outside, 0, residuals) - low
    shifted = digits.reshape(per_byte, -1) << (np.arange(per_byte, dtype=np.uint8)[:, None] * width)
    gaps, at = _gaps(np.flatnonzero(outside))
    return Packed(width, count, np.bitwise_or.reduce(shifted, axis=0), gaps, residuals[at])


def unpack(packed: Packed) -> I16Array:
    """Give the residuals back, int16 ``[count]``.

    Raises:
        RefusedError: A patch lies outside the stream.
    """
    if packed.width == 16:
        planes = packed.digits.reshape(2, -1).T
        return np.ascontiguousarray(planes).view("<i2").reshape(-1).astype(np.int16)
    shifts = np.arange(8 // packed.width, dtype=np.uint8)[:, None] * packed.width
    digits = (packed.digits >> shifts) & ((1 << packed.width) - 1)
    residuals = digits.reshape(-1)[: packed.n_residuals].astype(np.int16) + np.int16(
        WINDOWS[packed.width]
    )
    at = np.cumsum(packed.gaps.astype(np.int64) + 1) - 1
    if len(at) and at[-1] >= packed.n_residuals:
        raise RefusedError(
            f"a level patches residual {at[-1]} of a stream of {packed.n_residuals}; it is corrupt"
        )
    residuals[at] = packed.values
    return residuals


def _outside(residuals: I16Array, width: int) -> npt.NDArray[np.bool_]:
    low = WINDOWS[width]
    return (residuals < low) | (residuals >= low + (1 << width))


def _gaps(positions: npt.NDArray[np.intp]) -> tuple[U16Array, npt.NDArray[np.intp]]:
    gaps: list[int] = []
    at: list[int] = []
    next_free = 0
    for position in positions.tolist():
        while position - next_free > FARTHEST:
            gaps.append(FARTHEST)
            at.append(next_free + FARTHEST)
            next_free = at[-1] + 1
        gaps.append(position - next_free)
        at.append(position)
        next_free = position + 1
    return np.array(gaps, np.uint16), np.array(at, np.intp)
