"""Products of packed bitstack levels with a vector or a small batch, and their dense tiles.

`matmul` reads signs and factors and never writes the weight: per tile of rows and columns it makes
``u @ v`` on tensor cores, turns signs, and multiplies with ``x``, level upon level. Beyond
`FUSED_BATCH` columns of ``x`` some rows of the weight are written at a time instead, and used for
all of them.

Bytes read per weight and level: 1/8 for the sign, and ``rank * (1 / rows + 1 / cols)`` for factors
of 8 bits; operations: ``2 * rank + 2``, all but two of them on tensor cores.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from edgekit.kernels.bitstack_level import Level

FUSED_BATCH = 32  # columns of x up to which the weight is never written
BATCH_TILE = 16  # the least a tensor core takes
ROW_TILE, COL_TILE = 32, 128
SLAB_ROWS = 2048  # of the dense weight that are written at once


@dataclass(frozen=True, eq=False)
class PackedLevel:
    """A `Level` on a device; the shapes and types are those of its arrays."""

    rank: int
    group: int
    gain: float
    v: Tensor
    u: Tensor
    v_scale: Tensor | None
    u_scale: Tensor | None
    signs: Tensor

    @property
    def tensors(self) -> list[Tensor]:
        """What takes memory."""
        values = (getattr(self, field.name) for field in fields(self))
        return [value for value in values if isinstance(value, Tensor)]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        return self.signs.shape[0], self.v.shape[1]

    def rows(self, index: Tensor) -> "PackedLevel":
        """Some rows, copied."""
        scale = None if self.u_scale is None else self.u_scale[index]
        u, signs = self.u[index], self.signs[index]
        return PackedLevel(self.rank, self.group, self.gain, self.v, u, self.v_scale, scale, signs)


def packed(level: Level, device: str | torch.device = "cpu") -> PackedLevel:
    """Copy a level to a device."""

    def copy(array: Any) -> Tensor | None:
        return None if array is None else torch.tensor(array, device=device)

    v, u, v_scale, u_scale, signs = map(
        copy, (level.v, level.u, level.v_scale, level.u_scale, level.signs)
    )
    assert v is not None and u is not None and signs is not None
    return PackedLevel(level.rank, level.group, level.gain, v, u, v_scale, u_scale, signs)


def dense_ref(levels: Sequence[PackedLevel], dtype: torch.dtype) -> Tensor:
    """The definition: the weight that levels give, ``[rows, cols]``, all steps in ``dtype``."""
    rows, cols = levels[0].shape
    total = torch.zeros(rows, cols, dtype=dtype, device=levels[0].signs.device)
    for level in levels:
        u, v = level.u.to(dtype) * level.gain, level.v.to(dtype)
        if level.u_scale is not None and level.v_scale is not None:
            u, v = u * level.u_scale.to(dtype)[:, None], v * level.v_scale.to(dtype)
        column = torch.arange(cols, device=u.device)
        is_grouped = level.group < cols
        product = u[:, column // level.group] * v[0] if is_grouped else u @ v
        bits = level.signs[:, column // 8] >> (column % 8).to(torch.uint8) & 1
        total += torch.where(bits.bool(), product, -product)
    return total


def matmul_ref(levels: Sequence[PackedLevel], x: Tensor) -> Tensor:
    """The definition of `matmul`: the dense weight, then the product, all in the type of ``x``."""
    return x @ dense_ref(levels, x.dtype).T


def matmul(levels: Sequence[PackedLevel], x: Tensor) -> Tensor:
    """Multiply ``x`` with the transposed weight that packed levels give.

    Args:
        levels: At least one, all with the same rank, group and type of factors.
        x: float ``[..., cols]`` on their device.

    Returns:
        ``[..., rows]`` in the type of ``x``; sums are float32.
    """
    if not x.is_cuda:
        return matmul_ref(levels, x)
    from edgekit.kernels.bitstack_triton import launch_dense, launch_matmul

    fused, dense = partial(launch_matmul, levels), partial(launch_dense, levels, x.dtype)
    return by_batch(x, levels[0].shape[0], fused, dense)


def by_batch(
    x: Tensor, rows: int, fused: Callable[[Tensor], Tensor], dense: Callable[[int, int], Tensor]
) -> Tensor:
    """Multiply ``x`` ``[..., cols]`` with a transposed weight in the way its batch asks for.

    Args:
        x: Up to `FUSED_BATCH` vectors, or more.
        rows: Of the weight.
        fused: Multiplies ``[batch, cols]`` without writing the weight.
        dense: Writes the weight's rows ``[start, stop)``.
    """
    flat = x.reshape(-1, x.shape[-1])
    if len(flat) <= FUSED_BATCH:
        y = fused(flat)
    else:
        edges = range(0, rows, SLAB_ROWS)
        y = torch.cat([flat @ dense(at, min(at + SLAB_ROWS, rows)).T for at in edges], dim=-1)
    return y.reshape(*x.shape[:-1], -1)
