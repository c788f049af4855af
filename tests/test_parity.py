"""Logits of our source-tier GGUF in stock llama.cpp against those of transformers."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from models import VOCAB, make_checkpoint, whole_model
from stock_llama import StockModel, logits
from tokenizers import Tokenizer

from edgekit.arch import ARCHS, Mapping, map_checkpoint
from edgekit.checkpoint import Checkpoint
from edgekit.exporters.gguf import TensorInfo, write_gguf
from edgekit.exporters.gguf_values import string

Array = npt.NDArray[np.float32]
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
STORIES = DATA / "models" / "stories260K"
TOLERANCE = 1e-3
# ggml_gelu looks float32 inputs up in a table of 65,536 float16 values (ggml-cpu/vec.h), so Gemma's
# feed-forward has steps of 2**-11 relative. 4e-4 to 3.2e-3 were measured here; the other
# architectures give 2e-6 to 5e-6.
GELU_TOLERANCE = 6e-3
TOKENS = np.random.default_rng(1).integers(3, VOCAB, 64).tolist()


def write_source(folder: Path, path: Path) -> Mapping:
    """Write the source tier of ``folder`` without a vocabulary, rows in two pieces."""
    mapping = map_checkpoint(Checkpoint.open(folder))
    infos = [TensorInfo(t.name, t.source_type, t.shape) for t in mapping.tensors]
    data = (
        [t.rows(*cut) for cut in ((0, t.n_rows // 2), (t.n_rows // 2, t.n_rows)) if cut[0] < cut[1]]
        for t in mapping.tensors
    )
    vocab = {"tokenizer.ggml.model": string("no_vocab")}
    with path.open("wb") as file:
        write_gguf(file, {**mapping.metadata, **vocab}, infos, data)
    return mapping


def reference(folder: Path, tokens: list[int], gelu: torch.nn.Module | None = None) -> Array:
    """Logits of transformers; ``gelu`` replaces the activation."""
    model = whole_model(folder)
    for module in model.modules() if gelu is not None else ():
        if hasattr(module, "act_fn"):
            module.act_fn = gelu
    with torch.no_grad():
        return np.asarray(model(torch.tensor([tokens])).logits[0])


class TableGelu(torch.nn.Module):
    """ggml's GELU: a table from float16 to float16 inside (-10, 10)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
        return torch.where(x <= -10, torch.zeros_like(x), torch.where(x >= 10, x, y))


def check(folder: Path, tokens: list[int] = TOKENS, n_ctx: int = 0) -> Mapping:
    """Compare all positions, and for Gemma show that ggml's GELU is what differs."""
    mapping = write_source(folder, folder / "source.gguf")
    got, want = logits(folder / "source.gguf", tokens, n_ctx), reference(folder, tokens)
    off = np.abs(got - want)
    is_gelu = mapping.arch.activation.startswith("gelu")
    assert 0.3 < want.std() < 3, "logits of unit order"
    assert off.max() <= (GELU_TOLERANCE if is_gelu else TOLERANCE)
    assert (got.argmax(1) == want.argmax(1)).mean() >= 0.999
    if is_gelu:  # with the table in transformers too, only jumps at its steps are left
        assert np.abs(got - reference(folder, tokens, TableGelu())).mean() < off.mean() / 2
    return mapping


@pytest.mark.parametrize("width", ["narrow", "wide"])
@pytest.mark.parametrize("model_type", ARCHS)
def test_logits_equal_transformers(model_type: str, width: str, tmp_path: Path) -> None:
    mapping = check(make_checkpoint(model_type, tmp_path, width=width))
    assert mapping.unused == ()
    rows = {t.cols % 256 == 0 for t in mapping.tensors if t.quantizable}
    assert rows == {width == "wide"} or "head_dim" in mapping.arch.defaults or width == "wide"


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}


