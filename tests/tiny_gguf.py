"""A random-weight Llama in a GGUF file, written by gguf's own writer: no code of ours is in it."""

from pathlib import Path

import gguf
import numpy as np

WORDS = ("▁the", "▁of", "ab", "é", "日本")
N_BYTES_TOKENS = 3 + 256  # <unk> <s> </s> and one token per byte


def write_tiny_llama(
    path: Path,
    *,
    seed: int = 0,
    layers: int = 2,
    hidden: int = 64,
    ffn: int = 128,
    heads: int = 4,
    kv_heads: int = 2,
    context: int = 256,
    words: tuple[str, ...] = (),
    chat_template: str | None = None,
    scale: float = 0.3,
) -> Path:
    """Write a float32 Llama whose vocabulary is the bytes, ``words`` and three special tokens."""
    random = np.random.default_rng(seed)
    n_vocab = N_BYTES_TOKENS + len(words)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(context)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_file_type(0)
    _add_vocab(writer, words)
    if chat_template is not None:
        writer.add_chat_template(chat_template)
    kv = hidden // heads * kv_heads
    shapes = {
        "token_embd": (n_vocab, hidden),
        "output": (n_vocab, hidden),
        "output_norm": (hidden,),
    }
    for layer in range(layers):
        shapes |= {
            f"blk.{layer}.attn_norm": (hidden,),
            f"blk.{layer}.attn_q": (hidden, hidden),
            f"blk.{layer}.attn_k": (kv, hidden),
            f"blk.{layer}.attn_v": (kv, hidden),
            f"blk.{layer}.attn_output": (hidden, hidden),
            f"blk.{layer}.ffn_norm": (hidden,),
            f"blk.{layer}.ffn_gate": (ffn, hidden),
            f"blk.{layer}.ffn_up": (ffn, hidden),
            f"blk.{layer}.ffn_down": (hidden, ffn),
        }
    for name, shape in shapes.items():
        values = random.standard_normal(shape, np.float32) * np.float32(scale)
        writer.add_tensor(f"{name}.weight", values + 1 if len(shape) == 1 else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_vocab(writer: gguf.GGUFWriter, words: tuple[str, ...]) -> None:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    kinds = [2, 3, 3, *[6] * 256, *[1] * len(words)]  # unknown, control, byte, normal
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
