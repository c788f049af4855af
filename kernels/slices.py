"""Nested symmetric codes: the compiled code where there is some, else the reference."""

import numpy as np

from edgekit.kernels import slices_ref
from edgekit.kernels.native import native
from edgekit.kernels.slices_ref import F32Array, Slices

__all__ = ["BLOCKS", "F32Array", "Slices", "encode", "plain"]

BLOCKS = (32, 64, 128)  # weights that share a scale: those that ONNX Runtime has 2-bit kernels for


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
