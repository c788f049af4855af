"""Mapping of stored: bits against safetensors, decisions against llama.cpp, tensors amiss."""

import json
import random
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest
import torch
from mappings import refused
from safetensors.torch import load_file, save_file

from edgekit.arch import ARCHS, SourceTensor, map_checkpoint
from edgekit.checkpoint import Checkpoint
from edgekit.errors import UnsupportedError
from edgekit.exporters.gguf import TensorInfo, write_gguf
from edgekit.exporters.gguf_values import string

MOE = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")


def resaved(checkpoint: Checkpoint, folder: Path, **changes: torch.Tensor | None) -> Checkpoint:
    """A copy with tensors replaced, added or (None) left out; ``__`` in a name is a dot."""
    tensors = load_file(checkpoint.folder / "model.safetensors")
    for name, tensor in changes.items():
        tensors.pop(name.replace("__", "."), None)
        if tensor is not None:
            tensors[name.replace("__", ".")] = tensor
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(dict(checkpoint.config)))
    return Checkpoint.open(folder)


def by_name(checkpoint: Checkpoint) -> dict[str, SourceTensor]:
    return {t.name: t for t in map_checkpoint(checkpoint).tensors}


# values


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_bits_are_those_of_the_checkpoint(dtype: str, stored: Any) -> None:
    """Rows of Q and K in llama.cpp's order, spelled out here; everything else as it is."""
    checkpoint = stored("llama", dtype)
    stored = load_file(checkpoint.folder / "model.safetensors")
    tensors = by_name(checkpoint)
    q, k = (stored[f"model.layers.1.self_attn.{c}_proj.weight"] for c in "qk")
    # 6 heads and 3 of width 16: row 0 of a head, row 8, row 1, row 9, ...
    rows = [16 * head + i + half for head in range(6) for i in range(8) for half in (0, 8)]
    for name, want in {
        "token_embd.weight": stored["model.embed_tokens.weight"],
        "blk.1.ffn_down.weight": stored["model.layers.1.mlp.down_proj.weight"],
        "blk.0.attn_v.weight": stored["model.layers.0.self_attn.v_proj.weight"],
        "output.weight": stored["lm_head.weight"],
        "blk.1.attn_q.weight": q[rows[:96]],
        "blk.1.attn_k.weight": k[rows[:48]],
        "blk.0.attn_norm.weight": stored["model.layers.0.input_layernorm.weight"].float(),
    }.items():
        assert tensors[name].rows().tobytes() == raw(want), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_gemma_norms_are_one_more(dtype: str, stored: Any) -> None:
    checkpoint = stored("gemma3_text", dtype)
    stored = load_file(checkpoint.folder / "model.safetensors")
    tensors = by_name(checkpoint)
    for name, source in {
        "blk.0.attn_q_norm.weight": "model.layers.0.self_attn.q_norm.weight",
        "blk.0.post_ffw_norm.weight": "model.layers.0.post_feedforward_layernorm.weight",
        "output_norm.weight": "model.norm.weight",
    }.items():
        assert tensors[name].rows().tobytes() == raw(stored[source].float() + 1)


@pytest.mark.parametrize("model_type", MOE)
def test_experts_come_one_after_another(model_type: str, stored: Any) -> None:
    checkpoint = stored(model_type, "bfloat16")
    stored = load_file(checkpoint.folder / "model.safetensors")
    tensor = by_name(checkpoint)["blk.1.ffn_down_exps.weight"]
    names = sorted(
        n
        for n in stored
        if "layers.1." in n and n.endswith(("w2.weight", "down_proj.weight")) and ".experts." in n
    )
    want = torch.stack([stored[name] for name in names])
    assert tensor.shape == tuple(want.shape)
    assert tensor.rows().tobytes() == raw(want)
    rows = tensor.shape[1]
    assert tensor.rows(rows, 2 * rows).tobytes() == raw(want[1])


@pytest.mark.parametrize("model_type", ARCHS)
def test_any_range_of_rows_is_that_part_of_the_whole(model_type: str, stored: Any) -> None:
    rng = random.Random(3)
    for tensor in map_checkpoint(stored(model_type, "bfloat16")).tensors:
        whole = tensor.rows()
        assert whole.shape == (tensor.n_rows, tensor.row_bytes)
        assert whole.dtype == np.uint8
        assert tensor.n_rows * tensor.cols == tensor.n_weights
        for _ in range(4):
            start, stop = sorted(rng.randint(0, tensor.n_rows) for _ in range(2))
            np.testing.assert_array_equal(tensor.rows(start, stop), whole[start:stop])
        with pytest.raises(IndexError):
            tensor.rows(0, tensor.n_rows + 1)


