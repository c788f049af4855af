"""Mapping of checkpoints: bits against safetensors, decisions against llama.cpp, refusals."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest
import torch
from models import make_checkpoint
from safetensors.torch import load_file, save_file

from edgekit.arch import ARCHS, SourceTensor, map_checkpoint
from edgekit.checkpoint import Checkpoint
from edgekit.errors import RefusedError, UnsupportedError
from edgekit.exporters.gguf import TensorInfo, write_gguf
from edgekit.exporters.gguf_values import string

MOE = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``made(model_type, dtype)``: a checkpoint, made once."""
    cache: dict[tuple[str, str], Checkpoint] = {}

    def make(model_type: str, dtype: str = "float32") -> Checkpoint:
        if (model_type, dtype) not in cache:
            folder = tmp_path_factory.mktemp(f"{model_type}-{dtype}")
            cache[model_type, dtype] = Checkpoint.open(make_checkpoint(model_type, folder, dtype))
        return cache[model_type, dtype]

    return make


def with_config(checkpoint: Checkpoint, **fields: Any) -> Checkpoint:
    return replace(checkpoint, config={**checkpoint.config, **fields})


def without(checkpoint: Checkpoint, *keys: str) -> Checkpoint:
    return replace(checkpoint, config={k: v for k, v in checkpoint.config.items() if k not in keys})


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


def refused(checkpoint: Checkpoint, text: str, kind: type[RefusedError] = RefusedError) -> None:
    with pytest.raises(kind, match=text) as caught:
        map_checkpoint(checkpoint)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)


def by_name(checkpoint: Checkpoint) -> dict[str, SourceTensor]:
    return {t.name: t for t in map_checkpoint(checkpoint).tensors}


# values


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_bits_are_those_of_the_checkpoint(dtype: str, made: Any) -> None:
    """Rows of Q and K in llama.cpp's order, spelled out here; everything else as it is."""
    checkpoint = made("llama", dtype)
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
def test_gemma_norms_are_one_more(dtype: str, made: Any) -> None:
    checkpoint = made("gemma3_text", dtype)
    stored = load_file(checkpoint.folder / "model.safetensors")
    tensors = by_name(checkpoint)
    for name, source in {
        "blk.0.attn_q_norm.weight": "model.layers.0.self_attn.q_norm.weight",
        "blk.0.post_ffw_norm.weight": "model.layers.0.post_feedforward_layernorm.weight",
        "output_norm.weight": "model.norm.weight",
    }.items():
        assert tensors[name].rows().tobytes() == raw(stored[source].float() + 1)


@pytest.mark.parametrize("model_type", MOE)
def test_experts_come_one_after_another(model_type: str, made: Any) -> None:
    checkpoint = made(model_type, "bfloat16")
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
def test_any_range_of_rows_is_that_part_of_the_whole(model_type: str, made: Any) -> None:
    rng = random.Random(3)
    for tensor in map_checkpoint(made(model_type, "bfloat16")).tensors:
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
def test_norms_biases_and_routers_are_float32_and_nothing_else(model_type: str, made: Any) -> None:
    """As llama.cpp's converter writes them; its graphs take only F32 for the 1-D ones."""
    ends = ("_norm.weight", ".bias", ".ffn_gate_inp.weight", ".ffn_gate_inp_shexp.weight")
    for tensor in map_checkpoint(made(model_type, "bfloat16")).tensors:
        assert tensor.source_type == ("F32" if tensor.name.endswith(ends) else "BF16"), tensor.name


def test_experts_of_mixed_dtypes_are_widened(made: Any, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.2.up_proj.weight"
    checkpoint = made("qwen3_moe", "bfloat16")
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
    model_type: str, made: Any, tmp_path: Path
) -> None:
    mapping = map_checkpoint(made(model_type))
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


def test_a_stored_head_that_is_the_embedding_is_unused(made: Any, tmp_path: Path) -> None:
    checkpoint = made("gemma3_text")
    embedding = load_file(checkpoint.folder / "model.safetensors")["model.embed_tokens.weight"]
    for model_type in ("gemma3_text", "gemma2"):
        folder = tmp_path / model_type
        folder.mkdir()
        embedding = torch.from_numpy(made(model_type).read("model.embed_tokens.weight").copy())
        copy = resaved(made(model_type), folder, lm_head__weight=embedding)
        mapping = map_checkpoint(copy)
        assert mapping.unused == ("lm_head.weight",)
        assert "output.weight" not in {t.name for t in mapping.tensors}


