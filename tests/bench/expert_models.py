"""Artifacts of large mixtures of experts with random weights, written as blocks: no quantizer runs.

The scales of the blocks are such that weights have the spread of a trained matrix; codes are random
bits. One tier only, so the artifact is its base. Routers of random weights choose nearly at random:
the worst case for a cache.

    python tests/bench/expert_models.py /tmp/moe-4g --experts 64 --layers 16
"""

import argparse
import hashlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from checkpoints import _write_tokenizer

from edgekit.exporters.file_types import file_type
from edgekit.exporters.gguf import TensorInfo, header_bytes, tensor_offsets
from edgekit.exporters.gguf_values import Value, f32, string, u32
from edgekit.exporters.tokenizer import tokenizer_metadata
from edgekit.manifest import FileRecord, Manifest
from edgekit.progress import Silent
from edgekit.publish import ALIGNMENT, HashingWriter, write_manifest
from edgekit.reserve import measure_memory
from edgekit.routing.gguf_keys import range_metadata
from edgekit.stack import Level, Part, Stack

VOCAB = 4096
Q4_K_BYTES, Q4_K_WEIGHTS = 144, 256


@dataclass(frozen=True)
class Shape:
    """Sizes of a Qwen3-MoE; its experts take 4.2 GiB at Q4_K."""

    layers: int = 16
    hidden: int = 2048
    experts: int = 64
    used: int = 8
    ffn: int = 1280
    heads: int = 16
    kv_heads: int = 4
    head: int = 128


def make_artifact(folder: Path, shape: Shape, seed: int = 0) -> Path:
    """Write base, manifest and an empty levels file."""
    folder.mkdir(parents=True)
    infos = list(_tensors(shape))
    metadata = _metadata(shape) | {"general.file_type": u32(file_type(infos))}
    metadata |= range_metadata(infos, ALIGNMENT)
    header = header_bytes(metadata, infos)
    random = np.random.default_rng(seed)
    stacks = []
    with HashingWriter(folder / "moe-Q4_K.gguf") as out:
        out.write(header)
        for info, offset in zip(infos, tensor_offsets(infos, ALIGNMENT), strict=True):
            out.pad_to(len(header) + offset)
            n = info.shape[0] if len(info.shape) == 3 else 1
            parts = tuple(out.part(iter([_block_bytes(random, info, n)])) for _ in range(n))
            stacks.append(_stack(info, parts))
        base = out.record
    with HashingWriter(folder / "moe.levels") as out:
        levels = out.record
    manifest = _manifest(shape, metadata, header, base, levels, tuple(stacks))
    write_manifest(folder, manifest)
    write_manifest(folder, replace(manifest, memory=measure_memory(folder, Silent())))
    return folder


def _manifest(
    shape: Shape,
    metadata: dict[str, Value],
    header: bytes,
    base: FileRecord,
    levels: FileRecord,
    stacks: tuple[Stack, ...],
) -> Manifest:
    model = {k: v.value for k, v in metadata.items() if k.startswith("qwen3moe.")}
    return Manifest(
        name="moe",
        architecture="qwen3moe",
        codec="nested",
        tiers=("Q4_K",),
        chunk_weights=1 << 20,
        base=base,
        header_bytes=len(header),
        header_sha256=hashlib.sha256(header).hexdigest(),
        levels=levels,
        stacks=stacks,
        stored_order=(),
        resident_order=(),
        model=model | {"vocab_size": VOCAB},
        source={"name": "random", "license": None, "files": [], "unused_tensors": []},
        tool={"edgekit": "0", "command": []},
    )


def _stack(info: TensorInfo, parts: tuple[Part, ...]) -> Stack:
    tier = info.type_name if info.type_name == "Q4_K" else "source"
    level = Level(info.name, tier, None, "ggml", parts, 0.0)
    return Stack(info.name, info.shape, "BF16" if tier == "Q4_K" else "F32", (level,))


