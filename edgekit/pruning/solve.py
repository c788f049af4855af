"""What the removal of features costs, and the least squares that makes up for it.

A linear map reads features ``x`` (neurons of a feed-forward block, outputs of heads) and writes
``y = W x``. With the second moment ``G = E[x x^T]`` over calibration tokens and the damped inverse
``M = (G + damp I)^-1``:

- The ridge leverage of feature j is ``[G M]_jj = 1 - damp M_jj`` (UniQL, arXiv 2512.03383, sorts
  columns by it). It is low where the other features say the same: where keeping j worsens the
  condition of the kept moment. It knows nothing of what W does with the feature.
- Removing features R and refitting the others costs ``tr(W_R (M_RR)^-1 W_R^T)``: the part of x_R
  that the others cannot say (``1 / M_jj`` is its variance), times what W makes of it. This is the
  surgeon's formula (Hassibi & Stork 1993; for structures ZipLM, arXiv 2302.04089). It is our
  matrix-condition metric: leverage weighed by the effect on the layer's output.

Departure from ZipLM: features go in rounds. All are scored once per round; among the lowest, twice
as many as go, they then go one by one with M and W brought up to date, so that of two copies of a
neuron only one goes.
"""

from typing import Any

import torch

Tensor = Any

ROUNDS = 8  # of removal; each passes over the whole moment once, half a GiB at 8192 features
DAMP = 1e-4  # of the mean of the moment's diagonal; keeps it invertible where features are copies
SLAB = 1024  # features of a float32 moment that are taken to float64 at a time
DAMPS = (1e-5, 1e-3, 1e-1)  # of a refit; which one, held-out tokens decide


def damped(gram: Tensor, damp: float = DAMP) -> Tensor:
    """A copy of ``gram`` ``[n, n]`` with ``damp`` times the mean of its diagonal added to it."""
    return _damp_(gram.clone(), damp)


def _damp_(gram: Tensor, damp: float) -> Tensor:
    gram.diagonal().add_(_ridge(gram, damp))
    return gram


def _ridge(gram: Tensor, damp: float) -> Tensor:
    least = torch.finfo(gram.dtype).tiny  # of features that are never active
    return torch.clamp(damp * gram.diagonal().mean(), min=least)


def inverse(gram: Tensor, damp: float = DAMP) -> Tensor:
    """The inverse of the damped moment, float64 ``[n, n]``."""
    return _inverse_(gram.to(torch.float64, copy=True), damp)


def _inverse_(gram: Tensor, damp: float = DAMP) -> Tensor:
    """The same in the place of ``gram``, which is float64."""
    lower = _cholesky_(_damp_(gram, damp))
    return torch.cholesky_inverse(lower, out=lower)


def _cholesky_(matrix: Tensor) -> Tensor:
    """The lower factor, in the place of the symmetric ``matrix``, which is C-contiguous.

    Of 8192 features each copy has half a GiB; torch makes none where columns are contiguous.
    """
    columns = matrix.mT
    return torch.linalg.cholesky(columns, out=columns)


def leverage(gram: Tensor, damp: float = DAMP) -> Tensor:
    """Ridge leverage of each feature, float64 ``[n]`` in ``[0, 1]``."""
    gram = gram.double()
    return 1 - _ridge(gram, damp) * inverse(gram, damp).diagonal()


def removal_errors(weight: Tensor, moment_inverse: Tensor, block: int = 1) -> Tensor:
    """Output error after each block of features is removed and the others are refitted.

    Args:
        weight: float64 ``[rows, n]``.
        moment_inverse: float64 ``[n, n]``, of `inverse`.
        block: Consecutive features that go together; divides n.

    Returns:
        float64 ``[n / block]``: mean square over tokens, summed over rows.
    """
    if block == 1:
        return weight.square().sum(0) / moment_inverse.diagonal()
    n = len(moment_inverse) // block
    blocks = moment_inverse.view(n, block, n, block).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    columns = weight.view(len(weight), n, block).permute(1, 2, 0)
    return (columns * torch.linalg.solve(blocks, columns)).sum((1, 2))


