"""config.json as untrusted data: refused fields, unsupported ones, junk."""

import random
from dataclasses import replace
from typing import Any

import pytest
from mappings import refused

from edgekit.arch import ARCHS, map_checkpoint
from edgekit.checkpoint import Checkpoint
from edgekit.errors import RefusedError, UnsupportedError


def with_config(checkpoint: Checkpoint, **fields: Any) -> Checkpoint:
    return replace(checkpoint, config={**checkpoint.config, **fields})


def without(checkpoint: Checkpoint, *keys: str) -> Checkpoint:
    return replace(checkpoint, config={k: v for k, v in checkpoint.config.items() if k not in keys})


def test_an_unknown_architecture_names_the_nearest_or_all(stored: Any) -> None:
    for name, hint in {
        "Qwen3NextForCausalLM": "did you mean Qwen3ForCausalLM",
        "Gemma3ForConditionalGeneration": "did you mean Gemma3ForCausalLM",
        "GPT2LMHeadModel": "edgekit converts LlamaForCausalLM, MistralForCausalLM",
    }.items():
        checkpoint = with_config(stored("llama"), architectures=[name], model_type="x")
        refused(checkpoint, f"unknown architecture '{name}'.*{hint}", UnsupportedError)
    for classes in (["LlamaForSequenceClassification"], ["LlamaModel"], [["x"]], [7]):
        checkpoint = with_config(stored("llama"), architectures=classes)
        refused(checkpoint, "unknown architecture", UnsupportedError)
    for kind in ([], {}, 7, None, [["x"]], [None], "LlamaForCausalLM" * 999):
        checkpoint = with_config(stored("llama"), architectures=kind, model_type=kind)
        refused(checkpoint, "unknown architecture", UnsupportedError)
    assert map_checkpoint(without(stored("llama"), "model_type")).architecture == "llama"
    assert map_checkpoint(without(stored("llama"), "architectures")).architecture == "llama"


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
def test_a_bad_field_is_refused(model_type: str, field: str, value: Any, stored: Any) -> None:
    checkpoint = with_config(stored(model_type), **{field: value})
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
    model_type: str, fields: dict[str, Any], stored: Any
) -> None:
    refused(with_config(stored(model_type), **fields), "llama.cpp|llama.cpp's", UnsupportedError)


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
    model_type: str, fields: dict[str, Any], noted: bool, stored: Any
) -> None:
    notes = map_checkpoint(with_config(stored(model_type), **fields)).notes
    assert any("attends in a window of 128" in note for note in notes) == noted


def junk(rng: random.Random) -> Any:
    scalars = (0, -1, 1, 2, 7, 2**31, 2**64, 0.5, 1e300, float("nan"), "", "x", True, None)
    value = rng.choice(scalars)
    return rng.choice((value, value, [value], [value] * 2, {"factor": value}, {"a": {"b": value}}))


@pytest.mark.parametrize("model_type", ARCHS)
def test_no_junk_in_a_config_ends_in_a_traceback(model_type: str, stored: Any) -> None:
    """100 seeded configs each, one to three fields replaced: a mapping, or a refusal."""
    rng = random.Random(11)
    checkpoint = stored(model_type)
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
