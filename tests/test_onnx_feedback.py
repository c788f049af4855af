"""Error feedback in a conversion: every matrix has its inputs' moments, every expert its own."""

from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner
from onnx_models import checkpoint_of, dense, opened

from edgekit.arch import ARCHS
from edgekit.checkpoint import Checkpoint
from edgekit.cli import main
from edgekit.convert import convert
from edgekit.convert_options import Options
from edgekit.imatrix import read_imatrix
from edgekit.kernels import feedback, slices
from edgekit.onnx import slicing
from edgekit.onnx.artifact import open_onnx
from edgekit.onnx.feedback import Feedback
from edgekit.progress import Silent


@pytest.fixture(scope="module", params=["llama", "phi3", "qwen2_moe"])
def checkpoint(request, tmp_path_factory):
    """Tied, fused, and with experts beside a shared one."""
    assert ARCHS[request.param].has_onnx
    return checkpoint_of(request.param, tmp_path_factory.mktemp(request.param) / "checkpoint")


def test_planes_hold_what_the_kernel_gives(checkpoint, tmp_path):
    """Each matrix computed again from its own moment, one expert at a time."""
    text = tmp_path / "text.txt"
    text.write_text("ab cd ef 12 " * 300)
    kept = tmp_path / "imatrix.gguf"
    options = Options(formats=("onnx",), calibration=text, measure=False, error_feedback="4")
    convert(checkpoint, tmp_path / "a", replace(options, save_imatrix=kept), Silent())
    part = open_onnx(tmp_path / "a").part
    mapping, _ = opened(checkpoint)
    source = Feedback(Checkpoint.open(checkpoint), mapping, text, "4")
    imatrix, n = read_imatrix(kept), 0
    for matrix in slicing.divided(mapping.tensors)[0]:
        factors, item = source.factors(matrix.parts[0].name), part.store[matrix.name]
        experts = matrix.shape[0] if len(matrix.shape) == 3 else 1
        assert len(factors) == (experts if matrix.name.startswith("blk.") else 0), matrix.name
        weights = np.concatenate([chunk.weights() for chunk in matrix.chunks()])
        weights = weights.reshape(experts, -1, matrix.shape[-1])
        importance = slicing._importance(matrix, imatrix)
        found = dense(tmp_path / "a/onnx", item, 8).reshape(weights.shape)
        for expert, factor in enumerate(factors):
            rows = weights[expert]
            alike = np.broadcast_to(importance[expert], rows.shape)
            want = feedback.encode(rows, alike, factor, item.block, feedback.CARRIED["4"])
            want8 = slices.dequantized(want)[8].reshape(rows.shape)
            assert (found[expert] == want8).mean() > 0.99, matrix.name
            n += 1
    assert n >= 8


@pytest.mark.parametrize(
    ("rest", "why"),
    [
        (["--format", "gguf"], "is for ONNX codes, not for gguf"),
        (["--format", "onnx", "--no-calibration"], "needs a text to calibrate on"),
    ],
)
def test_without_onnx_or_a_text_it_is_a_wrong_use(checkpoint, tmp_path, rest, why):
    words = ["convert", str(checkpoint), "-o", str(tmp_path / "a"), "--error-feedback", "4"]
    done = CliRunner().invoke(main, [*words, *rest])
    assert done.exit_code == 2 and why in done.stderr
    assert list(tmp_path.iterdir()) == []
