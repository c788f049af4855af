"""Tiny checkpoints as ONNX artifacts, and the same weights in transformers and in plain graphs."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from converted import tiny
from models import whole_model

from edgekit.arch import Mapping, map_checkpoint
from edgekit.arch.source import interleaved
from edgekit.checkpoint import Checkpoint
from edgekit.convert import convert
from edgekit.convert_options import Options
from edgekit.exporters import onnx_model
from edgekit.exporters.onnx_blocks import unpacked
from edgekit.exporters.onnx_decoder import STACKED, Decoder
from edgekit.exporters.onnx_store import DataFile, Planes
from edgekit.onnx.export import decoder_in
from edgekit.onnx.slicing import divided
from edgekit.progress import Silent

# ONNX Runtime's attention wants heads of a multiple of 16
SPECIAL: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 8},
    "qwen3": {"head_dim": 32},
    "qwen3_moe": {"head_dim": 32},
    "gemma2": {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8},
    "gemma3_text": {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8},
}
N_PROMPT, N_TOKENS = 20, 24


def checkpoint_of(model_type: str, folder: Path, **options: Any) -> Path:
    return tiny(folder, model_type, width="wide", **SPECIAL.get(model_type, {}) | options)


def onnx_artifact(checkpoint: Path, artifact: Path, **options: Any) -> Path:
    """Convert for ONNX Runtime without statistics."""
    chosen = Options(formats=("onnx",), statistics=False, measure=False, jobs=2, **options)
    convert(checkpoint, artifact, chosen, Silent())
    return artifact


def opened(folder: Path) -> tuple[Mapping, Decoder]:
    checkpoint = Checkpoint.open(folder)
    mapping = map_checkpoint(checkpoint)
    return mapping, decoder_in(checkpoint, mapping)


def float_graph(checkpoint: Path, folder: Path) -> Path:
    """The model as it is, in float32."""
    mapping, decoder = opened(checkpoint)
    matrices, floats = divided(mapping.tensors)
    store = {}
    with DataFile(folder / "float.bin") as file:
        for i, rotation in enumerate(decoder.rotations):
            floats |= {f"rotation.{i}.cos": rotation.cos, f"rotation.{i}.sin": rotation.sin}
        for name, values in floats.items():
            store[name] = file.add(values)
        for matrix in matrices:
            weights = np.concatenate([chunk.weights() for chunk in matrix.chunks()])
            store[matrix.name] = file.add(weights.reshape(matrix.shape))
    onnx.save(onnx_model.build(decoder, store), folder / "float.onnx")
    return folder / "float.onnx"


def dense(files: Path, item: Planes, depth: int) -> np.ndarray:
    """A matrix's weights at a depth, read from the data files with numpy alone."""
    total = np.zeros(1, np.float32)
    whole = item.at(depth)
    for term in whole.terms:
        codes, scales = (
            np.fromfile(files / a.place.file, np.uint8, a.place.n_bytes, offset=a.place.offset)
            for a in (term.codes, term.scales)
        )
        scale = scales.view(np.float16).reshape(term.scales.shape).astype(np.float32)
        code = unpacked(codes.reshape(term.codes.shape), term.bits).astype(np.float32)
        total = total + np.float32(term.factor) * scale[..., None] * code
    return total.reshape(*item.shape[:-1], -1)[..., : item.shape[-1]]


def transformers_at(checkpoint: Path, files: Path, matrices: Any, depth: int) -> Any:
    """The model in transformers with the weights of a depth."""
    mapping, _ = opened(checkpoint)
    model = whole_model(checkpoint)
    sources = {t.name: t for t in mapping.tensors}
    state = {name: p.detach() for name, p in model.named_parameters()}
    for item in matrices:
        for name, rows in _parts(item, dense(files, item, depth), sources):
            source, at = sources[name], 0
            for piece in source.pieces:
                part = rows[at : at + piece.n_rows]
                order = np.arange(piece.n_rows)
                if source.heads:
                    order = interleaved(source.heads, piece.n_rows)
                place = _matrix_in(state, piece.tensor, part.shape[1])
                place[piece.first + order] = torch.from_numpy(np.ascontiguousarray(part))
                at += piece.n_rows
    return model


def _matrix_in(state: dict[str, Any], tensor: str, cols: int) -> Any:
    """The parameter that holds a checkpoint's tensor, as rows; experts are fused in memory."""
    if tensor in state:
        return state[tensor].view(-1, cols)
    stem, _, rest = tensor.partition(".experts.")
    expert, role, _ = rest.split(".")
    stem = stem.replace("block_sparse_moe", "mlp")
    fused = "down_proj" if role in ("down_proj", "w2") else "gate_up_proj"
    whole = state[f"{stem}.experts.{fused}"][int(expert)]
    half = len(whole) // 2
    parts = {"gate_proj": whole[:half], "w1": whole[:half], "up_proj": whole[half:]}
    return parts.get(role, whole[half:] if role == "w3" else whole)


def _parts(item: Planes, weights: np.ndarray, sources: dict[str, Any]) -> Any:
    """GGUF name and rows over all experts of every tensor in a stacked matrix."""
    stem = item.name.removesuffix(".weight")
    prefix, _, role = stem.rpartition(".")
    stack = next((s for s in STACKED if s.name == role), None)
    names = [f"{prefix}.{part}.weight" for part in stack.parts] if stack else [item.name]
    if stack and names[0] not in sources:  # stored as one: Phi-3
        names = [n for n in (f"{prefix}.attn_qkv.weight", f"{prefix}.ffn_up.weight")
                 if n in sources and role.startswith(n.split(".")[-2][:4])]  # fmt: skip
    at = 0
    for i, name in enumerate(names):
        if stack and stack.is_woven:
            rows = weights[:, i :: len(names)]
        else:
            n = sources[name].shape[-2]
            rows, at = weights[..., at : at + n, :], at + n
        yield name, rows.reshape(-1, rows.shape[-1])


def session(graph: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(graph), options)


def logits_of(graph: Path, ids: np.ndarray, n_prompt: int = N_PROMPT) -> np.ndarray:
    """Logits of a prompt at once and of the rest token by token, with the cache in between."""
    running = session(graph)
    past = [i for i in running.get_inputs() if i.name.startswith("past_key_values")]
    cache = [np.zeros((len(ids), i.shape[1], 0, i.shape[3]), np.float32) for i in past]
    found, at = [], 0
    for n in (n_prompt, *[1] * (ids.shape[1] - n_prompt)):
        feeds = {"input_ids": ids[:, at : at + n]}
        feeds["attention_mask"] = np.ones((len(ids), at + n), np.int64)
        feeds |= {i.name: value for i, value in zip(past, cache, strict=True)}
        logits, *cache = running.run(None, feeds)
        found.append(logits)
        at += n
    return np.concatenate(found, 1)


def wanted(model: Any, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        found: np.ndarray = model(torch.from_numpy(ids)).logits.numpy()
    return found


def tokens(n: int = N_TOKENS, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 300, (1, n))
