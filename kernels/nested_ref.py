"""One level of the `nested` codec in numpy: the definition that the compiled code must equal.

A level says what a parent type does not already know about the child type of the same weights.
The child is predicted from the parent, and the residuals are dealt out to streams by what the
parent and the child's scales tell about their spread, so that each stream compresses well.

Every operation on floats is float32, rounded once, in the order written, and free of subnormal
results, so that all machines predict alike. Residuals are taken modulo the width of the child's
codes: whatever is predicted, NaN scales included, the child comes back exactly.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgekit.errors import RefusedError
from edgekit.kernels.blocks import GROUP, LAYOUTS, Layout
from edgekit.kernels.ggml import ByteArray, F32Array

I16Array = npt.NDArray[np.int16]
I32Array = npt.NDArray[np.int32]
U32Array = npt.NDArray[np.uint32]
BoolArray = npt.NDArray[np.bool_]

CODE_STREAMS = 8  # for a child with codes: 4 classes of the parent's step, 2 of the fraction
FLOAT_STREAMS = 9  # for a float child: -7..1, the octaves from the parent's step down to a weight
EXPONENT, MAGNITUDE, TINY = 0x7F800000, 0x7FFFFFFF, 27 << 23  # of float32; TINY is 2**-100


@dataclass(frozen=True)
class FloatKind:
    """How a float child's bits follow from float32 bits: shifted, with a different exponent."""

    bytes: int
    shift: int


FLOATS = {"BF16": FloatKind(2, 16), "F16": FloatKind(2, 13), "F32": FloatKind(4, 16)}


@dataclass(frozen=True)
class Parts:
    """What a level consists of before it is packed.

    Attributes:
        limits: uint32 ``[3]``, quartiles of the parent's step in child steps, as float32 bits
            without sign; zeros for a float child.
        streams: Residuals, int16, `CODE_STREAMS` or `FLOAT_STREAMS` of them, in weight order.
        rest: uint8, the child's bytes that are not predicted: of a child with codes its scale
            bytes, byte 0 of all blocks, then byte 1 and so on; of F32 the low 16 bits, likewise.
    """

    limits: U32Array
    streams: list[I16Array]
    rest: ByteArray


def n_streams(child_type: str) -> int:
    """Count the streams of a level that ends at ``child_type``."""
    return FLOAT_STREAMS if child_type in FLOATS else CODE_STREAMS


def split(parent_type: str, child_type: str, parent: ByteArray, child: ByteArray) -> Parts:
    """Take a child apart. Blocks are flat uint8; a parent without a `Layout` comes as F32."""
    if child_type in FLOATS:
        return _split_float(parent_type, child_type, parent, child)
    layout = LAYOUTS[child_type]
    blocks = child.reshape(-1, layout.block_bytes)
    rest = blocks[:, layout.scale_index].T
    step, start = _steps(parent_type, parent, layout, rest)
    limits = _quartiles(step)
    predicted, fold, stream = _predict(parent_type, parent, layout, step, start, limits)
    residual = layout.codes(blocks).reshape(-1) - predicted
    residual = _wrap(residual, layout.bits)
    residual = _wrap(_flip(residual, fold), 8)  # +128 is -128: residuals of codes fit in 8 bits
    return Parts(limits, _deal(residual, stream, CODE_STREAMS), rest.reshape(-1))