def _tensors(s: Shape) -> Iterator[TensorInfo]:
    q, kv = s.heads * s.head, s.kv_heads * s.head
    yield TensorInfo("token_embd.weight", "Q4_K", (VOCAB, s.hidden))
    block: dict[str, tuple[int, ...]] = {
        "attn_norm": (s.hidden,),
        "ffn_norm": (s.hidden,),
        "attn_q": (q, s.hidden),
        "attn_k": (kv, s.hidden),
        "attn_v": (kv, s.hidden),
        "attn_output": (s.hidden, q),
        "attn_q_norm": (s.head,),
        "attn_k_norm": (s.head,),
        "ffn_gate_inp": (s.experts, s.hidden),
        "ffn_gate_exps": (s.experts, s.ffn, s.hidden),
        "ffn_up_exps": (s.experts, s.ffn, s.hidden),
        "ffn_down_exps": (s.experts, s.hidden, s.ffn),
    }
    for layer in range(s.layers):
        for name, extents in block.items():
            kind = "F32" if len(extents) == 1 or name == "ffn_gate_inp" else "Q4_K"
            yield TensorInfo(f"blk.{layer}.{name}.weight", kind, extents)
    yield TensorInfo("output_norm.weight", "F32", (s.hidden,))
    yield TensorInfo("output.weight", "Q4_K", (VOCAB, s.hidden))


def _block_bytes(random: np.random.Generator, info: TensorInfo, n_parts: int) -> bytes:
    n = info.n_weights // n_parts
    if len(info.shape) == 1:
        return (1 + 0.1 * random.standard_normal(n, np.float32)).tobytes()
    if info.type_name == "F32":
        return (random.standard_normal(n, np.float32) * info.shape[-1] ** -0.5).tobytes()
    # embeddings of unit order: else the layers' outputs, alike for all tokens, drown them
    cols = 1 if info.name == "token_embd.weight" else info.shape[-1]
    return q4_k_blocks(random, n // Q4_K_WEIGHTS, cols).tobytes()


def q4_k_blocks(random: np.random.Generator, n: int, cols: int) -> npt.NDArray[np.uint8]:
    """Random Q4_K blocks, ``[n, 144]``, whose weights have mean 0 and variance about 1 / cols."""
    blocks = np.frombuffer(random.bytes(n * Q4_K_BYTES), np.uint8).reshape(n, Q4_K_BYTES).copy()
    scale = np.float16(1 / (180 * np.sqrt(cols)))  # of a 6-bit scale times a 4-bit code
    blocks[:, :2] = np.frombuffer(scale.tobytes(), np.uint8)
    blocks[:, 2:4] = np.frombuffer(np.float16(7.5 * scale).tobytes(), np.uint8)
    return blocks


def _metadata(s: Shape) -> dict[str, Value]:
    arch = "qwen3moe"
    counts = {
        "context_length": 4096,
        "embedding_length": s.hidden,
        "block_count": s.layers,
        "feed_forward_length": s.ffn,
        "expert_feed_forward_length": s.ffn,
        "expert_count": s.experts,
        "expert_used_count": s.used,
        "attention.head_count": s.heads,
        "attention.head_count_kv": s.kv_heads,
        "attention.key_length": s.head,
        "attention.value_length": s.head,
        "vocab_size": VOCAB,
    }
    values = {f"{arch}.{key}": u32(value) for key, value in counts.items()}
    values |= {
        "general.architecture": string(arch),
        "general.name": string("random mixture of experts"),
        f"{arch}.attention.layer_norm_rms_epsilon": f32(1e-6),
        f"{arch}.rope.freq_base": f32(1e6),
    }
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        _write_tokenizer(folder)
        config: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "vocab_size": VOCAB}
        (folder / "config.json").write_text(json.dumps(config))
        return values | tokenizer_metadata(folder, config, VOCAB)


def main() -> None:
    """Write one artifact."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--layers", type=int, default=16)
    args = parser.parse_args()
    make_artifact(args.folder, Shape(layers=args.layers, experts=args.experts))
    print(f"{args.folder}: {(args.folder / 'moe-Q4_K.gguf').stat().st_size} bytes")


if __name__ == "__main__":
    main()
