"""Error feedback is GPTQ: against its definition by elimination, in float64, one row at a time."""

import numpy as np
import pytest

from edgekit.kernels import slices
from edgekit.kernels.feedback import CARRIED, DAMP, encode, inverse_factor

BLOCK, ROWS, COLS = 32, 6, 96
UNITS = np.array([1.0, 1 / 16**2, 1 / 64**2])  # of the square errors at 8, 4 and 2 bits


def layer(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Weights ``[ROWS, COLS]`` and correlated inputs ``[n, COLS]``."""
    random = np.random.default_rng(seed)
    mixed = random.standard_normal((600, 20)) @ random.standard_normal((20, COLS))
    inputs = mixed + 0.3 * random.standard_normal((600, COLS))
    return random.standard_normal((ROWS, COLS)).astype(np.float32), inputs


def levels(code: np.ndarray) -> np.ndarray:
    """Codes of depths 8, 4 and 2 within master codes."""
    four = np.floor((code + 8) / 16)
    return np.stack([code, four, np.floor((four + 2) / 4)])


def gptq(weights: np.ndarray, moment: np.ndarray, scales: np.ndarray, carried):
    """Column by column: the best legal code, then the best change of all columns behind it.

    With column ``j`` fixed, ``||dW X||`` is least where ``dW = -e [H^-1]_j / [H^-1]_jj`` over the
    columns that are left, whose inverse is then found by taking ``j`` out of the moment itself.
    """
    work, codes = weights.astype(np.float64), np.zeros(weights.shape)
    h = moment / moment.diagonal().mean() + DAMP * np.eye(len(moment))
    legal = np.arange(-128, 88)
    for j in range(weights.shape[1]):
        scale = scales[:, :, j // BLOCK]
        inverse = np.linalg.inv(h[j:, j:])
        for row in range(len(weights)):
            w = work[row, j]
            cost = UNITS @ (w - scale[:, row, None] * levels(legal)) ** 2
            codes[row, j] = legal[cost.argmin()]
            each = w - scale[:, row] * levels(codes[row, j])
            work[row, j:] -= (np.array(carried) @ each) * inverse[0] / inverse[0, 0]
    return codes


@pytest.mark.parametrize("carried", ["mean", "8", "4", "2"])
def test_codes_are_those_of_the_definition(carried):
    """For the scales that were found; sums in float32 may tip a few codes to their neighbour."""
    weights, inputs = layer()
    moment = inputs.T @ inputs
    importance = np.ones_like(weights)
    got = encode(weights, importance, inverse_factor(moment), BLOCK, CARRIED[carried])
    scales = got.scales.reshape(3, ROWS, -1).astype(np.float64)
    want = gptq(weights, moment, scales, CARRIED[carried])
    assert (got.codes.reshape(weights.shape) == want).mean() > 0.995


def test_independent_inputs_carry_nothing():
    """A diagonal moment leaves every column as it is, whatever is carried."""
    weights, _ = layer()
    factor = inverse_factor(np.diag(np.linspace(1, 9, COLS)))
    first, second = (encode(weights, np.ones_like(weights), factor, BLOCK, CARRIED[name])
                     for name in ("8", "2"))  # fmt: skip
    assert np.array_equal(first.codes, second.codes)


@pytest.mark.parametrize("depth", [8, 4, 2])
def test_the_output_is_closer_at_the_depth_whose_error_is_carried(depth):
    weights, inputs = layer()
    ones = np.ones_like(weights)
    factor = inverse_factor(inputs.T @ inputs)
    plain = slices.encode(weights.reshape(-1, BLOCK), ones.reshape(-1, BLOCK), 2)
    found = encode(weights, ones, factor, BLOCK, CARRIED[str(depth)])

    def error(codes: slices.Slices) -> float:
        rounded = slices.dequantized(codes)[depth].reshape(weights.shape)
        return float(np.linalg.norm((weights - rounded) @ inputs.T))

    assert error(found) < 0.5 * error(plain)


def test_inputs_that_no_text_had_round_each_weight_by_itself():
    factor = inverse_factor(np.zeros((COLS, COLS)))
    np.testing.assert_allclose(factor, np.eye(COLS) * factor[0, 0], atol=1e-7)


def test_planes_hold_every_code():
    weights, inputs = layer(1)
    factor = inverse_factor(inputs.T @ inputs)
    found = encode(weights, np.ones_like(weights), factor, BLOCK, CARRIED["2"])
    assert found.codes.max() <= 87
    assert np.array_equal(found.scales, found.scales.astype(np.float16).astype(np.float32))