def test_a_stored_head_of_its_own_counts_as_in_transformers(made: Any, tmp_path: Path) -> None:
    embedding = torch.from_numpy(made("gemma3_text").read("model.embed_tokens.weight").copy())
    embedding[-1, -1] += 1
    copy = resaved(made("gemma3_text"), tmp_path, lm_head__weight=embedding)
    mapping = map_checkpoint(copy)
    assert by_name(copy)["output.weight"].rows().tobytes() == raw(embedding)
    assert "the stored one differs" in " ".join(mapping.notes)
    embedding = torch.from_numpy(made("gemma2").read("model.embed_tokens.weight").copy()) + 1
    copy = resaved(made("gemma2"), tmp_path, lm_head__weight=embedding)
    refused(copy, "differs from the embedding", UnsupportedError)


def test_buffers_of_old_checkpoints_are_unused(made: Any, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    copy = resaved(made("llama"), tmp_path, **{name: torch.ones(8)})
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
    model_type: str, name: str, tensor: Any, text: str, made: Any, tmp_path: Path
) -> None:
    refused(resaved(made(model_type), tmp_path, **{name: tensor}), text)


@pytest.mark.parametrize(("model_type", "name", "tensor", "text"), FOREIGN_TENSORS)
def test_tensors_without_a_place_are_named(
    model_type: str, name: str, tensor: Any, text: str, made: Any, tmp_path: Path
) -> None:
    refused(resaved(made(model_type), tmp_path, **{name: tensor}), text, UnsupportedError)


# config.json as untrusted data


def test_an_unknown_architecture_names_the_nearest_or_all(made: Any) -> None:
    for name, hint in {
        "Qwen3NextForCausalLM": "did you mean Qwen3ForCausalLM",
        "Gemma3ForConditionalGeneration": "did you mean Gemma3ForCausalLM",
        "GPT2LMHeadModel": "edgekit converts LlamaForCausalLM, MistralForCausalLM",
    }.items():
        checkpoint = with_config(made("llama"), architectures=[name], model_type="x")
        refused(checkpoint, f"unknown architecture '{name}'.*{hint}", UnsupportedError)
    for classes in (["LlamaForSequenceClassification"], ["LlamaModel"], [["x"]], [7]):
        checkpoint = with_config(made("llama"), architectures=classes)
        refused(checkpoint, "unknown architecture", UnsupportedError)
    for kind in ([], {}, 7, None, [["x"]], [None], "LlamaForCausalLM" * 999):
        checkpoint = with_config(made("llama"), architectures=kind, model_type=kind)
        refused(checkpoint, "unknown architecture", UnsupportedError)
    assert map_checkpoint(without(made("llama"), "model_type")).architecture == "llama"
    assert map_checkpoint(without(made("llama"), "architectures")).architecture == "llama"


LLAMA3 = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
BAD_FIELDS: list[tuple[str, str, Any]] = [
    *(
        ("llama", "num_attention_heads", bad)
        for bad in (0, -1, 2**40, 1.5, "6", True, None, [6], {})
    ),
    *(("llama", "num_key_value_heads", bad) for bad in (0, 4, 7, 2**31, "3")),
    *(("llama", "hidden_size", bad) for bad in (0, 97, 2**40, -96, None)),
    *(("llama", "head_dim", bad) for bad in (0, 1, 15, 2**30, "16")),
    *(("llama", "num_hidden_layers", bad) for bad in (0, 513, 2**63, 1.0)),
    *(("llama", "vocab_size", bad) for bad in (0, 319, 2**40, None)),
    *(("llama", "intermediate_size", bad) for bad in (0, 175, 2**31, [176, 176])),
    *(("llama", "max_position_embeddings", bad) for bad in (0, -1, 2**31, "512", None)),
    *(("llama", "rms_norm_eps", bad) for bad in (0, -1e-6, 2, float("nan"), "1e-6", True)),
    *(("llama", "tie_word_embeddings", bad) for bad in ("false", 0, [])),
    *(("llama", "rope_parameters", bad) for bad in (7, "linear", [1])),
    *(
        ("llama", "rope_parameters", {"rope_type": "linear", "factor": bad})
        for bad in (0, -1, None, "4")
    ),
    *(("llama", "rope_parameters", {"rope_theta": bad}) for bad in (0, -1, float("inf"), "1e4")),
    ("llama", "rope_parameters", {"rope_type": "llama3", "factor": 8}),
    ("llama", "rope_parameters", LLAMA3 | {"high_freq_factor": 1.0}),
    ("llama", "rope_parameters", LLAMA3 | {"low_freq_factor": None}),
    ("llama", "rope_parameters", {"rope_type": "yarn", "factor": 0.5}),
    *(
        ("phi3", "rope_parameters", {"rope_type": "longrope", "long_factor": long, **short})
        for short in ({}, {"short_factor": [1.0] * 8})
        for long in ([1.0] * 7, [0.0] * 8, ["a"] * 8, 1.0, None)
    ),
    ("phi3", "original_max_position_embeddings", 0),
    ("phi3", "partial_rotary_factor", 0),
    ("gemma2", "sliding_window", None),
    ("gemma2", "sliding_window", -4),
    ("gemma2", "layer_types", ["sliding_attention"]),
    ("gemma2", "layer_types", ["chunked_attention"] * 2),
    ("gemma2", "layer_types", 3),
    ("gemma2", "attn_logit_softcapping", None),
    ("gemma2", "final_logit_softcapping", 0),
    ("gemma3_text", "rope_parameters", {"full_attention": 7}),
    ("qwen3_moe", "num_experts", 0),
    ("qwen3_moe", "num_experts", 1025),
    ("qwen3_moe", "num_experts_per_tok", 9),
    ("qwen3_moe", "moe_intermediate_size", None),
    ("qwen2_moe", "shared_expert_intermediate_size", 0),
]


