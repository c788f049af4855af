"""Nested symmetric codes in numpy: the definition that the compiled code must equal.

A master code ``q8`` holds the codes of the lower depths in its leading bits, rounded, not cut:
``q4 = (q8 + 8) >> 4`` and ``q2 = (q4 + 2) >> 2``. The residuals ``q8 - 16*q4`` and ``q4 - 4*q2``
fit four and two bits if ``q8`` stays in -128..87, or in -128..119 where no depth is below four
bits. A depth's weights are its codes times a scale per block and depth.

Codes are chosen jointly, as MatGPTQ does (arXiv:2602.03537): over all legal master codes, the least
sum of the weighted square errors at all depths. Departures: errors are weighted by the importance
of columns, and the scale of depth 8 is searched together with its sign, so that nothing clips: the
side of a block that reaches further gets the longer side of the range.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

F32Array = npt.NDArray[np.float32]
I8Array = npt.NDArray[np.int8]

LANES = 16  # sums run over that many columns side by side: the order is part of the definition
# Of the smallest scale at which nothing clips; below it one weight of the block clips a little
FACTORS = np.array([0.99, 1.0, 1.01, 1.02, 1.035, 1.05], np.float32)
# Of the square errors at 8, 4 and 2 bits, in units of a depth's own step
SHARES = np.array([1.0, 1.0 / 16**2, 1.0 / 64**2], np.float32)
ROUNDS = 2  # codes for given scales, then scales for given codes
LOWEST = -128
TINY = np.float32(1e-30)


class Slices(NamedTuple):
    """Codes and scales of blocks.

    Attributes:
        codes: Master codes, int8 ``[blocks, size]``.
        scales: float32 ``[3, blocks]``, of depths 8, 4 and 2; float16 holds them exactly.
    """

    codes: I8Array
    scales: F32Array


def highest(low_bits: int) -> int:
    """The largest master code whose residuals fit, for a lowest depth of 2 or 4 bits."""
    return 87 if low_bits == 2 else 119


def candidates(weights: F32Array, low_bits: int) -> F32Array:
    """Scales to try for depth 8, float32 ``[2 * len(FACTORS), blocks]``; 0 in a block of zeros."""
    positive, negative = weights.max(1).clip(0), (-weights.min(1)).clip(0)
    up, down = np.float32(highest(low_bits) + 0.5), np.float32(0.5 - LOWEST)
    plus = np.maximum(positive / up, negative / down)
    minus = -np.maximum(negative / up, positive / down)
    found = np.concatenate([FACTORS[:, None] * plus, FACTORS[:, None] * minus])
    return found.astype(np.float16).astype(np.float32)


def encode(weights: F32Array, importance: F32Array, low_bits: int) -> Slices:
    """Choose scales and codes.

    Args:
        weights: float32 ``[blocks, size]``, ``size`` a multiple of 16, finite.
        importance: float32 ``[blocks, size]``, above 0.
        low_bits: 2 or 4, the lowest depth.
    """
    scales = candidates(weights, low_bits)
    costs = np.stack([_cost(weights, importance, scale, low_bits) for scale in scales])
    scale8 = np.take_along_axis(scales, costs.argmin(0)[None], 0)[0]
    codes = nearest(weights, scale8, low_bits)
    for _ in range(ROUNDS):
        scale4, scale2 = refitted(weights, importance, codes)
        codes = joint(weights, (scale8, scale4, scale2), low_bits)
    rest = [s.astype(np.float16).astype(np.float32) for s in refitted(weights, importance, codes)]
    return Slices(codes.astype(np.int8), np.stack([scale8, *rest]))


def nearest(weights: F32Array, scale: F32Array, low_bits: int) -> F32Array:
    """Codes of depth 8 alone: float32 whole numbers ``[blocks, size]``."""
    inverse = np.where(scale == 0, np.float32(0), np.float32(1) / np.where(scale == 0, 1, scale))
    codes = np.rint(weights * inverse[:, None].astype(np.float32))
    return codes.clip(LOWEST, highest(low_bits)).astype(np.float32)


def sliced(codes: npt.NDArray[np.generic]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """The codes of depths 4 and 2 within master codes."""
    four = (codes.astype(np.int32) + 8) >> 4
    return four, (four + 2) >> 2


def refitted(
    weights: F32Array, importance: F32Array, codes: npt.NDArray[np.generic]
) -> tuple[F32Array, F32Array]:
    """Scales of depths 4 and 2 with the least weighted square error for these codes."""
    found = []
    for code in sliced(codes):
        q = code.astype(np.float32)
        weighted = importance * q
        found.append(total(weighted * weights) / np.maximum(total(weighted * q), TINY))
    return found[0], found[1]


def joint(
    weights: F32Array, scales: tuple[F32Array, F32Array, F32Array], low_bits: int
) -> F32Array:
    """The legal master codes with the least joint error, for given scales of all depths.

    All codes with one ``q4`` share their errors at depths 4 and 2, so the best of them is the one
    nearest at depth 8: one candidate for each ``q4`` tries all codes.
    """
    s8, s4, s2 = (scale[:, None] for scale in scales)
    inverse = np.where(s8 == 0, np.float32(0), np.float32(1) / np.where(s8 == 0, 1, s8))
    exact = np.rint(weights * inverse.astype(np.float32))
    best = np.full(weights.shape, np.inf, np.float32)
    codes = np.zeros(weights.shape, np.float32)
    top = highest(low_bits)
    for cell in range(LOWEST >> 4, (top + 8 >> 4) + 1):
        low, high = max(16 * cell - 8, LOWEST), min(16 * cell + 7, top)
        code = exact.clip(low, high)
        cost = SHARES[0] * _square(weights - s8 * code)
        cost = cost + SHARES[1] * _square(weights - s4 * np.float32(cell))
        if low_bits == 2:
            cost = cost + SHARES[2] * _square(weights - s2 * np.float32(cell + 2 >> 2))
        closer = cost < best
        best, codes = np.where(closer, cost, best), np.where(closer, code, codes)
    return codes


def _cost(weights: F32Array, importance: F32Array, scale: F32Array, low_bits: int) -> F32Array:
    """Joint error of a scale with the nearest codes and refitted lower scales, per block."""
    codes = nearest(weights, scale, low_bits)
    cost = SHARES[0] * total(importance * _square(weights - scale[:, None] * codes))
    energy = total(importance * _square(weights))
    for share, code in zip(SHARES[1:], sliced(codes), strict=True):
        q = code.astype(np.float32)
        weighted = importance * q
        along, length = total(weighted * weights), total(weighted * q)
        if share != SHARES[2] or low_bits == 2:
            cost = cost + share * (energy - along * along / np.maximum(length, TINY))
    return cost


def _square(x: F32Array) -> F32Array:
    return x * x


def total(values: F32Array) -> F32Array:
    """Sums over the columns in the order that `LANES` gives."""
    lanes = np.zeros((len(values), LANES), np.float32)
    for at in range(0, values.shape[1], LANES):
        lanes = lanes + values[:, at : at + LANES]
    sums = lanes[:, 0]
    for lane in range(1, LANES):
        sums = sums + lanes[:, lane]
    return sums
