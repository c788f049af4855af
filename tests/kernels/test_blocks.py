"""Block layouts against blocks that ggml wrote and weights that ggml read."""

import numpy as np
import pytest

from edgekit.kernels import ggml
from edgekit.kernels.blocks import GROUP, LAYOUTS


@pytest.fixture(params=sorted(LAYOUTS))
def layout(request):
    return LAYOUTS[request.param]


def test_codes_times_scales_plus_offsets_are_ggmls_weights(layout):
    weights = np.random.default_rng(1).standard_normal((4, 512)).astype(np.float32)
    blocks = ggml.quantize(layout.name, weights).reshape(-1, layout.block_bytes)
    scale, offset = layout.scales(blocks)
    codes = layout.codes(blocks).reshape(len(blocks), -1, GROUP)
    ours = codes * scale[..., None] + offset[..., None]
    # Bit for bit where ggml multiplies and adds as written; a fused build differs in the last bit.
    theirs = ggml.dequantize(layout.name, blocks).reshape(ours.shape)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2.0**-23 * np.abs(offset).max())


def test_scale_bytes_and_codes_make_the_block_whatever_it_holds(layout):
    blocks = np.random.default_rng(2).integers(0, 256, (5, layout.block_bytes), np.uint8)
    again = np.zeros_like(blocks)
    again[:, layout.scale_index] = blocks[:, layout.scale_index]
    layout.put_codes(layout.codes(blocks), again)
    np.testing.assert_array_equal(again, blocks)