@pytest.mark.parametrize(("model_type", "field", "value"), BAD_FIELDS)
def test_a_bad_field_is_refused(model_type: str, field: str, value: Any, made: Any) -> None:
    checkpoint = with_config(made(model_type), **{field: value})
    if field.startswith("rope") or field == "partial_rotary_factor":
        checkpoint = without(checkpoint, *({"rope_parameters"} - {field}))
    with pytest.raises(RefusedError) as caught:
        map_checkpoint(checkpoint)
    assert "\n" not in str(caught.value)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
# what llama.cpp's graphs compute otherwise than transformers would
OTHERWISE: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"hidden_act": "gelu"}),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}),
    ("llama", {"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}),
    ("llama", {"rope_parameters": {"rope_type": ["linear"]}}),
    ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}),
    ("llama", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    ("qwen3", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}),
    ("qwen3", {"rope_parameters": YARN | {"beta_fast": 16}}),
    ("qwen3", {"rope_parameters": YARN | {"mscale": 0.7}}),
    ("qwen3", {"rope_parameters": YARN | {"attention_factor": 1.0}}),
    ("qwen3", {"rope_parameters": YARN | {"truncate": False}}),
    ("gemma2", {"rope_parameters": YARN}),
    ("phi3", {"rope_parameters": {"rope_type": "linear", "factor": 8.0}}),
    ("qwen2", {"head_dim": 32}),
    ("olmo2", {"head_dim": 32}),
    ("qwen2_moe", {"norm_topk_prob": True}),
    ("qwen3_moe", {"norm_topk_prob": False}),
    ("qwen3_moe", {"norm_topk_prob": None}),
    ("qwen3_moe", {"decoder_sparse_step": 2}),
    ("qwen3_moe", {"mlp_only_layers": [0]}),
    ("olmoe", {"clip_qkv": 8.0}),
    ("olmoe", {"norm_topk_prob": True}),
    ("olmoe", {"num_key_value_heads": 3}),
    ("gemma2", {"query_pre_attn_scalar": 144}),
    ("gemma2", {"hidden_activation": "gelu"}),
    ("gemma2", {"layer_types": ["full_attention"] * 2}),
    ("gemma3_text", {"query_pre_attn_scalar": 168}),
    ("gemma3_text", {"attn_logit_softcapping": 50.0}),
    ("gemma3_text", {"use_bidirectional_attention": True}),
    ("gemma3_text", {"rope_parameters": {"sliding_attention": {"rope_type": "linear"}}}),
    ("smollm3", {"no_rope_layers": [1, 0, 1, 0]}),
]


@pytest.mark.parametrize(("model_type", "fields"), OTHERWISE)
def test_what_a_graph_cannot_compute_is_unsupported(
    model_type: str, fields: dict[str, Any], made: Any
) -> None:
    refused(with_config(made(model_type), **fields), "llama.cpp|llama.cpp's", UnsupportedError)


@pytest.mark.parametrize(
    ("model_type", "fields", "noted"),
    [
        ("mistral", {"sliding_window": 128}, True),
        ("mistral", {"sliding_window": 512}, False),
        ("mistral", {"sliding_window": None}, False),
        ("phi3", {"sliding_window": 128}, True),
        ("qwen2", {"sliding_window": 128, "use_sliding_window": False}, False),
        ("qwen2", {"sliding_window": 128, "use_sliding_window": True}, True),
        ("gemma2", {"sliding_window": 128}, False),
    ],
)
def test_a_window_that_the_graph_lacks_is_noted(
    model_type: str, fields: dict[str, Any], noted: bool, made: Any
) -> None:
    notes = map_checkpoint(with_config(made(model_type), **fields)).notes
    assert any("attends in a window of 128" in note for note in notes) == noted


