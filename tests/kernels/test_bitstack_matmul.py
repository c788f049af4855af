"""The Triton kernels against float64, in Triton's interpreter where there is no GPU.

A kernel may err by twice what plain torch does at the same type: the dense weight rounded to it,
then `torch.matmul`.
"""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="pip install 'edgekit[gpu]'")

from edgekit.kernels import bitstack_matmul, bitstack_triton, block_matmul, block_triton
from edgekit.kernels.bitstack_matmul import (
    FUSED_BATCH,
    SLAB_ROWS,
    PackedLevel,
    by_batch,
    dense_ref,
    matmul,
    packed,
)
from edgekit.kernels.bitstack_rows import add_levels
from edgekit.kernels.block_matmul import PackedBlocks
from edgekit.kernels.decompose import Settings, decompose
from edgekit.kernels.ggml import dequantize, quantize

DEVICE = "cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SETTINGS = {
    "rank 20 in 8 bits": Settings(rank=20),
    "rank 5 in float16": Settings(rank=5, halves=True),
    "rank 1": Settings(rank=1),
    "groups of 128": Settings(group=128),
    "groups of 50": Settings(group=50),
}


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=SETTINGS.values(), ids=SETTINGS)
def levels(request) -> list[PackedLevel]:
    """Six levels of a matrix whose sides are multiples of nothing."""
    weights = gaussian(45, 150).numpy()
    return [packed(level, DEVICE) for level in decompose(weights, 6, request.param)]


def assert_close(got, exact, naive):
    allowed = 2 * (naive.double() - exact).abs().max() + 1e-6 * exact.abs().max()
    assert (got.double() - exact).abs().max() <= allowed


def cut_off(values):
    """How Triton's interpreter makes bfloat16 of float32: with 1.98 to 2.001 times the error.

    GPUs round; `compile_kernels` looks for the instruction.
    """
    return (values.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_product_is_as_exact_as_plain_torch(levels, dtype, batch):
    x = gaussian(batch, 150, seed=1).to(DEVICE, dtype)
    exact = x.double() @ dense_ref(levels, torch.float64).T
    naive = x @ dense_ref(levels, torch.float32).to(dtype).T
    assert_close(bitstack_triton.launch_matmul(levels, x), exact, naive)


@pytest.mark.parametrize("depth", range(1, 7))
def test_every_depth(levels, depth):
    x, some = gaussian(2, 150, seed=2).to(DEVICE), levels[:depth]
    exact = x.double() @ dense_ref(some, torch.float64).T
    naive = x @ dense_ref(some, torch.float32).T
    assert_close(bitstack_triton.launch_matmul(some, x), exact, naive)
    assert_close(matmul(some, x), exact, naive)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dense_tiles_are_as_exact_as_plain_torch(levels, dtype):
    exact, naive = (dense_ref(levels, t) for t in (torch.float64, torch.float32))
    got = bitstack_triton.launch_dense(levels, dtype, 7, 41)
    assert got.shape == (34, 150)
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        sums = bitstack_triton.launch_dense(levels, torch.float32, 7, 41)
        assert torch.equal(got, cut_off(sums))
        got = sums.to(dtype)
    assert_close(got, exact[7:41], naive[7:41].to(dtype))


@pytest.mark.parametrize("shape", [(1, 8), (33, 129), (32, 128), (64, 16)])
def test_shapes_at_the_edges_of_tiles(shape):
    weights = gaussian(*shape).numpy()
    some = [packed(level, DEVICE) for level in decompose(weights, 2)]
    x = gaussian(17, shape[1], seed=3).to(DEVICE)
    exact = x.double() @ dense_ref(some, torch.float64).T
    assert_close(bitstack_triton.launch_matmul(some, x), exact, matmul(some, x))


def test_the_reference_gives_the_codec_s_rows():
    weights = gaussian(40, 90).numpy()
    for settings in SETTINGS.values():
        made = list(decompose(weights, 3, settings))
        rows = np.zeros_like(weights)
        add_levels(made, rows)
        ours = dense_ref([packed(level) for level in made], torch.float64)
        np.testing.assert_allclose(ours.numpy(), rows, rtol=0, atol=2e-6)


def test_leading_dimensions_are_kept(levels):
    x = gaussian(2, 3, 150).to(DEVICE)
    assert matmul(levels, x).shape == (2, 3, 45)
    assert bitstack_matmul.matmul_ref(levels, x).shape == (2, 3, 45)


@pytest.mark.parametrize("batch", [FUSED_BATCH, FUSED_BATCH + 1])
def test_small_batches_are_fused_and_large_ones_take_the_weight_slab_by_slab(batch):
    rows, slabs = SLAB_ROWS + 5, list[int]()
    some = [packed(level, DEVICE) for level in decompose(gaussian(rows, 24).numpy(), 2)]
    x = gaussian(batch, 24, seed=6).to(DEVICE)

    def dense(start, stop):
        slabs.append(stop - start)
        return bitstack_triton.launch_dense(some, x.dtype, start, stop)

    got = by_batch(x[None], rows, partial(bitstack_triton.launch_matmul, some), dense)
    assert slabs == ([] if batch == FUSED_BATCH else [SLAB_ROWS, 5])
    exact = x.double() @ dense_ref(some, torch.float64).T
    assert_close(got[0], exact, x @ dense_ref(some, torch.float32).T)


BLOCKS = sorted(block_triton.FAMILY)


@pytest.fixture(scope="module", params=BLOCKS)
def blocks(request) -> PackedBlocks:
    cols = 512 if request.param.endswith("K") else 288
    data = quantize(request.param, gaussian(19, cols, seed=4).numpy())
    return PackedBlocks(request.param, torch.from_numpy(data).to(DEVICE))


def test_blocks_become_what_ggml_dequantizes(blocks):
    got = block_triton.launch_dense(blocks, torch.float32)
    theirs = dequantize(blocks.type_name, blocks.data.cpu().numpy()).reshape(blocks.shape)
    np.testing.assert_allclose(got.cpu().numpy(), theirs, rtol=2**-22, atol=1e-7)  # ggml may fuse
    ours = block_matmul.dense_ref(blocks, torch.float32)
    assert torch.equal(block_triton.launch_dense(blocks, torch.float32, 3, 11), ours[3:11])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [1, 5])
def test_products_of_blocks_are_as_exact_as_plain_torch(blocks, dtype, batch):
    x = gaussian(batch, blocks.shape[1], seed=5).to(DEVICE, dtype)
    exact = x.double() @ block_matmul.dense_ref(blocks, torch.float64).T
    naive = x @ block_matmul.dense_ref(blocks, torch.float32).to(dtype).T
    assert_close(block_triton.launch_matmul(blocks, x), exact, naive)
    assert_close(block_matmul.matmul(blocks, x), exact, naive)


@pytest.mark.slow
def test_kernels_compile_for_gpus_use_their_tensor_cores_and_round(tmp_path):
    """In a process of its own: this one interprets. Triton brings its own assembler."""
    script = Path(__file__).with_name("compile_kernels.py")
    env = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["80", "mma", "cvt.rn.bf16", "90", "mma", "cvt.rn.bf16"]
