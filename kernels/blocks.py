"""Where the codes and scales sit in the blocks of ggml's stock types, as data, with numpy readers.

A block holds codes in bit planes and, in the bytes between, scales. Weight ``i`` is
``scale * code + offset`` with the scale and offset of its group of 16. The layouts are those of
ggml's `ggml-common.h`; the tests hold them to what ggml itself writes and reads.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from edgekit.kernels.ggml import TYPES, ByteArray, F32Array

GROUP = 16  # weights that share a scale and an offset, in the finest type; coarser ones repeat
Scales = tuple[F32Array, F32Array]


@dataclass(frozen=True)
class Plane:
    """``bits`` of every code, at ``offset`` in the block, shifted left by ``shift`` in the code.

    Bytes come in runs of ``run``; a run holds the weights ``0 .. run - 1`` in its low bits, the
    next ``run`` weights in the bits above, until its bytes are full.
    """

    offset: int
    bits: int
    run: int
    shift: int = 0


@dataclass(frozen=True)
class Layout:
    """A type whose weights are integer codes times a scale plus an offset.

    Attributes:
        name: A key of `ggml.TYPES`.
        bits: Bits of a code.
        flip: Bits to invert in a stored code before ``low`` is added (two's complement: 0x80).
        low: The value of the smallest code; the largest is ``low + 2**bits - 1``.
        planes: Where the bits of the codes are.
        read_scales: Blocks uint8 ``[n, block_bytes]`` to scale and offset, float32
            ``[n, groups]``; in float32 with one rounding per operation, as everywhere here.
    """

    name: str
    bits: int
    low: int
    planes: tuple[Plane, ...]
    read_scales: Callable[[ByteArray], Scales]
    flip: int = 0

    @property
    def block(self) -> int:
        """Weights in a block."""
        return TYPES[self.name].block

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        return TYPES[self.name].block_bytes

    @cached_property
    def scale_index(self) -> npt.NDArray[np.intp]:
        """Positions in a block of the bytes that are no codes, ascending."""
        is_scale = np.ones(self.block_bytes, bool)
        for plane in self.planes:
            is_scale[plane.offset : plane.offset + self.block * plane.bits // 8] = False
        return np.flatnonzero(is_scale)

    def codes(self, blocks: ByteArray) -> npt.NDArray[np.int16]:
        """Read the codes of blocks ``[n, block_bytes]`` as their values, int16 ``[n, block]``."""
        code = np.zeros((len(blocks), self.block), np.uint8)
        for plane in self.planes:
            byte, shift = self._places(plane)
            code |= ((blocks[:, byte] >> shift) & ((1 << plane.bits) - 1)) << plane.shift
        return (code ^ self.flip).astype(np.int16) + np.int16(self.low)

    def put_codes(self, codes: npt.NDArray[np.int16], blocks: ByteArray) -> None:
        """Write code values ``[n, block]`` into ``blocks`` ``[n, block_bytes]``, zero before."""
        code = (codes - self.low).astype(np.uint8) ^ np.uint8(self.flip)
        for plane in self.planes:
            byte, shift = self._places(plane)
            part = ((code >> plane.shift) & ((1 << plane.bits) - 1)) << shift
            for first in range(0, self.block, plane.run):  # a run never meets a byte twice
                at = slice(first, first + plane.run)
                blocks[:, byte[at]] |= part[:, at]

    def scales(self, blocks: ByteArray) -> Scales:
        """Read scale and offset of every group, float32 ``[n, groups]`` each; NaN where stored."""
        with np.errstate(invalid="ignore"):  # infinity times 0, in blocks nobody meant
            return self.read_scales(blocks)

    def _places(self, plane: Plane) -> tuple[npt.NDArray[np.intp], ByteArray]:
        i = np.arange(self.block)
        per_byte = 8 // plane.bits
        byte = plane.offset + i // (plane.run * per_byte) * plane.run + i % plane.run
        return byte, (i // plane.run % per_byte * plane.bits).astype(np.uint8)


def _half(blocks: ByteArray, at: int) -> F32Array:
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _one_scale(blocks: ByteArray) -> Scales:
    scale = np.repeat(_half(blocks, 0), 2, axis=1)
    return scale, np.zeros_like(scale)


def _scale_and_offset(blocks: ByteArray) -> Scales:
    return np.repeat(_half(blocks, 0), 2, axis=1), np.repeat(_half(blocks, 2), 2, axis=1)


def _q2_k_scales(blocks: ByteArray) -> Scales:
    packed = blocks[:, :16]
    scale = _half(blocks, 80) * (packed & 15).astype(np.float32)
    return scale, -(_half(blocks, 82) * (packed >> 4).astype(np.float32))


def _q3_k_scales(blocks: ByteArray) -> Scales:
    packed = blocks[:, 96:108]
    low = np.concatenate([packed[:, :8] & 15, packed[:, :8] >> 4], axis=1)
    high = np.concatenate([packed[:, 8:] >> shift & 3 for shift in (0, 2, 4, 6)], axis=1)
    scale = _half(blocks, 108) * ((low | high << 4).astype(np.float32) - np.float32(32))
    return scale, np.zeros_like(scale)


def _q4_k_scales(blocks: ByteArray) -> Scales:
    """Eight scales and eight minima of 6 bits in 12 bytes; also those of Q5_K."""
    a, b, c = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scale = np.concatenate([a & 63, (c & 15) | a >> 6 << 4], axis=1).astype(np.float32)
    minimum = np.concatenate([b & 63, c >> 4 | b >> 6 << 4], axis=1).astype(np.float32)
    scale, offset = _half(blocks, 0) * scale, -(_half(blocks, 2) * minimum)
    return np.repeat(scale, 2, axis=1), np.repeat(offset, 2, axis=1)


def _q6_k_scales(blocks: ByteArray) -> Scales:
    scale = _half(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    return scale, np.zeros_like(scale)


LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout("Q4_0", 4, -8, (Plane(2, 4, 16),), _one_scale),
        Layout("Q4_1", 4, 0, (Plane(4, 4, 16),), _scale_and_offset),
        Layout("Q5_0", 5, -16, (Plane(6, 4, 16), Plane(2, 1, 1, 4)), _one_scale),
        Layout("Q5_1", 5, 0, (Plane(8, 4, 16), Plane(4, 1, 1, 4)), _scale_and_offset),
        Layout("Q8_0", 8, -128, (Plane(2, 8, 32),), _one_scale, flip=0x80),
        Layout("Q2_K", 2, 0, (Plane(16, 2, 32),), _q2_k_scales),
        Layout("Q3_K", 3, -4, (Plane(32, 2, 32), Plane(0, 1, 32, 2)), _q3_k_scales),
        Layout("Q4_K", 4, 0, (Plane(16, 4, 32),), _q4_k_scales),
        Layout("Q5_K", 5, 0, (Plane(48, 4, 32), Plane(16, 1, 32, 4)), _q4_k_scales),
        Layout("Q6_K", 6, -32, (Plane(0, 4, 64), Plane(128, 2, 32, 4)), _q6_k_scales),
    )
}


def weights(type_name: str, blocks: ByteArray) -> F32Array:
    """Turn blocks of a type in `LAYOUTS` into weights, the same float32 bits on every machine.

    ggml's own ``to_float`` may fuse the multiplication and the addition.

    Args:
        type_name: A key of `LAYOUTS`.
        blocks: uint8, whole blocks.

    Returns:
        float32 ``[n_weights]``, flat.
    """
    layout = LAYOUTS[type_name]
    rows = np.ascontiguousarray(blocks).reshape(-1, layout.block_bytes)
    scale, offset = (np.repeat(part, GROUP, axis=1) for part in layout.scales(rows))
    return (layout.codes(rows).astype(np.float32) * scale + offset).reshape(-1)