def select(weight: Tensor, gram: Tensor, n_kept: int, block: int = 1) -> Tensor:
    """Blocks to keep, those removed costing least at each of `ROUNDS` rounds.

    Args:
        weight: ``[rows, n]``.
        gram: Second moment of the features, float64 ``[n, n]``; written over.
        n_kept: Blocks that stay.
        block: Consecutive features in a block.

    Returns:
        int64 ``[n_kept]``, ascending.
    """
    n_gone = len(gram) // block - n_kept
    moment, w = _inverse_(gram), weight.to(torch.float64, copy=True)
    is_gone = torch.zeros(n_kept + n_gone, dtype=torch.bool)
    step = max(1, -(-n_gone // ROUNDS)) if block == 1 else 1
    for done in range(0, n_gone, step):
        n_now = min(step, n_gone - done)
        errors = removal_errors(w, moment, block).masked_fill(is_gone, torch.inf)
        near = errors.argsort(stable=True)[: 2 * n_now if n_now > 1 else 1]
        gone = near if n_now == 1 else near[_one_by_one(w, moment, near, n_now)]
        is_gone[gone] = True
        remove_(moment, w, features(gone, block))
    return (~is_gone).nonzero().flatten()


def _one_by_one(w: Tensor, moment: Tensor, near: Tensor, n: int) -> Tensor:
    """Positions in ``near`` of the ``n`` features that go, each choice knowing those before it.

    Removal changes the errors of others only through the moment between them, so the columns of
    ``near`` are all it takes.
    """
    small, columns = moment[near[:, None], near], w[:, near].clone()
    is_gone = torch.zeros(len(near), dtype=torch.bool)
    for _ in range(n):
        errors = removal_errors(columns, small).masked_fill(is_gone, torch.inf)
        gone = errors.argmin(keepdim=True)
        is_gone[gone] = True
        remove_(small, columns, gone)
    return is_gone.nonzero().flatten()


def remove_(moment: Tensor, w: Tensor, gone: Tensor) -> None:
    """Take features out of the inverse moment and refit ``w``, both in place.

    Block inversion. What is gone stays as features of unit variance without weight, so that
    nothing is copied: of 8192 features the moment has half a GiB.
    """
    across = torch.linalg.solve(moment[gone][:, gone], moment[gone])
    w.sub_(w[:, gone] @ across)
    moment.addmm_(moment[:, gone], across, alpha=-1)
    w[:, gone] = 0
    moment[gone] = 0
    moment[:, gone] = 0
    moment[gone, gone] = 1


def features(blocks: Tensor, block: int) -> Tensor:
    """Indices of the features in ``blocks``."""
    return (blocks[:, None] * block + torch.arange(block)).flatten()


def refit(weight: Tensor, gram: Tensor, cross: Tensor, damp: float = DAMP) -> Tensor:
    """Weights that minimize ``E|t - W x|^2 + damp |W - weight|^2``.

    Args:
        weight: Where the ridge pulls to, ``[rows, n]``.
        gram: ``E[x x^T]``, ``[n, n]``.
        cross: ``E[t x^T]``, ``[rows, n]``.
        damp: Of the mean of ``gram``'s diagonal.

    Returns:
        float64 ``[rows, n]``.
    """
    gram, weight = gram.double(), weight.double()
    lower = _cholesky_(damped(gram, damp))
    step = torch.addmm(cross.double(), weight, gram, alpha=-1).T
    step = torch.linalg.solve_triangular(lower, step, upper=False)  # cholesky_solve copies lower
    step = torch.linalg.solve_triangular(lower.mT, step, upper=True)
    return weight + step.T


def excess(weight: Tensor, gram: Tensor, cross: Tensor) -> float:
    """``|t - W x|^2`` less ``|t|^2``, summed or averaged as ``gram`` and ``cross`` are, float64."""
    weight, total = weight.double(), 0.0
    for at in range(0, len(gram), SLAB):  # a float32 moment is never whole in float64
        columns = slice(at, at + SLAB)
        part = weight @ gram[:, columns].double() - 2 * cross[:, columns]
        total += float((part * weight[:, columns]).sum())
    return total


def checked_refit(
    weight: Tensor, seen: tuple[Tensor, Tensor], held: tuple[Tensor, Tensor] | None
) -> Tensor:
    """The refit whose error is least on held-out tokens; ``weight`` itself if none is better.

    A map of many features follows the noise of few tokens; experts see few.

    Args:
        weight: ``[rows, n]``.
        seen: ``E[x x^T]`` and ``E[t x^T]`` that are fitted to.
        held: The same of tokens that are not, or their sums, float32 or float64; None: the
            strongest ridge is taken unchecked.
    """
    if held is None:
        return refit(weight, *seen, DAMPS[-1])
    best = weight.double()
    least = excess(best, *held)
    for damp in DAMPS:
        choice = refit(weight, *seen, damp)
        if (error := excess(choice, *held)) < least:
            best, least = choice, error
    return best