def join(parent_type: str, child_type: str, parent: ByteArray, parts: Parts, n: int) -> ByteArray:
    """Put the ``n`` weights of a child together: the inverse of `split`.

    Raises:
        RefusedError: The streams do not have the lengths that the parent asks for.
    """
    if child_type in FLOATS:
        return _join_float(parent_type, child_type, parent, parts, n)
    layout = LAYOUTS[child_type]
    rest = parts.rest.reshape(len(layout.scale_index), n // layout.block)
    step, start = _steps(parent_type, parent, layout, rest)
    predicted, fold, stream = _predict(parent_type, parent, layout, step, start, parts.limits)
    codes = predicted + _flip(_collect(parts.streams, stream), fold)
    codes = ((codes - layout.low) & ((1 << layout.bits) - 1)) + np.int16(layout.low)
    blocks = np.zeros((n // layout.block, layout.block_bytes), np.uint8)
    blocks[:, layout.scale_index] = rest.T
    layout.put_codes(codes.reshape(-1, layout.block), blocks)
    return blocks.reshape(-1)


def _values(parent_type: str, parent: ByteArray) -> tuple[F32Array, F32Array, F32Array]:
    """The parent as values ``[n]`` with scale and offset ``[groups]``: codes, or weights * 1."""
    if parent_type in LAYOUTS:
        layout = LAYOUTS[parent_type]
        blocks = parent.reshape(-1, layout.block_bytes)
        scale, offset = layout.scales(blocks)
        return layout.codes(blocks).reshape(-1).astype(np.float32), scale.ravel(), offset.ravel()
    bits = parent.view(np.uint32)
    exponent = bits & EXPONENT
    usable = (exponent >= TINY) & (exponent != EXPONENT)
    values = np.where(usable, bits, np.uint32(0)).view(np.float32)
    n_groups = -(-len(values) // GROUP)
    return values, np.ones(n_groups, np.float32), np.zeros(n_groups, np.float32)


def _steps(
    parent_type: str, parent: ByteArray, layout: Layout, rest: ByteArray
) -> tuple[F32Array, F32Array]:
    """Step and start ``[groups]``: child code = step * parent value + start; 0 if not finite."""
    blocks = np.zeros((rest.shape[1], layout.block_bytes), np.uint8)
    blocks[:, layout.scale_index] = rest.T
    scale, offset = (x.reshape(-1) for x in layout.scales(blocks))
    _, parent_scale, parent_offset = _values(parent_type, parent)
    with np.errstate(all="ignore"):
        inverse = np.float32(1) / scale
        step = parent_scale * inverse
        start = (parent_offset - offset) * inverse
        usable = np.isfinite(step) & np.isfinite(start)
    return np.where(usable, step, np.float32(0)), np.where(usable, start, np.float32(0))


def _quartiles(step: F32Array) -> U32Array:
    if not len(step):
        return np.zeros(3, np.uint32)
    size = np.sort((step.view(np.uint32) & MAGNITUDE)[:: -(-len(step) // 256)])
    return size[[len(size) // 4, len(size) // 2, len(size) * 3 // 4]]


def _predict(
    parent_type: str,
    parent: ByteArray,
    layout: Layout,
    step: F32Array,
    start: F32Array,
    limits: U32Array,
) -> tuple[I16Array, BoolArray, npt.NDArray[np.intp]]:
    """Predict codes ``[n]``; with them whether to flip the residual, and its stream."""
    values, _, _ = _values(parent_type, parent)
    with np.errstate(over="ignore"):
        exact = values.reshape(-1, GROUP) * step[:, None] + start[:, None]
    exact = np.clip(exact, layout.low, layout.low + (1 << layout.bits) - 1)
    rounded = np.rint(exact)
    fraction = exact - rounded
    size = step.view(np.uint32) & MAGNITUDE
    step_class = (size[:, None] > limits).sum(axis=1)
    stream = step_class[:, None] * 2 + (np.abs(fraction) >= 0.25)
    return rounded.astype(np.int16).reshape(-1), (fraction < 0).reshape(-1), stream.reshape(-1)


def _split_float(parent_type: str, child_type: str, parent: ByteArray, child: ByteArray) -> Parts:
    predicted, fold, stream = _predict_float(parent_type, child_type, parent)
    if child_type == "F32":
        low_high = (_ordered(child.view(np.int32)) - predicted).view(np.uint32)
        residual = ((low_high + np.uint32(0x8000)) >> 16).astype(np.uint16).view(np.int16)
        rest = low_high.astype("<u2").view(np.uint8).reshape(-1, 2).T.reshape(-1)
    else:
        child16 = _ordered(child.view(np.int16))
        residual, rest = child16 - predicted.astype(np.int16), np.zeros(0, np.uint8)
    streams = _deal(_flip(residual, fold), stream, FLOAT_STREAMS)
    return Parts(np.zeros(3, np.uint32), streams, rest)


def _join_float(
    parent_type: str, child_type: str, parent: ByteArray, parts: Parts, n: int
) -> ByteArray:
    predicted, fold, stream = _predict_float(parent_type, child_type, parent)
    residual = _flip(_collect(parts.streams, stream), fold)
    if child_type == "F32":
        low = np.ascontiguousarray(parts.rest.reshape(2, n).T).view("<i2").reshape(-1)
        whole = (residual.astype(np.int32) << 16) + low
        return _ordered(predicted + whole).view(np.uint8)
    return _ordered(predicted.astype(np.int16) + residual).view(np.uint8)


def _predict_float(
    parent_type: str, child_type: str, parent: ByteArray
) -> tuple[I32Array, BoolArray, npt.NDArray[np.intp]]:
    """Predict a float child's ordered bits ``[n]`` (of F32 unrounded), the flip and the stream."""
    values, scale, offset = _values(parent_type, parent)
    n, kind = len(values), FLOATS[child_type]
    values = np.pad(values, (0, -n % GROUP)).reshape(-1, GROUP)
    if parent_type in LAYOUTS:
        with np.errstate(all="ignore"):
            values = values * scale[:, None] + offset[:, None]
    bits = values.view(np.uint32)
    bits = np.where(bits & EXPONENT == EXPONENT, np.uint32(0), bits)
    exponent = ((bits & EXPONENT) >> 23).astype(np.int32)
    if parent_type in LAYOUTS:
        unit = ((scale.view(np.uint32) & EXPONENT) >> 23).astype(np.int32)[:, None]
    else:  # a step that is not known: about a quarter of the largest weight
        unit = exponent.max(axis=1, keepdims=True) - 2
    stream = np.clip(unit - exponent, -7, 1) + 7
    magnitude, sign = _fixed(bits, child_type), bits.view(np.int32) >> 31
    if child_type == "F32":
        return (magnitude ^ sign).reshape(-1)[:n], np.zeros(n, bool), stream.reshape(-1)[:n]
    rounded = (magnitude + (1 << kind.shift - 1)) >> kind.shift
    fold = (magnitude < rounded << kind.shift) != (sign < 0)
    return (rounded ^ sign).reshape(-1)[:n], fold.reshape(-1)[:n], stream.reshape(-1)[:n]


def _fixed(bits: U32Array, child_type: str) -> I32Array:
    """Magnitude of float32 bits in units of the child's last place, times ``2**shift``."""
    magnitude = (bits & MAGNITUDE).view(np.int32)
    if child_type != "F16":
        return magnitude
    # Below 2**-14 halves are evenly spaced; a product with a power of two is exact.
    small = magnitude < 113 << 23
    weight = np.where(small, magnitude, np.int32(0)).view(np.float32)
    even = (weight * np.float32(2.0**37)).astype(np.int32)
    return np.where(small, even, np.minimum(magnitude - (112 << 23), 0x7BFF << 13)).astype(np.int32)


def _ordered(bits: npt.NDArray[np.signedinteger]) -> npt.NDArray[np.signedinteger]:
    """Map sign and magnitude to integers in the order of the floats; its own inverse."""
    return bits ^ ((bits >> (bits.itemsize * 8 - 1)) & np.iinfo(bits.dtype).max)


def _wrap(residual: I16Array, bits: int) -> I16Array:
    """Bring differences of ``bits``-bit codes to ``[-2**(bits - 1), 2**(bits - 1))``."""
    half = 1 << bits - 1
    return ((residual + half) & (2 * half - 1)) - np.int16(half)


def _flip(residual: I16Array, fold: BoolArray) -> I16Array:
    return np.where(fold, -residual, residual)


def _deal(residual: I16Array, stream: npt.NDArray[np.intp], n_streams: int) -> list[I16Array]:
    return [residual[stream == k] for k in range(n_streams)]


def _collect(streams: list[I16Array], stream: npt.NDArray[np.intp]) -> I16Array:
    out = np.zeros(len(stream), np.int16)
    for k, residual in enumerate(streams):
        here = np.flatnonzero(stream == k)
        if len(here) != len(residual):
            raise RefusedError(
                f"stream {k} of a level has {len(residual)} residuals, its parent needs "
                f"{len(here)}; the level is corrupt or belongs to another parent"
            )
        out[here] = residual
    return out
