"""The Triton kernels of `bitstack_matmul`; its references define what they compute."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from edgekit.kernels.batch_triton import load_columns, prepare, product, store_rows
from edgekit.kernels.bitstack_matmul import COL_TILE, ROW_TILE, PackedLevel

UNIT = 1 / 127**2  # products of 8-bit factors become at most about the rank


@triton.jit
def _pointer(table, level, which: tl.constexpr, kind: tl.constexpr):
    # a row of the table: u, v, their scales, signs
    return tl.load(table + level * 5 + which).to(tl.pointer_type(kind))


@triton.jit
def _tile(
    table, level, m, n, rows, cols, group, n_groups,
    FACTOR: tl.constexpr, RANK: tl.constexpr, PADDED: tl.constexpr, IS_I8: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """Signed products of one level for rows ``m`` and columns ``n``, without row scales."""
    in_m, in_n = m < rows, n < cols
    u_ptr, v_ptr = _pointer(table, level, 0, FACTOR), _pointer(table, level, 1, FACTOR)
    if RANK == 1:
        at = m[:, None] * n_groups + (n // group)[None, :]
        u = tl.load(u_ptr + at, mask=in_m[:, None] & in_n[None, :], other=0).to(tl.float32)
        values = u * tl.load(v_ptr + n, mask=in_n, other=0).to(tl.float32)[None, :]
    else:
        r = tl.arange(0, PADDED)
        in_r = r < RANK
        u_at, v_at = m[:, None] * RANK + r[None, :], r[:, None] * cols + n[None, :]
        u = tl.load(u_ptr + u_at, mask=in_m[:, None] & in_r[None, :], other=0)
        v = tl.load(v_ptr + v_at, mask=in_r[:, None] & in_n[None, :], other=0)
        values = tl.dot(u.to(tl.float16), v.to(tl.float16))  # 8-bit factors are exact in it
    if IS_I8:
        scale = tl.load(_pointer(table, level, 3, tl.float16) + n, mask=in_n, other=0)
        values *= UNIT * scale.to(tl.float32)[None, :]
    sign_bytes = (cols + 7) // 8
    signs = tl.load(
        _pointer(table, level, 4, tl.uint8) + m[:, None] * sign_bytes + (n // 8)[None, :],
        mask=in_m[:, None] & in_n[None, :], other=0,
    )  # fmt: skip
    is_plus = (signs.to(tl.int32) >> (n % 8)[None, :]) & 1
    return tl.where(is_plus != 0, values, -values)


@triton.jit
def _row_scale(table, gains, level, m, rows, IS_I8: tl.constexpr, UNIT: tl.constexpr):
    scale = tl.load(gains + level)
    if IS_I8:
        stored = tl.load(_pointer(table, level, 2, tl.float16) + m, mask=m < rows, other=0)
        scale = scale / UNIT * stored.to(tl.float32)
    return scale + tl.zeros_like(m).to(tl.float32)


@triton.jit
def _matmul_kernel(
    table, gains, x_ptr, y_ptr, n_levels, rows, cols, group, n_groups, batch,
    FACTOR: tl.constexpr, RANK: tl.constexpr, PADDED: tl.constexpr, IS_I8: tl.constexpr,
    UNIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BB: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    m = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)  # offsets pass 2**31
    b = tl.program_id(1) * BB + tl.arange(0, BB)
    acc = tl.zeros((BM, BB), tl.float32)
    for start in range(0, cols, BN):
        n = start + tl.arange(0, BN)
        x = load_columns(x_ptr, b, n, batch, cols)
        for level in range(n_levels):
            tile = _tile(
                table, level, m, n, rows, cols, group, n_groups, FACTOR, RANK, PADDED, IS_I8, UNIT
            )
            scale = _row_scale(table, gains, level, m, rows, IS_I8, UNIT)
            acc += scale[:, None] * product(tile, x, BN, BB, PRECISION)
    store_rows(y_ptr, acc, m, b, rows, batch)


@triton.jit
def _dense_kernel(
    table, gains, out_ptr, n_levels, first, last, rows, cols, group, n_groups,
    FACTOR: tl.constexpr, RANK: tl.constexpr, PADDED: tl.constexpr, IS_I8: tl.constexpr,
    UNIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    m = (first + tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for level in range(n_levels):
        tile = _tile(
            table, level, m, n, rows, cols, group, n_groups, FACTOR, RANK, PADDED, IS_I8, UNIT
        )
        acc += _row_scale(table, gains, level, m, rows, IS_I8, UNIT)[:, None] * tile
    tl.store(
        out_ptr + (m - first)[:, None] * cols + n[None, :],
        acc.to(out_ptr.dtype.element_ty, fp_downcast_rounding="rtne"),
        mask=(m < last)[:, None] & (n < cols)[None, :],
    )


def launch_matmul(levels: Sequence[PackedLevel], x: Tensor) -> Tensor:
    """`bitstack_matmul.matmul` for ``x`` ``[batch, cols]``; the weight is never written."""
    rows, cols = levels[0].shape
    y, grid, tiles = prepare(x, rows, ROW_TILE)
    table, gains, facts = _table(levels)
    _matmul_kernel[grid](
        table, gains, x.contiguous(), y, len(levels), rows, cols, *_groups(levels[0]), len(x),
        BN=COL_TILE, **tiles, **facts,
    )  # fmt: skip
    return y.to(x.dtype)


def launch_dense(
    levels: Sequence[PackedLevel], dtype: torch.dtype, start: int = 0, stop: int | None = None
) -> Tensor:
    """Rows ``[start, stop)`` of the weight, ``[stop - start, cols]``."""
    rows, cols = levels[0].shape
    stop = rows if stop is None else stop
    out = torch.empty(stop - start, cols, dtype=dtype, device=levels[0].signs.device)
    grid = (triton.cdiv(stop - start, ROW_TILE), triton.cdiv(cols, COL_TILE))
    table, gains, facts = _table(levels)
    _dense_kernel[grid](
        table, gains, out, len(levels), start, stop, rows, cols, *_groups(levels[0]),
        BM=ROW_TILE, BN=COL_TILE, **facts,
    )  # fmt: skip
    return out


def _groups(level: PackedLevel) -> tuple[int, int]:
    return level.group, triton.cdiv(level.shape[1], level.group)


def _table(levels: Sequence[PackedLevel]) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Addresses ``[levels, 5]``, gains ``[levels]``, and what is compiled in."""
    first, device = levels[0], levels[0].signs.device
    assert all((lv.rank, lv.group, lv.u.dtype) == (first.rank, first.group, first.u.dtype)
               for lv in levels)  # fmt: skip
    addresses = [
        [0 if t is None else t.data_ptr() for t in (lv.u, lv.v, lv.u_scale, lv.v_scale, lv.signs)]
        for lv in levels
    ]
    table = torch.tensor(addresses, dtype=torch.int64, device=device)
    gains = torch.tensor([lv.gain for lv in levels], dtype=torch.float32, device=device)
    is_i8 = first.u.dtype == torch.int8
    facts = {
        "FACTOR": tl.int8 if is_i8 else tl.float16,
        "RANK": first.rank,
        "PADDED": max(16, triton.next_power_of_2(first.rank)),
        "IS_I8": is_i8,
        "UNIT": UNIT,
    }
    return table, gains, facts