def longrope(n: int) -> dict[str, Any]:
    factors = np.random.default_rng(3).uniform(1, 4, (2, n)).round(3).tolist()
    return {"rope_type": "longrope", "short_factor": factors[0], "long_factor": factors[1]}


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama with Llama-3 RoPE": ("llama", {"rope_parameters": LLAMA3, "head_dim": 32}),
    "llama with linear RoPE": ("llama", {"rope_parameters": LINEAR}),
    "llama with YaRN": ("llama", {"rope_parameters": YARN, "head_dim": 64}),
    "qwen2 with YaRN": ("qwen2", {"rope_parameters": YARN}),
    "qwen3 with YaRN": ("qwen3", {"rope_parameters": YARN, "head_dim": 64}),
    "smollm3 with YaRN": ("smollm3", {"rope_parameters": YARN}),
    "olmo2 with YaRN": ("olmo2", {"rope_parameters": YARN}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama with a head width of its own": ("llama", {"head_dim": 40}),
    "llama without grouped queries": ("llama", {"num_key_value_heads": 6}),
    "llama with one key-value head": ("llama", {"num_key_value_heads": 1}),
    "llama with another base and epsilon": (
        "llama",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}, "rms_norm_eps": 0.1},
    ),
    "mistral with a head width of its own": ("mistral", {"head_dim": 40}),
    "mistral tied": ("mistral", {"tie_word_embeddings": True}),
    "mistral inside its window": ("mistral", {"sliding_window": 64}),
    "mixtral with one expert a token": ("mixtral", {"num_experts_per_tok": 1}),
    "mixtral with all experts": ("mixtral", {"num_experts_per_tok": 4}),
    "mixtral tied": ("mixtral", {"tie_word_embeddings": True}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2 with linear RoPE": ("qwen2", {"rope_parameters": LINEAR}),
    "qwen2-moe tied": ("qwen2_moe", {"tie_word_embeddings": True}),
    "qwen2-moe without biases": ("qwen2_moe", {"qkv_bias": False}),
    "qwen3 tied": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3-moe tied": ("qwen3_moe", {"tie_word_embeddings": True}),
    "phi3 tied": ("phi3", {"tie_word_embeddings": True}),
    "phi3 with LongRoPE, short": (  # llama.cpp rounds the context up to 256
        "phi3",
        {"rope_parameters": longrope(8), "original_max_position_embeddings": 256},
    ),
    "phi3 with LongRoPE, long": (
        "phi3",
        {"rope_parameters": longrope(8), "original_max_position_embeddings": 32},
    ),
    "phi3 rotating a part": (
        "phi3",
        {"rope_parameters": longrope(6) | {"partial_rotary_factor": 0.75}},
    ),
    "gemma2 with other windows": (
        "gemma2",
        {
            "num_hidden_layers": 3,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        },
    ),
    "gemma2 with windows only": ("gemma2", {"layer_types": ["sliding_attention"] * 2}),
    "gemma3 with windows only": (
        "gemma3_text",
        {"num_hidden_layers": 2, "layer_types": ["sliding_attention"] * 2},
    ),
    "gemma2 with other soft caps": (
        "gemma2",
        {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma2 with linear RoPE": ("gemma2", {"rope_parameters": LINEAR}),
    "gemma3 untied": ("gemma3_text", {"tie_word_embeddings": False}),
    "gemma3 with other windows": (
        "gemma3_text",
        {"num_hidden_layers": 2, "layer_types": ["full_attention", "sliding_attention"]},
    ),
    "gemma3 without windows": (
        "gemma3_text",
        {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2},
    ),
    "gemma3 with linear RoPE": (
        "gemma3_text",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            }
        },
    ),
    "gemma3 with a final soft cap": ("gemma3_text", {"final_logit_softcapping": 2.0}),
    "smollm3 untied": ("smollm3", {"tie_word_embeddings": False}),
    "smollm3 with linear RoPE": ("smollm3", {"rope_parameters": LINEAR}),
    "olmo2 tied": ("olmo2", {"tie_word_embeddings": True}),
    "olmoe tied": ("olmoe", {"tie_word_embeddings": True}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_of_a_variant_equal_transformers(variant: str, tmp_path: Path) -> None:
    model_type, fields = VARIANTS[variant]
    check(make_checkpoint(model_type, tmp_path, **fields), n_ctx=64)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"])
def test_fused_experts_give_the_same_tensors(model_type: str, tmp_path: Path) -> None:
    """Both layouts that transformers writes: a tensor per expert, and one for all."""
    split = make_checkpoint(model_type, tmp_path / "split")
    fused = make_checkpoint(model_type, tmp_path / "fused", save={"save_original_format": False})
    assert any(name.endswith("gate_up_proj") for name in Checkpoint.open(fused).tensors)
    one, two = (map_checkpoint(Checkpoint.open(folder)) for folder in (split, fused))
    assert [t.name for t in one.tensors] == [t.name for t in two.tensors]
    for left, right in zip(one.tensors, two.tensors, strict=True):
        np.testing.assert_array_equal(left.rows(), right.rows(), err_msg=left.name)


def old_style(change: Callable[[dict[str, Any]], None], folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def to_transformers_4(config: dict[str, Any]) -> None:
    """Published configs: base and scaling of RoPE side by side."""
    rope = config.pop("rope_parameters")
    if "full_attention" in rope:
        config["rope_theta"] = rope["full_attention"].pop("rope_theta")
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
        config["sliding_window_pattern"] = 6
        del config["layer_types"]
    else:
        config["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("llama", {"rope_parameters": LLAMA3}),
        ("qwen2", {"rope_parameters": LINEAR}),
        ("qwen3", {"rope_parameters": YARN}),
        ("phi3", {"rope_parameters": longrope(8), "original_max_position_embeddings": 32}),
        ("gemma3_text", {}),
        ("smollm3", {}),
    ],
)
def test_configs_of_transformers_4_mean_the_same(
    model_type: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    folder = make_checkpoint(model_type, tmp_path, **fields)
    new = map_checkpoint(Checkpoint.open(folder))
    old_style(to_transformers_4, folder)
    assert map_checkpoint(Checkpoint.open(folder)).metadata == new.metadata
    check(folder)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_runs_in_llama_cpp(dtype: str, tmp_path: Path) -> None:
    """Weights keep their 16 bits; ggml rounds activations to them too, hence the tolerance."""
    folder = make_checkpoint("llama", tmp_path, dtype)
    mapping = write_source(folder, tmp_path / "source.gguf")
    kinds = {t.name: t.source_type for t in mapping.tensors}
    assert kinds["blk.0.attn_q.weight"] == {"bfloat16": "BF16", "float16": "F16"}[dtype]
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    got, want = logits(tmp_path / "source.gguf", TOKENS), reference(folder, TOKENS)
    assert np.abs(got - want).max() < (0.1 if dtype == "bfloat16" else 0.02)


def stories(n_tokens: int) -> Iterator[list[int]]:
    """Stories 2000 to 2300 of the shared text, each with <s> in front."""
    tokenizer = Tokenizer.from_file(str(STORIES / "tokenizer.json"))
    text = (DATA / "text" / "tinystories.txt").read_text(encoding="utf-8")
    for story in text.split("<|endoftext|>")[2000:2300]:
        ids = tokenizer.encode(story.strip()).ids[:n_tokens]
        assert ids[0] == 1
        yield ids


@pytest.mark.skipif(not DATA.exists(), reason="the shared data is not there")
def test_a_trained_model_gives_the_logits_of_transformers(tmp_path: Path) -> None:
    mapping = write_source(STORIES, tmp_path / "stories.gguf")
    assert "output.weight" not in {t.name for t in mapping.tensors}  # tied
    tokens = next(stories(512))
    got, want = logits(tmp_path / "stories.gguf", tokens), reference(STORIES, tokens)
    assert np.abs(got - want).max() <= TOLERANCE * want.std()


@pytest.mark.slow  # 132,533 tokens, about 45 s of one core
@pytest.mark.skipif(not DATA.exists(), reason="the shared data is not there")
def test_stories260k_has_its_published_perplexity(tmp_path: Path) -> None:
    """4.2009 in the shared data's README; float32, tied."""
    write_source(STORIES, tmp_path / "stories.gguf")
    total = count = 0.0
    with StockModel(tmp_path / "stories.gguf", 512) as model:
        for ids in stories(512):
            scores = torch.log_softmax(torch.from_numpy(model.logits(ids)), 1)
            total -= float(scores[range(len(ids) - 1), ids[1:]].sum())
            count += len(ids) - 1
    assert np.exp(total / count) == pytest.approx(4.2009, rel=0.005)


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("windowed", [False, True])
def test_smallthinker_routes_before_attention_with_and_without_windows(
    softmax: bool, windowed: bool, tmp_path: Path
) -> None:
    pattern = [int(i % 4 != 0) for i in range(5)]
    layout = (
        {"sliding_window_layout": pattern, "rope_layout": pattern, "sliding_window_size": 4096}
        if windowed
        else {"sliding_window_layout": [0] * 5, "rope_layout": [1] * 5}
    )
    fields = layout | {"moe_primary_router_apply_softmax": softmax, "num_hidden_layers": 5}
    check(make_checkpoint("smallthinker", tmp_path, **fields))
