"""Rows of a matrix from its bitstack levels: the same float32 bits on every machine.

For each level and each weight ``u[i, r] * v[r, j]`` are added in the order of ``r``, each product
and each sum rounded to float32, no fused multiply-add, and the sum is added with its sign. The
numpy version is the definition; the compiled one equals it bit for bit.
"""

from collections.abc import Sequence

import numpy as np

from edgekit.kernels.bitstack_level import Level, unpack_signs
from edgekit.kernels.ggml import F32Array
from edgekit.kernels.native import native

TILE = 1 << 16  # weights at once, so that the reference stays in the cache


def add_levels_ref(levels: Sequence[Level], out: F32Array) -> None:
    """The definition; arguments as for `add_levels`."""
    step = max(1, TILE // out.shape[1])
    for level in levels:
        right = level.right()
        for start in range(0, len(out), step):
            some = level.rows(start, start + step)
            left, block = some.left(), out[start : start + step]
            total = np.zeros_like(block)
            for first in range(0, block.shape[1], level.group):
                here, at = slice(first, first + level.group), first // level.group * level.rank
                for r in range(level.rank):
                    total[:, here] += left[:, at + r, None] * right[r, here]
            block += np.where(unpack_signs(some.signs, block.shape[1]), total, -total)


def add_levels(levels: Sequence[Level], out: F32Array) -> None:
    """Add levels, in order, to ``out``, float32 ``[rows, cols]``, in place.

    Args:
        levels: Of these rows.
        out: C-contiguous.
    """
    compiled = native()
    if compiled is None:
        add_levels_ref(levels, out)
        return
    for level in levels:
        compiled.add_signed_product(
            level.left(), level.right(), level.signs, out, rank=level.rank, group=level.group
        )