@pytest.mark.parametrize("model_type", ARCHS)
def test_norms_biases_and_routers_are_float32_and_nothing_else(
    model_type: str, stored: Any
) -> None:
    """As llama.cpp's converter writes them; its graphs take only F32 for the 1-D ones."""
    ends = ("_norm.weight", ".bias", ".ffn_gate_inp.weight", ".ffn_gate_inp_shexp.weight")
    for tensor in map_checkpoint(stored(model_type, "bfloat16")).tensors:
        assert tensor.source_type == ("F32" if tensor.name.endswith(ends) else "BF16"), tensor.name


def test_experts_of_mixed_dtypes_are_widened(stored: Any, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.2.up_proj.weight"
    checkpoint = stored("qwen3_moe", "bfloat16")
    wide = load_file(checkpoint.folder / "model.safetensors")[name].float()
    tensor = by_name(resaved(checkpoint, tmp_path, **{name: wide}))["blk.0.ffn_up_exps.weight"]
    assert tensor.source_type == "F32"
    same = by_name(checkpoint)["blk.0.ffn_up_exps.weight"].rows().view(np.uint16)
    want = (same.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(tensor.rows().view(np.float32), want)


# decisions of llama.cpp


def quantized(source: Path, target: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Types and shapes after llama_model_quantize, every tensor to Q8_0 that may be."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.pure, params.nthread = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, True, 1
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), params) == 0
    reader = gguf.GGUFReader(target)
    return {t.name: (t.tensor_type.name, tuple(map(int, t.shape[::-1]))) for t in reader.tensors}


@pytest.mark.parametrize("model_type", ARCHS)
def test_quantizable_is_what_llama_cpp_quantizes(
    model_type: str, stored: Any, tmp_path: Path
) -> None:
    mapping = map_checkpoint(stored(model_type))
    vocab = {"tokenizer.ggml.model": string("no_vocab")}
    with (tmp_path / "source.gguf").open("wb") as file:
        infos = [TensorInfo(t.name, t.source_type, t.shape) for t in mapping.tensors]
        write_gguf(
            file, {**mapping.metadata, **vocab}, infos, ([t.rows()] for t in mapping.tensors)
        )
    got = quantized(tmp_path / "source.gguf", tmp_path / "quantized.gguf")
    assert {t.name: t.quantizable for t in mapping.tensors} == {
        name: kind != "F32" for name, (kind, _) in got.items()
    }
    assert {t.name: t.shape for t in mapping.tensors} == {n: shape for n, (_, shape) in got.items()}


@pytest.mark.parametrize("model_type", ARCHS)
def test_every_role_of_a_row_is_one_of_ggufs(model_type: str) -> None:
    arch = ARCHS[model_type]
    roles = {role.split(".")[0] for role in arch.tensors}
    assert roles <= {tensor.name for tensor in gguf.MODEL_TENSORS[arch.gguf]}


# tied heads and unused tensors


def test_a_stored_head_that_is_the_embedding_is_unused(stored: Any, tmp_path: Path) -> None:
    checkpoint = stored("gemma3_text")
    embedding = load_file(checkpoint.folder / "model.safetensors")["model.embed_tokens.weight"]
    for model_type in ("gemma3_text", "gemma2"):
        folder = tmp_path / model_type
        folder.mkdir()
        embedding = torch.from_numpy(stored(model_type).read("model.embed_tokens.weight").copy())
        copy = resaved(stored(model_type), folder, lm_head__weight=embedding)
        mapping = map_checkpoint(copy)
        assert mapping.unused == ("lm_head.weight",)
        assert "output.weight" not in {t.name for t in mapping.tensors}


def test_a_stored_head_of_its_own_counts_as_in_transformers(stored: Any, tmp_path: Path) -> None:
    embedding = torch.from_numpy(stored("gemma3_text").read("model.embed_tokens.weight").copy())
    embedding[-1, -1] += 1
    copy = resaved(stored("gemma3_text"), tmp_path, lm_head__weight=embedding)
    mapping = map_checkpoint(copy)
    assert by_name(copy)["output.weight"].rows().tobytes() == raw(embedding)
    assert "the stored one differs" in " ".join(mapping.notes)
    embedding = torch.from_numpy(stored("gemma2").read("model.embed_tokens.weight").copy()) + 1
    copy = resaved(stored("gemma2"), tmp_path, lm_head__weight=embedding)
    refused(copy, "differs from the embedding", UnsupportedError)


def test_buffers_of_old_checkpoints_are_unused(stored: Any, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    copy = resaved(stored("llama"), tmp_path, **{name: torch.ones(8)})
    assert map_checkpoint(copy).unused == (name,)


# tensors that are not as the config says


L0, EXPERT = "model.layers.0.", "model.layers.0.mlp.experts."
ONES = torch.ones
WRONG_TENSORS: list[tuple[str, str, torch.Tensor | None, str]] = [
    ("llama", "model.norm.weight", None, "lacks the tensor for 'output_norm.weight'"),
    ("llama", "lm_head.weight", None, r"lacks the tensor for 'output.weight' \[320, 96\]"),
    ("qwen2", L0 + "self_attn.k_proj.bias", None, "lacks the tensor for 'blk.0.attn_k.bias'"),
    ("llama", "model.norm.weight", ONES(95), r"the shape \[95\], config.json asks for \[96\]"),
    ("llama", "lm_head.weight", ONES(96, 320), r"has the shape \[96, 320\]"),
    ("llama", "lm_head.weight", ONES(2, 160, 96), r"has the shape \[2, 160, 96\]"),
    ("llama", "transformer.wte.weight", ONES(320, 96), "are both 'token_embd.weight'"),
    ("qwen3_moe", EXPERT + "3.up_proj.weight", None, "has 7 experts, .* expert 3 is missing"),
    ("qwen3_moe", EXPERT + "8.up_proj.weight", ONES(80, 96), "has 9 experts, .* expert 8"),
    ("qwen3_moe", EXPERT + "3.up_proj.weight", ONES(96, 80), r"has the shape \[96, 80\]"),
    ("qwen3_moe", EXPERT + "down_proj", ONES(8, 96, 80), "are both 'blk.0.ffn_down_exps.weight'"),
    ("qwen3_moe", EXPERT + "gate_up_proj", ONES(8, 161, 96), "experts need three"),
    ("qwen3_moe", L0 + "mlp.gate.weight", ONES(7, 96), r"has the shape \[7, 96\]"),
]
FOREIGN_TENSORS: list[tuple[str, str, torch.Tensor, str]] = [
    ("llama", "lm_head.weight", ONES(320, 96, dtype=torch.float64), "is F64; edgekit converts"),
    ("llama", "lm_head.weight", ONES(320, 96, dtype=torch.int8), "is I8; edgekit converts"),
    ("llama", "model.layers.2.mlp.up_proj.weight", ONES(176, 96), "no place for 'model.layers.2"),
    ("llama", "vision_tower.x.weight", ONES(2), "has no place for 'vision_tower.x.weight'"),
    ("llama", L0 + "self_attn.q_norm.weight", ONES(16), "no place for .*q_norm"),
    ("qwen3", L0 + "self_attn.o_proj.bias", ONES(96), "no place for .*o_proj.bias"),
    ("qwen2", L0 + "mlp.up_proj.bias", ONES(176), "no place for .*up_proj.bias"),
    ("gemma2", "lm_head.bias", ONES(320), "no place for 'lm_head.bias'"),
]


@pytest.mark.parametrize(("model_type", "name", "tensor", "text"), WRONG_TENSORS)
def test_tensors_that_do_not_fit_the_config_are_named(
    model_type: str, name: str, tensor: Any, text: str, stored: Any, tmp_path: Path
) -> None:
    refused(resaved(stored(model_type), tmp_path, **{name: tensor}), text)


@pytest.mark.parametrize(("model_type", "name", "tensor", "text"), FOREIGN_TENSORS)
def test_tensors_without_a_place_are_named(
    model_type: str, name: str, tensor: Any, text: str, stored: Any, tmp_path: Path
) -> None:
    refused(resaved(stored(model_type), tmp_path, **{name: tensor}), text, UnsupportedError)
