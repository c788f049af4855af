"""Tiny random-weight checkpoints of every architecture, made by transformers and saved by it.

Nothing of ours is in them. Weights are scaled so that logits are of unit order and nothing is
trivial: norms differ from one, biases from zero, so a dropped or swapped tensor shows.
"""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from smallthinker import SmallThinker, write_smallthinker
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from edgekit.arch import ARCHS

VOCAB = 320
# narrow: hidden and feed-forward widths that are no multiple of 256, one of them not of 32 either
WIDTHS = {"narrow": (96, 176), "wide": (256, 512)}

# per architecture, over what `_fields` starts with; narrow experts are 80 and 112 wide
SPECIAL: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {"num_experts": 6, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": True},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "phi3": {"pad_token_id": 0, "original_max_position_embeddings": 512},
    "gemma2": {"sliding_window": 16, "query_pre_attn_scalar": 24},
    "gemma3_text": {"sliding_window": 16, "query_pre_attn_scalar": 24, "num_hidden_layers": 7},
    "smollm3": {"num_hidden_layers": 4, "pad_token_id": 0},
    "smallthinker": {"moe_num_primary_experts": 6, "moe_num_active_primary_experts": 2},
}
# those that transformers can run; SmallThinker is held to tests/smallthinker.py
RUNNABLE = tuple(name for name, arch in ARCHS.items() if hasattr(transformers, arch.class_name))


def _fields(model_type: str, width: str) -> dict[str, Any]:
    hidden, ffn = WIDTHS[width]
    heads = 6 if width == "narrow" else 8
    fields: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        # llama.cpp's OLMoE has no grouped queries
        "num_key_value_heads": heads if model_type == "olmoe" else heads // 2,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    }
    if model_type in ("qwen3", "qwen3_moe", "gemma2", "gemma3_text"):
        fields["head_dim"] = 24  # not hidden / heads
    if model_type in ("qwen2_moe", "qwen3_moe"):
        fields["moe_intermediate_size"] = 80 if width == "narrow" else 256
        fields["shared_expert_intermediate_size"] = 112 if width == "narrow" else 256
    if model_type == "smallthinker":
        fields["head_dim"] = 24  # not hidden / heads
        fields["moe_ffn_hidden_size"] = 80 if width == "narrow" else 256
    return fields | SPECIAL.get(model_type, {})


def make_checkpoint(
    model_type: str,
    folder: Path,
    dtype: str = "float32",
    *,
    width: str = "narrow",
    seed: int = 0,
    save: dict[str, Any] | None = None,
    **overrides: Any,
) -> Path:
    """Write a checkpoint of ``model_type`` (a key of `edgekit.arch.ARCHS`) into ``folder``.

    Args:
        model_type: ``model_type`` of config.json.
        folder: Made if it is not there.
        dtype: ``float32``, ``float16`` or ``bfloat16``.
        width: ``narrow`` (no multiples of 256) or ``wide`` (multiples of 256).
        seed: Of the weights.
        save: Arguments of ``save_pretrained``, such as ``max_shard_size``.
        overrides: Fields of the config.
    """
    fields = _fields(model_type, width) | overrides
    if model_type == "smallthinker":
        return write_smallthinker(folder, fields, getattr(torch, dtype), seed)
    config = transformers.AutoConfig.for_model(model_type, **fields)
    config.architectures = [ARCHS[model_type].class_name]
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _fill(name, parameter, tied=bool(config.tie_word_embeddings), model_type=model_type)
    model.to(getattr(torch, dtype)).save_pretrained(folder, **(save or {}))
    return folder


def _fill(name: str, parameter: torch.Tensor, tied: bool, model_type: str) -> None:
    noise = torch.randn_like(parameter)
    if name.endswith("bias"):
        parameter.copy_(0.3 * noise)
    elif "norm" in name:
        centre = 0.0 if model_type.startswith("gemma") else 1.0  # Gemma stores weight - 1
        parameter.copy_(centre + 0.2 * noise)
    elif "embed_tokens" in name:
        parameter.copy_(noise * (parameter.shape[-1] ** -0.5 if tied else 1.0))
    else:
        parameter.copy_(noise * parameter.shape[-1] ** -0.5)


TEXT = (
    "The quick brown fox jumps over the lazy dog. Once upon a time, 3 little pigs built houses.\n"
    "def add(a, b):\n    return a + b\n\nfor i in range(10):\n    print(i, add(i, 1))\n"
)


def add_tokenizer(folder: Path, vocab_size: int = VOCAB, chat_template: str | None = None) -> Path:
    """Train a byte-level BPE tokenizer on the spot and save it as transformers does.

    The vocabulary has at most ``vocab_size`` tokens: three special ones (``<unk>`` 0, ``<s>`` 1,
    ``</s>`` 2), 256 bytes and some merges. The pre-tokenizer is GPT-2's.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "add_bos_token": False,
    }
    if chat_template is not None:
        config["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def whole_model(folder: Path) -> Any:
    """The checkpoint in ``folder`` as transformers loads it, all of it in memory, float32."""
    if json.loads((folder / "config.json").read_text())["model_type"] == "smallthinker":
        return SmallThinker(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
