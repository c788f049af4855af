"""One level of the `nested` codec: the compiled code where there is some, else the reference."""

import numpy as np

from edgekit.errors import RefusedError, UnknownNameError
from edgekit.kernels import ggml, nested_ref, packing_ref
from edgekit.kernels.blocks import LAYOUTS
from edgekit.kernels.ggml import ByteArray
from edgekit.kernels.native import native
from edgekit.kernels.nested_ref import FLOATS, Parts, n_streams
from edgekit.kernels.packing_ref import Level, Packed

CHILDREN = (*LAYOUTS, *FLOATS)
__all__ = ["CHILDREN", "Level", "Packed", "decode", "encode", "n_bytes", "n_streams", "rest_bytes",
           "widths"]  # fmt: skip


def widths(child_type: str) -> tuple[int, ...]:
    """Give the widths in bits that a stream of a level to ``child_type`` can have."""
    return (2, 4, 8, 16) if child_type in FLOATS else (2, 4, 8)


def n_bytes(type_name: str, n_weights: int) -> int:
    """Count the bytes of ``n_weights`` weights.

    Raises:
        RefusedError: They are not whole blocks.
    """
    kind = ggml.ggml_type(type_name)
    if n_weights % kind.block:
        raise RefusedError(
            f"a level has {n_weights} weights, no multiple of the {kind.block} in a block of "
            f"{type_name}"
        )
    return n_weights // kind.block * kind.block_bytes


def rest_bytes(child_type: str, n_weights: int) -> int:
    """Count the bytes of a child that a level stores unpredicted (`Parts.rest`)."""
    if child_type in LAYOUTS:
        layout = LAYOUTS[child_type]
        return n_weights // layout.block * len(layout.scale_index)
    return 2 * n_weights if child_type == "F32" else 0


def encode(parent_type: str, child_type: str, parent: ByteArray, child: ByteArray) -> Level:
    """Take a child apart into what its parent does not say about it, packed.

    Args:
        parent_type: Any key of `ggml.TYPES`.
        child_type: One of `CHILDREN`.
        parent: uint8, flat, the blocks of the same weights in ``parent_type``.
        child: uint8, flat, whole blocks.

    Raises:
        RefusedError: Parent and child differ in their number of weights.
    """
    kind = _child_kind(child_type)
    n, rest = divmod(child.nbytes, kind.block_bytes)
    if rest:
        raise RefusedError(f"{child.nbytes} bytes are no whole blocks of {child_type}")
    parent_type, parent = _parent(parent_type, parent, n * kind.block)
    child = _flat(child)
    compiled = native()
    if compiled is None:
        parts = nested_ref.split(parent_type, child_type, parent, child)
        packed = [packing_ref.pack(r, packing_ref.choose_width(r)) for r in parts.streams]
        return Level(parts.limits, packed, parts.rest)
    return compiled.encode(
        parent_type, child_type, parent, child, rest_bytes(child_type, n * kind.block)
    )


def decode(
    parent_type: str,
    child_type: str,
    parent: ByteArray,
    level: Level,
    n_weights: int,
    out: ByteArray | None = None,
) -> ByteArray:
    """Put a child of ``n_weights`` weights together from its parent and a level.

    Args:
        parent_type: Any key of `ggml.TYPES`.
        child_type: One of `CHILDREN`.
        parent: uint8, flat, the blocks of the same weights in ``parent_type``.
        level: What `encode` gave.
        n_weights: Whole blocks of ``child_type``.
        out: uint8, flat, contiguous, of the child's size, where it is put; fresh memory without.

    Raises:
        RefusedError: The level's sizes do not agree, or do not fit the parent.
    """
    needed = n_bytes(_child_kind(child_type).name, n_weights)
    child = np.empty(needed, np.uint8) if out is None else out
    assert child.shape == (needed,)
    parent_type, parent = _parent(parent_type, parent, n_weights)
    if len(level.rest) != rest_bytes(child_type, n_weights):
        raise RefusedError(
            f"a level to {child_type} has {len(level.rest)} bytes of scales, "
            f"{n_weights} weights need {rest_bytes(child_type, n_weights)}"
        )
    _check_streams(child_type, level, n_weights)
    compiled = native()
    if compiled is None:
        streams = [packing_ref.unpack(s) for s in level.streams]
        parts = Parts(level.limits, streams, level.rest)
        child[:] = nested_ref.join(parent_type, child_type, parent, parts, n_weights)
    else:
        compiled.decode(parent_type, child_type, parent, level, child)
    return child


def _check_streams(child_type: str, level: Level, n_weights: int) -> None:
    """What the compiled code takes for granted."""
    streams, allowed = level.streams, widths(child_type)
    if len(streams) != n_streams(child_type) or sum(s.n_residuals for s in streams) != n_weights:
        raise RefusedError(f"a level's streams do not hold its {n_weights} weights; it is corrupt")
    for s in streams:
        n_digits = packing_ref.digit_bytes(s.width, s.n_residuals)
        if s.width not in allowed or len(s.digits) != n_digits or len(s.gaps) != len(s.values):
            raise RefusedError(
                f"a stream of {s.n_residuals} residuals of {s.width} bits has {len(s.digits)} bytes"
            )


def _child_kind(child_type: str) -> ggml.GgmlType:
    if child_type not in CHILDREN:
        raise UnknownNameError("child type", child_type, CHILDREN)
    return ggml.TYPES[child_type]


def _parent(parent_type: str, parent: ByteArray, n_weights: int) -> tuple[str, ByteArray]:
    """Check the parent's size; one without a layout becomes float32."""
    needed = n_bytes(parent_type, n_weights)
    if parent.nbytes != needed:
        raise RefusedError(
            f"the {parent_type} parent of a level has {parent.nbytes} bytes, "
            f"{n_weights} weights need {needed}"
        )
    if parent_type in LAYOUTS:
        return parent_type, _flat(parent)
    return "F32", ggml.dequantize(parent_type, parent).view(np.uint8)


def _flat(blocks: ByteArray) -> ByteArray:
    return np.ascontiguousarray(blocks, np.uint8).reshape(-1)
