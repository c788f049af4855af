"""BitStack's decomposition, step by step as its authors' code has it: the reference.

Each level takes the signs of the residual and a truncated SVD of its absolute values:
``|R| ~ u @ v``, both halves with the root of the singular values. What is subtracted is the product
of the unrounded factors; what is stored is rounded to float16. After arXiv 2410.23918, section 2.2,
and ``BitStackLinear.decompose_weight`` of its public code.
"""

import numpy as np

from edgekit.kernels.bitstack_level import Level, pack_signs
from edgekit.kernels.ggml import F32Array

RANK = 16  # in the paper, with 16 levels


def decompose_ref(weights: F32Array, n_levels: int, rank: int = RANK) -> list[Level]:
    """Decompose ``[rows, cols]``, columns already scaled, into levels with float16 factors."""
    residual, levels = weights.astype(np.float32), list[Level]()
    for _ in range(n_levels):
        signs = np.where(residual >= 0, np.float32(1), np.float32(-1))
        u, s, vt = np.linalg.svd(np.abs(residual), full_matrices=False)
        root = np.sqrt(s[:rank])
        u, v = u[:, :rank] * root, root[:, None] * vt[:rank]
        levels.append(_stored(signs, u, v))
        residual = residual - signs * (u @ v)
    return levels


def _stored(signs: F32Array, u: F32Array, v: F32Array) -> Level:
    half_u, half_v = u.astype(np.float16), v.astype(np.float16)
    return Level(len(v), v.shape[1], 1.0, half_v, half_u, None, None, pack_signs(signs))