def junk(rng: random.Random) -> Any:
    scalars = (0, -1, 1, 2, 7, 2**31, 2**64, 0.5, 1e300, float("nan"), "", "x", True, None)
    value = rng.choice(scalars)
    return rng.choice((value, value, [value], [value] * 2, {"factor": value}, {"a": {"b": value}}))


@pytest.mark.parametrize("model_type", ARCHS)
def test_no_junk_in_a_config_ends_in_a_traceback(model_type: str, made: Any) -> None:
    """100 seeded configs each, one to three fields replaced: a mapping, or a refusal."""
    rng = random.Random(11)
    checkpoint = made(model_type)
    fields = sorted({*checkpoint.config, "rope_scaling", "rope_theta", "partial_rotary_factor"})
    n_refused = 0
    for _ in range(100):
        changes = {rng.choice(fields): junk(rng) for _ in range(rng.randint(1, 3))}
        try:
            map_checkpoint(with_config(checkpoint, **changes))
        except RefusedError as error:
            n_refused += 1
            assert "\n" not in str(error)
            assert len(str(error)) < 900
    assert n_refused > 30


# general.*


CARD = """---
license: apache-2.0
language: [en, de]
tags: [tiny, test]
pipeline_tag: text-generation
base_model: org/Tiny-Base-7B
version: 1.5
---
# A model
"""


def general(folder: Path) -> dict[str, Any]:
    metadata = map_checkpoint(Checkpoint.open(folder)).metadata
    return {key: value.value for key, value in metadata.items() if key.startswith("general.")}


def test_general_metadata_comes_from_the_model_card(tmp_path: Path) -> None:
    folder = make_checkpoint("llama", tmp_path / "Tiny-Llama-220K-Instruct")
    (folder / "README.md").write_text(CARD)
    (folder / "generation_config.json").write_text('{"temperature": 0.5, "top_k": 40}')
    got = general(folder)
    assert got == got | {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "Tiny Llama 220K Instruct",
        "general.finetune": "Instruct",
        "general.basename": "Tiny-Llama",
        "general.version": "1.5",
        "general.license": "apache-2.0",
        "general.languages": ["en", "de"],
        "general.tags": ["tiny", "test", "text-generation"],
        "general.base_model.count": 1,
        "general.base_model.0.name": "Tiny Base 7B",
        "general.base_model.0.repo_url": "https://huggingface.co/org/Tiny-Base-7B",
        "general.size_label": "220K",
        "general.sampling.temp": 0.5,
        "general.sampling.top_k": 40,
    }


def test_the_cache_of_hugging_face_names_the_repository(tmp_path: Path) -> None:
    folder = make_checkpoint("llama", tmp_path / "models--org--Tiny-Llama" / "snapshots" / "0a1b2c")
    assert general(folder)["general.name"] == "Tiny Llama"


CARDS = [
    "---\n{unbalanced: [\n---\n",
    "---\nlicense: {a: [1, 2]}\ntags: 7\nname: [x]\nbase_model: [1, {}, null]\n---\n",
    "---\ndatasets: {a: 1}\nlanguage: {b: 2}\nlicense: []\n---\n",
    "---\nname: '\\ud800'\nlicense: true\n---\n",
    '---\nname: "\\ud800"\ntags: [1, null, [2]]\nversion: 2024-01-01\n---\n',
    "---\n- a list\n---\n",
    "---\nname: x\n",
    "---\nsize_label: 7\nbasename: {}\nfinetune: 1.5\n---\n",
    "\xff\xfe",
    "---\n!!python/object/apply:os.mkdir [canary]\n---\n",
]


@pytest.mark.parametrize("card", CARDS)
def test_a_strange_model_card_costs_nothing_else(card: str, tmp_path: Path) -> None:
    folder = make_checkpoint("llama", tmp_path / "Tiny-Llama")
    (folder / "README.md").write_bytes(card.encode("latin-1"))
    mapping = map_checkpoint(Checkpoint.open(folder))
    infos = [TensorInfo(t.name, t.source_type, t.shape) for t in mapping.tensors]
    with (tmp_path / "source.gguf").open("wb") as file:
        write_gguf(file, mapping.metadata, infos, ([t.rows()] for t in mapping.tensors))
    fields = gguf.GGUFReader(tmp_path / "source.gguf").fields
    assert fields["general.architecture"].contents() == "llama"
    assert not (Path.cwd() / "canary").exists()
