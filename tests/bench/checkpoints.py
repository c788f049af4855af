"""Checkpoints of a real shape with random weights, for benchmarks: streamed, seeded, of any size.

Weights are Gaussian, scaled per column and per row by log-normal factors as trained matrices are,
and one in a thousand is two to five times as large as it would be: the heavy tail that costs stored
bits. The tokenizer is a small byte-level BPE; the model's vocabulary is larger, so it is padded.

    python tests/bench/checkpoints.py /tmp/llama-1b --shape llama-3.2-1b
"""

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

BLOCK = 1 << 22  # weights made at once: 16 MiB of float32
TAIL = 1e-3  # share of weights in the heavy tail


@dataclass(frozen=True)
class Shape:
    """The fields of a Llama's config.json that set its size."""

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool = True


# https://huggingface.co/meta-llama/Llama-3.2-1B/blob/main/config.json
LLAMA_1B = Shape(16, 2048, 8192, 32, 8, 64, 128256)
SHAPES = {
    "llama-3.2-1b": LLAMA_1B,
    "llama-3.2-1b-2-layers": Shape(**{**asdict(LLAMA_1B), "num_hidden_layers": 2}),
    "tiny": Shape(2, 256, 768, 8, 4, 32, 512),
}
ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def make_checkpoint(folder: Path, shape: Shape, seed: int = 0) -> Path:
    """Write config.json, a tokenizer and BF16 safetensors of ``shape`` into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(_config(shape), indent=1))
    _write_tokenizer(folder)
    partial = folder / "model.safetensors.partial"
    with partial.open("wb") as file:
        write_safetensors(file, tensors_of(shape), seed)
    partial.rename(folder / "model.safetensors")
    return folder


def _config(shape: Shape) -> dict[str, object]:
    return asdict(shape) | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": ROPE,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def tensors_of(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor, as transformers names them."""
    hidden, ffn = shape.hidden_size, shape.intermediate_size
    q, kv = (n * shape.head_dim for n in (shape.num_attention_heads, shape.num_key_value_heads))
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab_size, hidden)}
    block = {
        "self_attn.q_proj": (q, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    for layer in range(shape.num_hidden_layers):
        tensors |= {f"model.layers.{layer}.{name}.weight": size for name, size in block.items()}
    tensors["model.norm.weight"] = (hidden,)
    if not shape.tie_word_embeddings:
        tensors["lm_head.weight"] = (shape.vocab_size, hidden)
    return tensors


def write_safetensors(file: BinaryIO, tensors: dict[str, tuple[int, ...]], seed: int) -> None:
    """Write BF16 tensors one after the other; holds a few megabytes at a time."""
    at, header = 0, {}
    for name, shape in tensors.items():
        end = at + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for index, shape in enumerate(tensors.values()):
        for block in _weights(np.random.default_rng((seed, index)), shape):
            file.write(_bf16(block).tobytes())


def _weights(
    random: np.random.Generator, shape: tuple[int, ...]
) -> Iterator[npt.NDArray[np.float32]]:
    if len(shape) == 1:
        yield 1 + 0.1 * random.standard_normal(shape, np.float32)
        return
    rows, cols = shape
    per_column = np.exp(0.3 * random.standard_normal(cols, np.float32)) / np.sqrt(cols)
    step = max(1, BLOCK // cols)
    for start in range(0, rows, step):
        n = min(step, rows - start)
        per_row = np.exp(0.15 * random.standard_normal((n, 1), np.float32))
        block = random.standard_normal((n, cols), np.float32) * per_column * per_row
        places = random.integers(0, block.size, round(TAIL * block.size))
        block.reshape(-1)[places] *= random.uniform(2, 5, len(places)).astype(np.float32)
        yield block.astype(np.float32, copy=False)


def _bf16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Round to nearest even, as torch does; values are finite."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def _write_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([__doc__ or ""] * 4, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def main() -> None:
    """Write one checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3.2-1b")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    make_checkpoint(args.folder, SHAPES[args.shape], args.seed)
    print(f"{args.folder}: {(args.folder / 'model.safetensors').stat().st_size} bytes")


if __name__ == "__main__":
    main()
