"""One level of the `nested` codec: the compiled code where there is some, else the reference."""

import numpy as np

from edgekit.errors import RefusedError, UnknownNameError
from edgekit.kernels import ggml, nested_ref, packing_ref
from edgekit.kernels.blocks import LAYOUTS
from edgekit.kernels.ggml import ByteArray
from edgekit.kernels.native import native
from edgekit.kernels.nested_ref import CODE_STREAMS, FLOAT_STREAMS, FLOATS, I16Array, Parts
from edgekit.kernels.packing_ref import Packed

CHILDREN = (*LAYOUTS, *FLOATS)
__all__ = ["CHILDREN", "Packed", "Parts", "join", "n_bytes", "n_streams", "pack", "rest_bytes",
           "split", "unpack"]  # fmt: skip


def n_streams(child_type: str) -> int:
    """Count the streams of a level that ends at ``child_type``."""
    return FLOAT_STREAMS if child_type in FLOATS else CODE_STREAMS


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


def split(parent_type: str, child_type: str, parent: ByteArray, child: ByteArray) -> Parts:
    """Take a child apart into what its parent does not say about it.

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
        return nested_ref.split(parent_type, child_type, parent, child)
    return compiled.split(
        parent_type, child_type, parent, child, rest_bytes(child_type, n * kind.block)
    )


def join(
    parent_type: str, child_type: str, parent: ByteArray, parts: Parts, n_weights: int
) -> ByteArray:
    """Put a child of ``n_weights`` weights together from its parent and `split`'s parts.

    Raises:
        RefusedError: The parts do not fit the parent.
    """
    n_bytes(_child_kind(child_type).name, n_weights)
    parent_type, parent = _parent(parent_type, parent, n_weights)
    if len(parts.rest) != rest_bytes(child_type, n_weights):
        raise RefusedError(
            f"a level to {child_type} has {len(parts.rest)} bytes of scales, "
            f"{n_weights} weights need {rest_bytes(child_type, n_weights)}"
        )
    compiled = native()
    if compiled is None:
        return nested_ref.join(parent_type, child_type, parent, parts, n_weights)
    return compiled.join(parent_type, child_type, parent, parts, n_weights)


def pack(residuals: I16Array) -> Packed:
    """Pack a stream at the width that suits it."""
    compiled = native()
    if compiled is None:
        return packing_ref.pack(residuals, packing_ref.choose_width(residuals))
    return compiled.pack(np.ascontiguousarray(residuals, np.int16))


def unpack(packed: Packed) -> I16Array:
    """Give the residuals of a packed stream back.

    Raises:
        RefusedError: The sizes do not agree, or a patch lies outside the stream.
    """
    if len(packed.digits) != packing_ref.digit_bytes(packed.width, packed.count):
        raise RefusedError(
            f"a stream of {packed.count} residuals of {packed.width} bits has "
            f"{len(packed.digits)} bytes"
        )
    compiled = native()
    return packing_ref.unpack(packed) if compiled is None else compiled.unpack(packed)


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
