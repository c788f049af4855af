"""BitStack's decomposition against its authors' steps written out in torch, and ours against it."""

import numpy as np
import pytest
import torch

from edgekit.kernels.bitstack_level import Level, to_bytes
from edgekit.kernels.bitstack_rows import add_levels
from edgekit.kernels.decompose import Settings, decompose, rank_for
from edgekit.kernels.decompose_ref import decompose_ref


def gaussian(rows, cols, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, cols)).astype(np.float32)


def uneven(rows, cols):
    """Rows and columns of very different sizes, as trained weights have them."""
    random = np.random.default_rng(1)
    scale = np.exp(0.5 * random.standard_normal((rows, 1))) * np.exp(
        0.5 * random.standard_normal(cols)
    )
    return (random.standard_normal((rows, cols)) * scale).astype(np.float32)


def curve(levels: list[Level], weights) -> tuple[list[int], list[float]]:
    """Bytes and relative Frobenius error after each level, none first."""
    total, sizes, errors = np.zeros_like(weights), [0], [1.0]
    for level in levels:
        add_levels([level], total)
        sizes.append(sizes[-1] + len(to_bytes(level)))
        errors.append(float(np.linalg.norm(weights - total) / np.linalg.norm(weights)))
    return sizes, errors


def authors_errors(weights, n_levels, rank):
    """Relative errors of arXiv 2410.23918's algorithm with its float16 factors, in torch."""
    left = residual = torch.from_numpy(weights)
    errors = []
    for _ in range(n_levels):
        sign = torch.where(residual < 0, -1.0, 1.0)
        u, s, v = torch.svd(residual.abs())
        a, b = u[:, :rank] * s[:rank].sqrt(), (v[:, :rank] * s[:rank].sqrt()).T
        residual = residual - sign * (a @ b)
        left = left - sign * (a.half().float() @ b.half().float())
        errors.append(float(left.norm() / torch.from_numpy(weights).norm()))
    return errors


# Relative errors of xinghaow99/BitStack at 9f333d6, `BitStackLinear.decompose_weight`, rank 16, on
# gaussian(160, 224), with its float16 factors
ORIGINAL = [0.51361, 0.26735, 0.14384, 0.07985, 0.04616, 0.02785]


def test_the_reference_is_the_authors_code():
    weights = gaussian(160, 224)
    _, ours = curve(decompose_ref(weights, 6), weights)
    np.testing.assert_allclose(ours[1:], ORIGINAL, rtol=0, atol=1e-5)


@pytest.mark.parametrize("make", [gaussian, uneven])
def test_the_reference_is_the_paper(make):
    weights = make(160, 224)
    _, ours = curve(decompose_ref(weights, 6), weights)
    theirs = authors_errors(weights, 6, 16)
    np.testing.assert_allclose(ours[1:], theirs, rtol=0, atol=1e-3)


@pytest.mark.parametrize("make", [gaussian, uneven])
@pytest.mark.parametrize("shape", [(256, 256), (256, 768), (512, 384)])
def test_the_default_has_no_more_error_at_the_bytes_of_each_level_of_the_reference(make, shape):
    weights = make(*shape)
    ref_bytes, ref_errors = curve(decompose_ref(weights, 8), weights)
    sizes, errors = curve(list(decompose(weights, 16)), weights)
    at = np.exp(np.interp(ref_bytes, sizes, np.log(errors)))
    assert (at[1:] <= np.array(ref_errors)[1:]).all()


def test_at_the_paper_s_sizes_a_level_is_smaller_and_closer_than_the_reference_s():
    weights = uneven(640, 640)
    ref_bytes, ref_errors = curve(decompose_ref(weights, 4), weights)
    sizes, errors = curve(list(decompose(weights, 4)), weights)
    assert rank_for(640, 640) == 20
    assert all(a < b for a, b in zip(sizes[1:], ref_bytes[1:], strict=True))
    assert all(a < b for a, b in zip(errors[1:], ref_errors[1:], strict=True))


def test_randomized_factors_are_as_good_as_a_full_svd_where_singular_values_fall():
    random = np.random.default_rng(3)
    smooth = np.abs(random.standard_normal((120, 4))) @ np.abs(random.standard_normal((4, 90)))
    weights = (smooth * np.sign(random.standard_normal(smooth.shape))).astype(np.float32)
    [level] = decompose(weights, 1, Settings(rank=4, halves=True))
    total = np.zeros_like(weights)
    add_levels([level], total)
    assert np.linalg.norm(weights - total) <= 2e-3 * np.linalg.norm(weights)  # float16 factors


def test_a_level_mends_the_rounding_of_the_one_before():
    """Factors of 8 bits end where those of float16 do: what rounding costs is in the residual."""
    weights = uneven(128, 192)
    _, coarse = curve(list(decompose(weights, 8, Settings(rank=8))), weights)
    _, fine = curve(list(decompose(weights, 8, Settings(rank=8, halves=True))), weights)
    np.testing.assert_allclose(coarse, fine, rtol=0.01)


@pytest.mark.parametrize("settings", [Settings(), Settings(group=32), Settings(halves=True)])
def test_weights_move_the_error_to_where_it_costs_little(settings):
    weights = gaussian(96, 128)
    heavy = np.ones(128, np.float32)
    heavy[::4] = 10
    errors = {}
    for name, columns in (("plain", None), ("weighted", heavy)):
        total = np.zeros_like(weights)
        add_levels(list(decompose(weights, 2, settings, None, columns)), total)
        errors[name] = float((((weights - total) * heavy) ** 2).sum())
    assert errors["weighted"] < errors["plain"]


def test_groups_of_columns_have_factors_of_their_own():
    """A matrix whose groups differ in their rows' sizes is exact with groups, not without."""
    random = np.random.default_rng(2)
    rows = np.exp(random.standard_normal((64, 4))).repeat(32, axis=1)
    weights = (rows * np.sign(random.standard_normal((64, 128)))).astype(np.float32)
    errors = {}
    for group in (32, 0):
        [level] = decompose(weights, 1, Settings(group=group, rank=1))
        total = np.zeros_like(weights)
        add_levels([level], total)
        errors[group] = np.linalg.norm(weights - total) / np.linalg.norm(weights)
    assert errors[32] < 1e-3 < 0.1 < errors[0]


def test_the_same_seed_gives_the_same_bytes():
    weights = gaussian(70, 90)
    first, again = ([to_bytes(lv) for lv in decompose(weights, 3)] for _ in range(2))
    assert first == again


def test_a_matrix_of_zeros_stays_one():
    weights = np.zeros((16, 24), np.float32)
    total = np.zeros_like(weights)
    add_levels(list(decompose(weights, 2)), total)
    assert not total.any()
