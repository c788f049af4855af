"""ggml through ctypes, against gguf-py, llama.cpp's rules and ggml's own queries."""

import ctypes

import gguf
import numpy as np
import pytest

from edgekit.errors import RefusedError, UnknownNameError, UsageError
from edgekit.kernels import ggml

LISTED = sorted(ggml.TYPES)


def rows(n: int = 3, cols: int = 512) -> np.ndarray:
    return (np.random.default_rng(7).standard_normal((n, cols)) * 0.02).astype(np.float32)


@pytest.mark.parametrize("name", LISTED)
def test_types_are_what_gguf_says(name):
    kind = ggml.TYPES[name]
    theirs = gguf.GGMLQuantizationType[name]
    assert (kind.id, kind.block, kind.block_bytes) == (
        theirs.value,
        *gguf.GGML_QUANT_SIZES[theirs],
    )


@pytest.mark.parametrize("name", LISTED)
def test_types_that_need_an_imatrix_are_those_ggml_names(name):
    query = ctypes.CDLL(str(ggml.library_path())).ggml_quantize_requires_imatrix
    query.restype = ctypes.c_bool
    assert query(ggml.TYPES[name].id) == ggml.TYPES[name].needs_imatrix


@pytest.mark.parametrize("name", LISTED)
def test_dequantize_equals_gguf_py(name):
    blocks = ggml.quantize(name, rows(), np.ones(512, np.float32))
    theirs = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name])
    np.testing.assert_array_equal(ggml.dequantize(name, blocks), theirs.ravel())


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16", "F16", "F32"])
def test_quantize_equals_gguf_py(name):
    theirs = gguf.quants.quantize(rows(), gguf.GGMLQuantizationType[name])
    ours = ggml.quantize(name, rows())
    np.testing.assert_array_equal(ours, theirs.view(np.uint8).reshape(ours.shape))


def test_an_imatrix_changes_the_blocks_for_the_better_where_it_weighs():
    weight = np.ones(512, np.float32)
    weight[::2] = 100
    with_it, without = (
        ggml.dequantize("Q2_K", ggml.quantize("Q2_K", rows(), imatrix)).reshape(3, 512)
        for imatrix in (weight, None)
    )
    error = [((w - rows()) ** 2)[:, ::2].sum() for w in (with_it, without)]
    assert error[0] < 0.8 * error[1]


@pytest.mark.parametrize(
    ("tier", "cols", "expected"),
    [
        ("Q2_K", 512, "Q2_K"),
        ("Q2_K", 288, "Q4_0"),
        ("Q3_K", 288, "Q4_0"),
        ("Q4_K", 288, "Q5_0"),
        ("Q5_K", 288, "Q5_1"),
        ("Q6_K", 288, "Q8_0"),
        ("IQ2_XXS", 288, "IQ4_NL"),
        ("IQ4_XS", 288, "IQ4_NL"),
        ("TQ2_0", 288, "Q4_0"),
        ("Q4_K", 100, "F16"),
        ("Q8_0", 100, "F16"),
        ("IQ4_NL", 100, "F16"),
        ("BF16", 100, "BF16"),
    ],
)
def test_fallback_types_are_those_of_llama_quantize(tier, cols, expected):
    assert ggml.type_for(tier, cols) == expected


def test_a_row_that_is_not_whole_blocks_names_the_way_out():
    with pytest.raises(UsageError, match=r"blocks of 256 weights, got 288 columns; type_for"):
        ggml.row_bytes("Q4_K", 288)
    with pytest.raises(UsageError, match="got 288 columns"):
        ggml.quantize("Q4_K", rows(2, 288))


def test_an_unknown_type_gets_the_nearest_name():
    with pytest.raises(UnknownNameError, match="did you mean 'Q4_K'"):
        ggml.row_bytes("Q4_k", 256)


def test_a_type_that_needs_an_imatrix_says_so_instead_of_aborting():
    with pytest.raises(UsageError, match="IQ2_XXS cannot be quantized without an importance"):
        ggml.quantize("IQ2_XXS", rows())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(value):
    weights = rows()
    weights[1, 5] = value
    with pytest.raises(RefusedError, match="row 1, column 5"):
        ggml.quantize("Q4_K", weights)


def test_weights_beyond_the_range_of_half_scales_are_refused():
    with pytest.raises(RefusedError, match="Q8_0 cannot hold"):
        ggml.quantize("Q8_0", np.full((1, 32), 1e30, np.float32))


def test_a_bad_imatrix_is_refused():
    with pytest.raises(UsageError, match=r"needs shape \[512\], got \[3\]"):
        ggml.quantize("Q4_K", rows(), np.ones(3, np.float32))
    with pytest.raises(RefusedError, match="imatrix"):
        ggml.quantize("Q4_K", rows(), np.full(512, np.nan, np.float32))


def test_bytes_that_are_no_whole_blocks_are_refused():
    with pytest.raises(UsageError, match="144 bytes each, got 100"):
        ggml.dequantize("Q4_K", np.zeros(100, np.uint8))
