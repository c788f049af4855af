"""Nested codes: joint choice is optimal, planes hold every code, C equals numpy."""

import numpy as np
import pytest

from edgekit.kernels import slices, slices_ref
from edgekit.kernels.native import native


def blocks(n: int = 200, size: int = 64, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Weights of several sizes and shapes, some blocks of zeros, one-sided, or with an outlier."""
    random = np.random.default_rng(seed)
    weights = random.standard_normal((n, size)) * 10.0 ** random.uniform(-3, 1, (n, 1))
    weights[::7] = np.abs(weights[::7])
    weights[1::7] = -np.abs(weights[1::7])
    weights[2::7, 3] *= 30
    weights[3] = 0
    weights[4, 1:] = 0
    importance = random.gamma(0.5, 100.0, (n, size)) + 1e-3
    return weights.astype(np.float32), importance.astype(np.float32)


def dequantized(found: slices.Slices) -> list[np.ndarray]:
    """The weights of depths 8, 4 and 2, by the definition of the issue's two equations."""
    q8 = found.codes.astype(np.int32)
    q4 = np.floor_divide(q8 + 8, 16)
    q2 = np.floor_divide(q4 + 2, 4)
    pairs = zip(found.scales, (q8, q4, q2), strict=True)
    return [scale[:, None] * q.astype(np.float32) for scale, q in pairs]


def errors(found: slices.Slices, weights: np.ndarray, importance: np.ndarray) -> np.ndarray:
    return np.array([(importance * (weights - w) ** 2).sum() for w in dequantized(found)])


@pytest.mark.parametrize("low_bits", [2, 4])
def test_planes_of_two_and_four_bits_hold_every_code(low_bits):
    weights, importance = blocks()
    q8 = slices.encode(weights, importance, low_bits).codes.astype(int)
    q4 = (q8 + 8) // 16
    q2 = (q4 + 2) // 4
    assert (q8 - 16 * q4).min() >= -8 and (q8 - 16 * q4).max() <= 7
    assert q4.min() >= -8 and q4.max() <= 7
    if low_bits == 2:
        assert (q4 - 4 * q2).min() >= -2 and (q4 - 4 * q2).max() <= 1
        assert q2.min() >= -2 and q2.max() <= 1


@pytest.mark.parametrize("low_bits", [2, 4])
def test_joint_codes_are_the_best_of_all_legal_codes(low_bits):
    """Tried one by one, for the scales that were found."""
    weights, _ = blocks(40)
    scales = tuple(np.abs(slices.plain(weights, low_bits).scales) * np.float32(0.93))
    got = slices_ref.joint(weights, scales, low_bits)
    legal = np.arange(-128, slices_ref.highest(low_bits) + 1)
    q4 = (legal + 8) // 16
    levels = [legal, q4, (q4 + 2) // 4][: 3 if low_bits == 2 else 2]
    cost = sum(
        (weights[..., None].astype(float) - s[:, None, None].astype(float) * level) ** 2 / unit**2
        for s, level, unit in zip(scales, levels, (1, 16, 64), strict=False)
    )
    least = cost.min(-1)
    taken = np.take_along_axis(cost, (got.astype(int) + 128)[..., None], -1)[..., 0]
    np.testing.assert_allclose(taken, least, rtol=1e-4, atol=1e-12)


def test_the_least_and_largest_code_are_used_and_nothing_else_clips():
    """A block that reaches as far as the range: its extremes come back within half a step."""
    weights = np.linspace(-1.28, 0.87, 64, dtype=np.float32)[None]
    found = slices.encode(weights, np.ones_like(weights), 2)
    step = abs(found.scales[0, 0])
    assert found.codes.min() == -128 and found.codes.max() in (86, 87)
    assert np.abs(dequantized(found)[0] - weights).max() <= 2 * step


def test_a_mirrored_block_gets_a_negative_scale():
    """The longer side of the range goes to the side that reaches further."""
    weights = np.linspace(-1.28, 0.87, 64, dtype=np.float32)[None]
    ones = np.ones_like(weights)
    found, mirrored = slices.encode(weights, ones, 2), slices.encode(-weights, ones, 2)
    assert (found.scales > 0).all() and (mirrored.scales < 0).all()
    assert np.array_equal(found.codes, mirrored.codes)


def test_zeros_stay_zeros():
    weights = np.zeros((3, 64), np.float32)
    assert all(not w.any() for w in dequantized(slices.encode(weights, weights + 1, 2)))


@pytest.mark.parametrize("size", [32, 64, 128])
def test_joint_choice_lowers_the_error_of_every_depth(size):
    """Against 8-bit codes cut to their leading bits; depth 8 may lose 2 %, and gains."""
    random = np.random.default_rng(1)
    weights = random.standard_normal((500, size)).astype(np.float32)
    ones = np.ones_like(weights)
    ratio = errors(slices.encode(weights, ones, 2), weights, ones) / errors(
        slices.plain(weights, 2), weights, ones
    )
    assert ratio[0] <= 1.02 and ratio[1] < 1 and ratio[2] < 0.9, ratio


def test_importance_moves_the_error_to_columns_that_matter_less():
    weights, importance = blocks(300)
    importance[:, :32] *= 100
    weighted = slices.encode(weights, importance, 2)
    alike = slices.encode(weights, np.ones_like(weights), 2)
    got, want = errors(weighted, weights, importance), errors(alike, weights, importance)
    assert (got[1:] < want[1:]).all()


@pytest.mark.skipif(native() is None, reason="the kernels are not compiled")
@pytest.mark.parametrize("low_bits", [2, 4])
@pytest.mark.parametrize("size", [32, 64, 128])
def test_compiled_codes_equal_the_reference(size, low_bits):
    weights, importance = blocks(300, size)
    got, want = (f(weights, importance, low_bits) for f in (slices.encode, slices_ref.encode))
    assert np.array_equal(got.codes, want.codes)
    assert np.array_equal(got.scales, want.scales)


def test_scales_are_exact_in_half_precision():
    weights, importance = blocks()
    scales = slices.encode(weights, importance, 2).scales
    assert np.array_equal(scales, scales.astype(np.float16).astype(np.float32))
