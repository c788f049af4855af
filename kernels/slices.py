"""Nested symmetric codes: the compiled code where there is some, else the reference."""

import numpy as np
import numpy.typing as npt

from edgekit.kernels import slices_ref
from edgekit.kernels.native import native
from edgekit.kernels.slices_ref import F32Array, Slices

__all__ = [
    "BLOCKS",
    "F32Array",
    "Slices",
    "compared",
    "dedicated",
    "dequantized",
    "encode",
    "plain",
]

BLOCKS = (32, 64, 128)  # weights that share a scale: those that ONNX Runtime has 2-bit kernels for
# Of the scale at which the largest weight just fits: few bits gain by clipping some weights
DEDICATED_FACTORS = {
    2: np.linspace(0.4, 1.2, 17),
    4: np.linspace(0.7, 1.1, 9),
    8: np.linspace(0.99, 1.01, 3),
}


def encode(weights: F32Array, importance: F32Array, low_bits: int) -> Slices:
    """Choose scales and master codes; see `edgekit.kernels.slices_ref.encode`."""
    compiled = native()
    if compiled is None or not len(weights):
        return slices_ref.encode(weights, importance, low_bits)
    tries = slices_ref.candidates(weights, low_bits)
    codes, scales = compiled.slices(weights, importance, tries, low_bits)
    rounded = scales.astype(np.float16).astype(np.float32)
    return Slices(codes, rounded)


def plain(weights: F32Array, low_bits: int) -> Slices:
    """What joint choice is measured against: 8-bit codes by rounding, cut to their leading bits.

    The sign of a scale is the one with the finer step, and scales are 16 and 64 times as large.
    """
    tries = slices_ref.candidates(weights, low_bits)
    plus, minus = tries[1], tries[1 + len(slices_ref.FACTORS)]
    scale = np.where(plus <= -minus, plus, minus)
    codes = slices_ref.nearest(weights, scale, low_bits).astype(np.int8)
    return Slices(codes, np.stack([scale, 16 * scale, 64 * scale]).astype(np.float32))


def dequantized(found: Slices) -> dict[int, F32Array]:
    """The weights of depths 2, 4 and 8, float32 ``[blocks, size]``."""
    four, two = slices_ref.sliced(found.codes)
    codes = {8: found.codes.astype(np.int32), 4: four, 2: two}
    return {
        depth: (scale[:, None] * codes[depth].astype(np.float32)).astype(np.float32)
        for depth, scale in zip((8, 4, 2), found.scales, strict=True)
    }


def dedicated(weights: F32Array, importance: F32Array, bits: int) -> F32Array:
    """Weights rounded for one depth alone."""
    codes, scale = dedicated_codes(weights, importance, bits)
    return scale[:, None] * codes


def dedicated_codes(
    weights: F32Array, importance: F32Array, bits: int
) -> tuple[F32Array, F32Array]:
    """Symmetric codes for one depth alone and their scales, which are searched with their sign."""
    low, high = -(1 << bits - 1), (1 << bits - 1) - 1
    reach = np.abs(weights).max(1) / np.float32(-low)
    best, scales = np.zeros_like(weights), np.zeros(len(weights), np.float32)
    least = np.full(len(weights), np.inf)
    for factor in (f * sign for f in DEDICATED_FACTORS[bits] for sign in (1, -1)):
        scale = (reach * np.float32(factor))[:, None]
        codes = np.rint(weights / np.where(scale == 0, 1, scale)).clip(low, high)
        along = (importance * weights * codes).sum(1)
        length = (importance * codes * codes).sum(1)
        fitted = (along / np.maximum(length, 1e-30)).astype(np.float32)
        error = (importance * (weights - fitted[:, None] * codes) ** 2).sum(1)
        closer = error < least
        least = np.where(closer, error, least)
        best = np.where(closer[:, None], codes, best).astype(np.float32)
        scales = np.where(closer, fitted, scales).astype(np.float32)
    return best, scales


def compared(weights: F32Array, importance: F32Array, found: Slices) -> npt.NDArray[np.float64]:
    """Weighted square errors ``[nested or dedicated, depth 2, 4 or 8]``, of all blocks together."""
    nested = dequantized(found)

    def error(rounded: F32Array) -> float:
        return float((importance * (weights - rounded) ** 2).sum(dtype=np.float64))

    return np.array(
        [
            [error(nested[bits]) for bits in (2, 4, 8)],
            [error(dedicated(weights, importance, bits)) for bits in (2, 4, 8)],
        ]
    )
