"""The Triton kernels of `block_matmul`; its references define what they compute.

Where codes lie is that of `blocks.LAYOUTS`, handed over as numbers that are compiled in.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from edgekit.kernels.batch_triton import load_columns, prepare, product, store_rows
from edgekit.kernels.block_matmul import PackedBlocks
from edgekit.kernels.blocks import LAYOUTS, Plane

ROW_TILE, COL_TILE = 16, 256
# Families of types whose scales are read alike
ONE, PAIR, Q2_K, Q3_K, Q4_K, Q6_K = range(6)
FAMILY = {"Q4_0": ONE, "Q5_0": ONE, "Q8_0": ONE, "Q4_1": PAIR, "Q5_1": PAIR, "Q2_K": Q2_K,
          "Q3_K": Q3_K, "Q4_K": Q4_K, "Q5_K": Q4_K, "Q6_K": Q6_K}  # fmt: skip


@triton.jit
def _half(at, mask):
    """The float16 at an address of bytes."""
    low = tl.load(at, mask=mask, other=0).to(tl.uint16)
    high = tl.load(at + 1, mask=mask, other=0).to(tl.uint16)
    return (low | (high << 8)).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _byte(at, mask):
    return tl.load(at, mask=mask, other=0).to(tl.int32)


@triton.jit
def _plane(
    block, w, mask, OFFSET: tl.constexpr, BITS: tl.constexpr, RUN: tl.constexpr, SHIFT: tl.constexpr
):
    """Some bits of the codes of weights ``w`` of a block; see `blocks.Plane`."""
    per_byte: tl.constexpr = 8 // BITS
    at = OFFSET + w // (RUN * per_byte) * RUN + w % RUN
    code = _byte(block + at, mask) >> (w // RUN % per_byte * BITS)
    return (code & ((1 << BITS) - 1)) << SHIFT


@triton.jit
def _six_bits(block, i, mask, FIRST: tl.constexpr):
    """The i-th scale (FIRST 0) or minimum (FIRST 4) of the 12 bytes at 4 in Q4_K and Q5_K."""
    near = _byte(block + 4 + FIRST + i % 4, mask)
    far = _byte(block + 12 + i % 4, mask)
    late = ((far >> FIRST) & 15) | ((near >> 6) << 4)
    return tl.where(i < 4, near & 63, late).to(tl.float32)


@triton.jit
def _scales(block, w, mask, FAMILY: tl.constexpr):
    """Scale and offset of weights ``w`` of a block, float32."""
    if FAMILY == 0:  # one scale
        scale = _half(block, mask)
        return scale, tl.zeros_like(scale)
    elif FAMILY == 1:  # scale and offset
        return _half(block, mask), _half(block + 2, mask)
    elif FAMILY == 2:  # Q2_K
        packed = _byte(block + w // 16, mask)
        scale = _half(block + 80, mask) * (packed & 15).to(tl.float32)
        return scale, -(_half(block + 82, mask) * (packed >> 4).to(tl.float32))
    elif FAMILY == 3:  # Q3_K
        i = w // 16
        low = (_byte(block + 96 + i % 8, mask) >> (i // 8 * 4)) & 15
        high = (_byte(block + 104 + i % 4, mask) >> (i // 4 * 2)) & 3
        scale = _half(block + 108, mask) * ((low | (high << 4)) - 32).to(tl.float32)
        return scale, tl.zeros_like(scale)
    elif FAMILY == 4:  # Q4_K, Q5_K
        i = w // 32
        scale = _half(block, mask) * _six_bits(block, i, mask, 0)
        return scale, -(_half(block + 2, mask) * _six_bits(block, i, mask, 4))
    else:  # Q6_K
        packed = _byte(block + 192 + w // 16, mask)
        signed = packed - ((packed >> 7) << 8)
        scale = _half(block + 208, mask) * signed.to(tl.float32)
        return scale, tl.zeros_like(scale)


@triton.jit
def _tile(
    data, m, n, rows, cols, row_bytes,
    FAMILY: tl.constexpr, BLOCK: tl.constexpr, BLOCK_BYTES: tl.constexpr,
    LOW: tl.constexpr, FLIP: tl.constexpr,
    OFFSET: tl.constexpr, BITS: tl.constexpr, RUN: tl.constexpr,
    OFFSET2: tl.constexpr, BITS2: tl.constexpr, RUN2: tl.constexpr, SHIFT2: tl.constexpr,
):  # fmt: skip
    """The weights of rows ``m`` and columns ``n``, float32."""
    mask = (m < rows)[:, None] & (n < cols)[None, :]
    block = data + m[:, None] * row_bytes + (n // BLOCK * BLOCK_BYTES)[None, :]
    w = (n % BLOCK)[None, :]
    code = _plane(block, w, mask, OFFSET, BITS, RUN, 0)
    if BITS2 > 0:
        code |= _plane(block, w, mask, OFFSET2, BITS2, RUN2, SHIFT2)
    scale, offset = _scales(block, w, mask, FAMILY)
    return ((code ^ FLIP) + LOW).to(tl.float32) * scale + offset


@triton.jit
def _matmul_kernel(
    data, x_ptr, y_ptr, rows, cols, row_bytes, batch,
    FAMILY: tl.constexpr, BLOCK: tl.constexpr, BLOCK_BYTES: tl.constexpr,
    LOW: tl.constexpr, FLIP: tl.constexpr,
    OFFSET: tl.constexpr, BITS: tl.constexpr, RUN: tl.constexpr,
    OFFSET2: tl.constexpr, BITS2: tl.constexpr, RUN2: tl.constexpr, SHIFT2: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BB: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    m = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)  # offsets pass 2**31
    b = tl.program_id(1) * BB + tl.arange(0, BB)
    acc = tl.zeros((BM, BB), tl.float32)
    for start in range(0, cols, BN):
        n = start + tl.arange(0, BN)
        x = load_columns(x_ptr, b, n, batch, cols)
        tile = _tile(
            data, m, n, rows, cols, row_bytes, FAMILY, BLOCK, BLOCK_BYTES, LOW, FLIP,
            OFFSET, BITS, RUN, OFFSET2, BITS2, RUN2, SHIFT2,
        )  # fmt: skip
        acc += product(tile, x, BN, BB, PRECISION)
    store_rows(y_ptr, acc, m, b, rows, batch)


@triton.jit
def _dense_kernel(
    data, out_ptr, first, last, rows, cols, row_bytes,
    FAMILY: tl.constexpr, BLOCK: tl.constexpr, BLOCK_BYTES: tl.constexpr,
    LOW: tl.constexpr, FLIP: tl.constexpr,
    OFFSET: tl.constexpr, BITS: tl.constexpr, RUN: tl.constexpr,
    OFFSET2: tl.constexpr, BITS2: tl.constexpr, RUN2: tl.constexpr, SHIFT2: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    m = (first + tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    tile = _tile(
        data, m, n, rows, cols, row_bytes, FAMILY, BLOCK, BLOCK_BYTES, LOW, FLIP,
        OFFSET, BITS, RUN, OFFSET2, BITS2, RUN2, SHIFT2,
    )  # fmt: skip
    tl.store(
        out_ptr + (m - first)[:, None] * cols + n[None, :],
        tile.to(out_ptr.dtype.element_ty, fp_downcast_rounding="rtne"),
        mask=(m < last)[:, None] & (n < cols)[None, :],
    )


def launch_matmul(matrix: PackedBlocks, x: Tensor) -> Tensor:
    """`block_matmul.matmul` for ``x`` ``[batch, cols]``; the weight is never written."""
    rows, cols = matrix.shape
    y, grid, tiles = prepare(x, rows, ROW_TILE)
    _matmul_kernel[grid](
        matrix.data, x.contiguous(), y, rows, cols, matrix.data.stride(0), len(x),
        BN=COL_TILE, **tiles, **_facts(matrix.type_name),
    )  # fmt: skip
    return y.to(x.dtype)


def launch_dense(
    matrix: PackedBlocks, dtype: torch.dtype, start: int = 0, stop: int | None = None
) -> Tensor:
    """Rows ``[start, stop)`` of the weight, ``[stop - start, cols]``."""
    rows, cols = matrix.shape
    stop = rows if stop is None else stop
    out = torch.empty(stop - start, cols, dtype=dtype, device=matrix.data.device)
    grid = (triton.cdiv(stop - start, ROW_TILE), triton.cdiv(cols, COL_TILE))
    _dense_kernel[grid](
        matrix.data, out, start, stop, rows, cols, matrix.data.stride(0),
        BM=ROW_TILE, BN=COL_TILE, **_facts(matrix.type_name),
    )  # fmt: skip
    return out


def _facts(type_name: str) -> dict[str, Any]:
    """What is compiled in of a type."""
    layout = LAYOUTS[type_name]
    first, second = (*layout.planes, Plane(0, 0, 1))[:2]
    return {
        "FAMILY": FAMILY[type_name],
        "BLOCK": layout.block,
        "BLOCK_BYTES": layout.block_bytes,
        "LOW": layout.low,
        "FLIP": layout.flip,
        "OFFSET": first.offset,
        "BITS": first.bits,
        "RUN": first.run,
        "OFFSET2": second.offset,
        "BITS2": second.bits,
        "RUN2": second.run,
        "SHIFT2": second.shift,
    }
