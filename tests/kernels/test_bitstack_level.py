"""A level's bytes, written out by hand, and what they mean; compiled rows equal the definition."""

import struct

import numpy as np
import pytest

from edgekit.errors import RefusedError
from edgekit.kernels.bitstack_level import Level, from_bytes, n_bytes, pack_signs, to_bytes
from edgekit.kernels.bitstack_rows import add_levels, add_levels_ref
from edgekit.kernels.decompose import Settings, decompose

# 2 x 3, rank 1, 8 bits, gain 2: v = [1, 2, -3] * [1, 0.5, 2], u = [4, -5] * [1, 0.25] * gain
GOLDEN = (
    bytes([1, 1, 1, 0])
    + struct.pack("<IfI", 3, 2.0, 0)
    + np.array([1, 0.5, 2, 1, 0.25], "<f2").tobytes()
    + bytes([1, 2, 0xFD, 4, 0xFB])
    + bytes([0b101, 0b110])
)
PRODUCT = np.array([[8, 8, -48], [-2.5, -2.5, 15]], np.float32)
SIGNS = np.array([[1, -1, 1], [-1, 1, 1]], np.float32)


def test_golden_bytes():
    values = np.ones((2, 3), np.float32)
    add_levels([from_bytes(GOLDEN, 2, 3)], values)
    np.testing.assert_array_equal(values, 1 + PRODUCT * SIGNS)
    assert to_bytes(from_bytes(GOLDEN, 2, 3)) == GOLDEN
    assert len(GOLDEN) == n_bytes(2, 3, kind=1, rank=1, group=3)


@pytest.mark.parametrize("settings", [Settings(rank=3), Settings(group=5), Settings(halves=True)])
@pytest.mark.parametrize("shape", [(7, 13), (33, 600), (4, 1030)])
def test_compiled_rows_are_the_definition_s_bit_for_bit(settings, shape):
    weights = np.random.default_rng(5).standard_normal(shape).astype(np.float32)
    levels = [from_bytes(to_bytes(lv), *shape) for lv in decompose(weights, 4, settings)]
    ours, theirs = np.ones(shape, np.float32), np.ones(shape, np.float32)
    add_levels(levels, ours)
    add_levels_ref(levels, theirs)
    np.testing.assert_array_equal(ours.view(np.uint32), theirs.view(np.uint32))
    some = np.ones((2, shape[1]), np.float32)
    add_levels([lv.rows(1, 3) for lv in levels], some)
    np.testing.assert_array_equal(some, ours[1:3])


def test_zero_counts_as_plus():
    signs = pack_signs(np.array([[0.0, -0.0, -1e-30, 1]], np.float32))
    assert signs.tolist() == [[0b1011]]


DAMAGE = {
    "cut": GOLDEN[:-1],
    "long": GOLDEN + b"\0",
    "empty": b"",
    "format": b"\2" + GOLDEN[1:],
    "kind": GOLDEN[:1] + b"\2" + GOLDEN[2:],
    "rank": GOLDEN[:2] + b"\0" + GOLDEN[3:],
    "no group": GOLDEN[:4] + bytes(4) + GOLDEN[8:],
    "wide group": GOLDEN[:4] + b"\4" + GOLDEN[5:],
    "gain": GOLDEN[:8] + struct.pack("<f", float("nan")) + GOLDEN[12:],
    "negative gain": GOLDEN[:8] + struct.pack("<f", -2.0) + GOLDEN[12:],
    "huge gain": GOLDEN[:8] + struct.pack("<f", 2.0**127) + GOLDEN[12:],
    "infinite scale": GOLDEN[:18] + b"\0\x7c" + GOLDEN[20:],
    "a scale that is none": GOLDEN[:22] + b"\1\x7c" + GOLDEN[24:],
    "a factor that is none": (
        bytes([1, 0, 1, 0]) + GOLDEN[4:16] + bytes(6) + b"\1\x7c" + bytes(2) + GOLDEN[-2:]
    ),
    "reserved": GOLDEN[:12] + b"\1" + GOLDEN[13:],
}


@pytest.mark.parametrize("data", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_level_is_refused(data):
    with pytest.raises(RefusedError, match="2 x 3 weights; it is corrupt"):
        from_bytes(data, 2, 3)


def test_a_level_is_of_the_matrix_it_was_made_for():
    with pytest.raises(RefusedError):
        from_bytes(GOLDEN, 3, 2)
    assert isinstance(from_bytes(memoryview(GOLDEN), 2, 3), Level)
