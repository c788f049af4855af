"""Nested codes chosen column by column, each error pushed onto the columns not yet done.

GPTQ (arXiv:2210.17323, Algorithm 1) with the joint choice of `slices_ref.joint` for its rounding,
as MatGPTQ does (arXiv:2602.03537): with the inputs' second moment ``H`` and ``H^-1 = U^T U``, ``U``
upper triangular, column ``j`` changes those behind it by ``-e U[j, j+1:] / U[j, j]``. A code has an
error at every depth and the columns behind it can make up for one: ``e`` is a weighted sum of
them, in MatGPTQ their mean. Departure: the scales of a block are searched when its first column's
turn comes, as `slices.encode` does.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from edgekit.kernels import slices, slices_ref
from edgekit.kernels.slices_ref import F32Array, Slices

DAMP = 0.01  # of the mean of H's diagonal, added to it: GPTQ's own
LOWEST = 2  # bits; embedding and head, which begin at 4, are rounded weight by weight
# Weights of the errors at 8, 4 and 2 bits
CARRIED: Mapping[str, tuple[float, float, float]] = {
    "mean": (1 / 3, 1 / 3, 1 / 3),
    "8": (1.0, 0.0, 0.0),
    "4": (0.0, 1.0, 0.0),
    "2": (0.0, 0.0, 1.0),
}


def inverse_factor(moment: npt.NDArray[np.floating]) -> F32Array:
    """``U``, float32 ``[cols, cols]``, for a second moment ``[cols, cols]`` in any unit."""
    h = moment.astype(np.float64)
    mean = h.diagonal().mean()
    h = h / mean if mean > 0 else np.eye(len(h))
    h[np.diag_indices_from(h)] += DAMP
    return np.ascontiguousarray(np.linalg.cholesky(np.linalg.inv(h)).T, np.float32)


def encode(
    weights: F32Array,
    importance: F32Array,
    factor: F32Array,
    block: int,
    carried: tuple[float, float, float],
) -> Slices:
    """Choose scales and codes of whole rows, for depths 8, 4 and 2.

    Args:
        weights: float32 ``[rows, cols]``, ``cols`` a multiple of ``block``.
        importance: Of the search for scales, float32 ``[rows, cols]``, above 0.
        factor: `inverse_factor` of the inputs' second moment.
        block: Weights that share a scale.
        carried: Weights of the errors at 8, 4 and 2 bits in what is pushed on.

    Returns:
        Of the blocks of the first row, then those of the second, and so on.
    """
    work, (rows, cols) = weights.copy(), weights.shape
    codes = np.zeros((rows, cols // block, block), np.int8)
    scales = np.zeros((3, rows, cols // block), np.float32)
    for at in range(0, cols, block):
        end, here = at + block, at // block
        found = slices.encode(
            np.ascontiguousarray(work[:, at:end]),
            np.ascontiguousarray(importance[:, at:end]),
            LOWEST,
        )
        scales[:, :, here] = found.scales
        chosen, errors = _block(work[:, at:end], found.scales, factor[at:end, at:end], carried)
        codes[:, here] = chosen
        work[:, end:] -= errors @ factor[at:end, end:]
    return Slices(codes.reshape(-1, block), scales.reshape(3, -1))


def _block(
    weights: F32Array,
    scales: F32Array,
    factor: F32Array,
    carried: tuple[float, float, float],
) -> tuple[F32Array, F32Array]:
    """Codes of a block, and per column the error over ``U[j, j]``; changes ``weights``."""
    codes, errors = np.zeros_like(weights), np.zeros_like(weights)
    shares = np.array(carried, np.float32)[:, None]
    for j in range(weights.shape[1]):
        column = weights[:, j]
        code = slices_ref.joint(column[:, None], (scales[0], scales[1], scales[2]), LOWEST)[:, 0]
        each = column - scales * np.stack([code, *slices_ref.sliced(code)]).astype(np.float32)
        errors[:, j] = (shares * each).sum(0) / factor[j, j]
        codes[:, j] = code
        weights[:, j + 1 :] -= errors[:, j, None] * factor[j, j + 1 :]
    return codes, errors
