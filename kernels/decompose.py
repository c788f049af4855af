"""Weights to bitstack levels: randomized, rounded before the next level looks, weighted.

Departures from the reference (`decompose_ref`), each of which costs bytes or error there:

- A rank-k randomized SVD (Halko, Martinsson & Tropp, arXiv 0909.4061, algorithm 4.4) in place of a
  full one.
- Factors are rounded first, ``v`` is fitted anew to the rounded ``u``, and the residual is taken
  against what a decoder gives, so that a level mends the rounding of those before it.
- Factors take 8 bits, with a float16 scale per row of ``u`` and per column of ``v``: the first
  pair, which holds nearly everything, keeps float16's precision.
- Weighting rows and columns is undone in the factors themselves. Nothing is folded into the tensor
  before, so every matrix is weighted: those behind grouped-query attention, and every expert by
  what reached it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.kernels.bitstack_level import Level, pack_signs
from edgekit.kernels.bitstack_rows import add_levels
from edgekit.kernels.ggml import F32Array

MAX_RANK = 20  # four more than the paper's, in 69 % of its bytes
SHARE_OF_SIGNS = 2  # factors take at most half as many bytes as signs do
OVERSAMPLING = 8
N_ITERATIONS = 2  # of the power scheme; a third gains less than 0.1 % of the error
SLAB = 1 << 21  # weights whose absolute values are in memory at once
TINY = np.finfo(np.float32).tiny
LEAST_EXPONENT = -60  # of the gain of u or of v: their product is a normal float32


@dataclass(frozen=True)
class Settings:
    """How a matrix is decomposed.

    Attributes:
        group: Columns that share a column of ``u``; 0: all.
        rank: Of the factors of a group; 0: `rank_for` its shape, and 1 where there are groups.
        halves: Factors in float16 instead of 8 bits.
        seed: Of the random start.
    """

    group: int = 0
    rank: int = 0
    halves: bool = False
    seed: int = 0


def rank_for(rows: int, cols: int) -> int:
    """The rank whose factors, in 8 bits, take half the bytes of the signs; `MAX_RANK` at most."""
    return max(1, min(MAX_RANK, rows * cols // (8 * SHARE_OF_SIGNS * (rows + cols))))


def decompose(
    weights: F32Array,
    n_levels: int,
    settings: Settings = Settings(),
    row_weights: F32Array | None = None,
    col_weights: F32Array | None = None,
    overwrite: bool = False,
) -> Iterator[Level]:
    """Decompose a matrix into levels, one after another.

    Args:
        weights: float32 ``[rows, cols]``, finite, C-contiguous.
        n_levels: How many.
        settings: Rank, groups, rounding.
        row_weights: float32 ``[rows]``, positive: what an error in a row is multiplied by before
            it is minimized; ``None``: all alike.
        col_weights: The same for columns, ``[cols]``.
        overwrite: ``weights`` ends as what the levels leave of it, and no copy is made.
    """
    rows, cols = weights.shape
    residual = weights if overwrite else weights.copy()
    r = np.ones(rows, np.float32) if row_weights is None else row_weights
    c = np.ones(cols, np.float32) if col_weights is None else col_weights
    group = min(settings.group or cols, cols)
    random = np.random.default_rng(settings.seed)
    for _ in range(n_levels):
        absolute = _Absolute(residual, r, c)
        if group < cols:
            u, v = _factor_groups(absolute, group)
        else:
            u, v = _factor(absolute, settings, random)
        level = _rounded(absolute, u, v, group, settings.halves or len(v) == 1)
        yield level
        add_levels([_negated(level)], residual)


class _Absolute:
    """``|residual|`` weighted, a slab of rows in memory at a time."""

    def __init__(self, residual: F32Array, r: F32Array, c: F32Array) -> None:
        self.residual, self.r, self.c = residual, r, c
        self.shape = residual.shape

    def slabs(self) -> Iterator[tuple[slice, F32Array]]:
        step = max(1, SLAB // self.shape[1])
        for start in range(0, self.shape[0], step):
            at = slice(start, start + step)
            slab = np.abs(self.residual[at])
            slab *= self.c
            slab *= self.r[at, None]
            yield at, slab

    def times(self, right: F32Array) -> F32Array:
        """``A @ right``."""
        out = np.empty((self.shape[0], right.shape[1]), np.float32)
        for at, slab in self.slabs():
            np.matmul(slab, right, out=out[at])
        return out

    def transposed_times(self, left: F32Array) -> F32Array:
        """``A.T @ left``."""
        out = np.zeros((self.shape[1], left.shape[1]), np.float32)
        for at, slab in self.slabs():
            out += slab.T @ left[at]
        return out


def _factor(
    a: _Absolute, settings: Settings, random: np.random.Generator
) -> tuple[F32Array, F32Array]:
    """The left factor ``[rows, rank]`` of a truncated SVD, and the right one ``[rank, cols]``."""
    rank = min(settings.rank or rank_for(*a.shape), *a.shape)
    n = min(rank + OVERSAMPLING, *a.shape)
    start = random.standard_normal((a.shape[1], n), np.float32)
    start[:, 0] = 1  # absolute values are close to a product of positive vectors
    y = a.times(start)
    for _ in range(N_ITERATIONS):
        q = np.linalg.qr(a.transposed_times(np.linalg.qr(y)[0]))[0]
        y = a.times(q)
    q = np.linalg.qr(y)[0]
    inner, values, vt = np.linalg.svd(a.transposed_times(q).T, full_matrices=False)
    root = np.sqrt(values[:rank])
    return q @ (inner[:, :rank] * root), root[:, None] * vt[:rank]


def _factor_groups(a: _Absolute, group: int) -> tuple[F32Array, F32Array]:
    """Rank-1 factors of every group, ``[rows, groups]`` and ``[1, cols]``, by alternating fits."""
    rows, cols = a.shape
    edges = np.arange(0, cols, group)
    v = np.ones(cols, np.float32)
    u = np.empty((rows, len(edges)), np.float32)
    for _ in range(N_ITERATIONS + 1):
        norms = np.maximum(np.add.reduceat(v * v, edges), TINY)
        top, bottom = np.zeros(cols, np.float32), np.zeros(cols, np.float32)
        for at, slab in a.slabs():
            u[at] = np.add.reduceat(slab * v, edges, axis=1) / norms
            wide = np.repeat(u[at], group, axis=1)[:, :cols]
            top += np.einsum("ij,ij->j", slab, wide)
            bottom += np.einsum("ij,ij->j", wide, wide)
        v = top / np.maximum(bottom, TINY)
    return u, v[None]


def _rounded(a: _Absolute, u: F32Array, v: F32Array, group: int, halves: bool) -> Level:
    """The level that is stored: ``u`` rounded, ``v`` fitted to that and rounded, weights undone."""
    kind_u, u_scale, gain_u = _round(u / a.r[:, None], 1, halves)
    if group >= a.shape[1]:
        kept = _values(kind_u, u_scale, 1, gain_u) * a.r[:, None]
        gram = (kept.T @ kept).astype(np.float64)
        fitted = np.linalg.lstsq(gram, a.transposed_times(kept).T.astype(np.float64), rcond=None)
        v = fitted[0].astype(np.float32)
    kind_v, v_scale, gain_v = _round(v / a.c, 0, halves)
    signs = pack_signs(a.residual)
    return Level(len(v), group, gain_u * gain_v, kind_v, kind_u, v_scale, u_scale, signs)


def _round(
    values: F32Array, axis: int, halves: bool
) -> tuple[npt.NDArray[Any], npt.NDArray[np.float16] | None, float]:
    """Round along ``axis``, which shares a scale: stored values, scales, and a power of two."""
    largest = np.abs(values).max(axis)
    top = float(largest.max())
    gain = 2.0 ** max(math.ceil(math.log2(top)), LEAST_EXPONENT) if top > 0 else 1.0
    if halves:
        return (values / gain).astype(np.float16), None, gain
    scale = (largest / (127 * gain)).astype(np.float16)
    wide = np.expand_dims(scale.astype(np.float32) * np.float32(gain), axis)
    codes = np.divide(values, wide, out=np.zeros_like(values), where=wide > 0)
    return np.clip(np.rint(codes), -127, 127).astype(np.int8), scale, gain


def _values(
    stored: npt.NDArray[Any], scale: npt.NDArray[np.float16] | None, axis: int, gain: float
) -> F32Array:
    wide: F32Array = stored.astype(np.float32) * np.float32(gain)
    return wide if scale is None else wide * np.expand_dims(scale.astype(np.float32), axis)


def _negated(level: Level) -> Level:
    """The level with every sign turned, to be added instead of subtracted."""
    return Level(
        level.rank, level.group, level.gain, level.v, level.u, level.v_scale, level.u_scale,
        ~level.signs,
    )  # fmt: skip
