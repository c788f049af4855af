"""Low-rank repair against torch's SVD, and its adapter in stock llama.cpp."""

import ctypes
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
import torch
from converted import unmeasured
from gguf import GGUFReader
from stock_llama import StockModel

from edgekit.artifact import open_artifact
from edgekit.convert import convert
from edgekit.errors import UsageError
from edgekit.evaluate import kl_divergence
from edgekit.exporters.gguf import read_header
from edgekit.llama import open_model
from edgekit.materialize import materialize
from edgekit.plan import plan_tier
from edgekit.progress import Silent
from edgekit.pruning.repair import low_rank, repair, write_adapter
from edgekit.samples import calibration_text, heldout_text

SAMPLES = Path(__file__).resolve().parent.parent / "samples"


def example() -> tuple[torch.Tensor, torch.Tensor]:
    """An error ``[6, 10]`` and inputs ``[200, 10]`` that lie mostly in few directions."""
    random = torch.Generator().manual_seed(0)
    spread = torch.logspace(1, -1, 10, dtype=torch.float64)
    mix = torch.randn(10, 10, generator=random, dtype=torch.float64)
    x = (torch.randn(200, 10, generator=random, dtype=torch.float64) * spread) @ mix
    return torch.randn(6, 10, generator=random, dtype=torch.float64), x


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_no_correction_of_that_rank_has_less_error_on_the_inputs(rank):
    """The error that is left is that of the best approximation of the outputs (Eckart-Young)."""
    error, x = example()
    b, a = low_rank(error, x.T @ x / len(x), rank)
    left = float(((error - b @ a) @ x.T).norm())
    best = float(torch.linalg.svdvals(error @ x.T)[rank:].norm())
    assert torch.linalg.matrix_rank(b @ a) == rank
    assert left == pytest.approx(best, rel=1e-6, abs=1e-8 * float(error.norm()))


def test_with_white_inputs_it_is_the_plain_svd():
    error, _ = example()
    b, a = low_rank(error, torch.eye(10), 2)
    u, s, z = torch.linalg.svd(error, full_matrices=False)
    torch.testing.assert_close(b @ a, u[:, :2] * s[:2] @ z[:2])


def test_directions_without_inputs_are_not_blown_up():
    error, x = example()
    x[:, 4:] = 0
    b, a = low_rank(error, x.T @ x / len(x), 3)
    assert (b @ a).abs().max() < 10 * error.abs().max()


@pytest.mark.parametrize("rank", [0, -1, 7])
def test_a_rank_out_of_range_is_refused(rank):
    error, x = example()
    with pytest.raises(UsageError, match=r"give --repair-rank 1 to 6"):
        low_rank(error, x.T @ x, rank)


def test_an_adapter_of_rank_0_cannot_be_written(tmp_path):
    with pytest.raises(UsageError, match="give --repair-rank 1 or more"):
        repair(SAMPLES / "tiny-llama", tmp_path / "a.gguf", "Q2_K", 0)
    empty = {"blk.0.attn_q.weight.lora_a": np.zeros((0, 256), np.float32)}
    from edgekit.arch import map_checkpoint
    from edgekit.checkpoint import Checkpoint

    mapping = map_checkpoint(Checkpoint.open(SAMPLES / "tiny-llama"))
    with pytest.raises(UsageError, match="no rank may be 0"):
        write_adapter(tmp_path / "a.gguf", mapping, empty, 1)
    assert list(tmp_path.iterdir()) == []


def stock_logits(model: Path, adapter: Path | None, tokens: list[int]) -> np.ndarray:
    """Logits of a GGUF in stock llama.cpp, with an adapter."""
    with StockModel(model, len(tokens)) as stock:
        if adapter is not None:
            read_header(adapter)
            lora = llama_cpp.llama_adapter_lora_init(stock.model, str(adapter).encode())
            assert lora, "llama.cpp refuses the adapter"
            adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(lora)
            scales = (ctypes.c_float * 1)(1.0)
            assert llama_cpp.llama_set_adapters_lora(stock.context, adapters, 1, scales) == 0
        return stock.logits(tokens)


@pytest.mark.parametrize("sample", ["tiny-llama", pytest.param("tiny-moe", marks=pytest.mark.slow)])
def test_the_adapter_loads_in_llama_cpp_and_lowers_the_divergence_of_q2_k(sample, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(calibration_text()[:24_000])
    asked = unmeasured(("Q2_K", "source"), calibration=text)
    convert(SAMPLES / sample, tmp_path / "edge", asked, Silent())
    with open_artifact(tmp_path / "edge") as artifact:
        for tier in ("Q2_K", "source"):
            materialize(artifact, plan_tier(artifact, tier).depths, tmp_path / f"{tier}.gguf")
    adapter = tmp_path / "adapter.gguf"
    n_bytes = repair(SAMPLES / sample, adapter, "Q2_K", 8, text=text, n_tokens=4096)
    assert n_bytes == adapter.stat().st_size < (tmp_path / "Q2_K.gguf").stat().st_size / 3
    with open_model(tmp_path / "source.gguf", vocab_only=True) as vocab:
        tokens = vocab.tokenize(heldout_text())[:512]
    exact = stock_logits(tmp_path / "source.gguf", None, tokens)
    plain = kl_divergence(exact, stock_logits(tmp_path / "Q2_K.gguf", None, tokens)).mean()
    repaired = kl_divergence(exact, stock_logits(tmp_path / "Q2_K.gguf", adapter, tokens)).mean()
    assert repaired < 0.9 * plain
    ranks = {tuple(t.shape)[1] for t in GGUFReader(adapter).tensors if t.name.endswith("lora_a")}
    assert ranks == {8}
