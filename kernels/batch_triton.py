"""What Triton kernels do with a tile of a weight, however it is packed: times columns of ``x``."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from edgekit.kernels.bitstack_matmul import BATCH_TILE


@triton.jit
def load_columns(x_ptr, b, n, batch, cols):
    """``x`` ``[batch, cols]`` for its columns ``n`` and vectors ``b``, float32, ``[n, b]``."""
    return tl.load(
        x_ptr + b[None, :] * cols + n[:, None],
        mask=(b < batch)[None, :] & (n < cols)[:, None],
        other=0,
    ).to(tl.float32)


@triton.jit
def product(tile, x, BN: tl.constexpr, BB: tl.constexpr, PRECISION: tl.constexpr):
    """``tile @ x``, float32: on tensor cores unless ``x`` is one vector."""
    if BB == 1:
        return tl.sum(tile * tl.reshape(x, (1, BN)), axis=1)[:, None]
    else:
        return tl.dot(tile, x, input_precision=PRECISION)


@triton.jit
def store_rows(y_ptr, sums, m, b, rows, batch):
    """Sums ``[m, b]`` into ``y`` ``[batch, rows]``."""
    tl.store(
        y_ptr + b[None, :] * rows + m[:, None],
        sums,
        mask=(m < rows)[:, None] & (b < batch)[None, :],
    )


def prepare(x: Tensor, rows: int, row_tile: int) -> tuple[Tensor, tuple[int, int], dict[str, Any]]:
    """Room for the product, float32 ``[batch, rows]``; the grid; what is compiled in."""
    batch = len(x)
    y = torch.empty(batch, rows, dtype=torch.float32, device=x.device)
    tile = 1 if batch == 1 else BATCH_TILE
    grid = (triton.cdiv(rows, row_tile), triton.cdiv(batch, tile))
    precision = "ieee" if x.dtype == torch.float32 else "tf32"
    return y, grid, {"BM": row_tile, "BB": tile, "PRECISION": precision}
