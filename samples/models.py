"""What the two sample models are: their architecture and the shape of their tokenizer."""

from dataclasses import dataclass
from typing import Any

from transformers import LlamaConfig, PretrainedConfig, Qwen3MoeConfig

VOCAB = 4096
HIDDEN = 256  # every weight's row length is a multiple of 256: one super-block of a K-quant

# The pre-tokenizers that llama.cpp knows as "llama-bpe" and "qwen2"; they differ in \p{N}.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")


@dataclass(frozen=True)
class Sample:
    """One sample model; ``balance`` weighs the router's load-balancing loss, 0 without experts."""

    name: str
    config: PretrainedConfig
    split: str
    bos: str | None
    eos: str
    nfc: bool
    balance: float = 0.0


def _shared(bos_id: int | None, eos_id: int) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "pad_token_id": None,
    }


def tiny_llama() -> Sample:
    """A dense Llama of 5.8 million weights: grouped-query attention, tied embeddings."""
    config = LlamaConfig(
        **_shared(VOCAB - 2, VOCAB - 1),
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    bos, eos = "<|begin_of_text|>", "<|end_of_text|>"
    return Sample("tiny-llama", config, LLAMA3_SPLIT, bos, eos, False)


def tiny_moe() -> Sample:
    """A Qwen3 mixture of experts of 9.2 million weights, 2 of 8 experts per token, untied head."""
    config = Qwen3MoeConfig(
        **_shared(None, VOCAB - 1),
        intermediate_size=768,
        moe_intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
    )
    eos = "<|endoftext|>"
    return Sample("tiny-moe", config, QWEN2_SPLIT, None, eos, True, balance=0.01)


SAMPLES = {"tiny-llama": tiny_llama, "tiny-moe": tiny_moe}
