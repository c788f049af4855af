"""Metadata of a GGUF: ``general.*`` from folder and model card, ``<arch>.*`` from the config.

Keys and types are those that llama.cpp's converter writes; the heuristics for names are gguf's.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]  # gguf needs it, so it is there
from gguf import (
    MODEL_ARCH_NAMES,
    ExpertGatingFuncType,
    GGUFValueType,
    GGUFWriter,
    Keys,
    Metadata,
    RopeScalingType,
)
from gguf.utility import size_label

from edgekit.arch.config import Hyper
from edgekit.arch.rope import Rope, longrope_attention
from edgekit.arch.table import Arch
from edgekit.checkpoint import Checkpoint, contained, read_json
from edgekit.errors import RefusedError
from edgekit.exporters.gguf_values import Value, array, f32, string, u32

MAX_CARD_BYTES = 1 << 22
MAX_TEXT = 1 << 16  # characters of one value from a model card
SAMPLING = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}


def general_metadata(
    checkpoint: Checkpoint, arch: Arch, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Value]:
    """``general.*`` without ``file_type`` and ``quantization_version``.

    Args:
        checkpoint: For its folder's name, README.md, config.json and generation_config.json.
        arch: Gives ``general.architecture``.
        shapes: GGUF name -> shape, for the size label.
    """
    name, folder = MODEL_ARCH_NAMES[arch.gguf], _model_folder(checkpoint.folder)
    counts = _parameters(shapes)
    source = {"_name_or_path": checkpoint.config.get("_name_or_path")}
    source = {key: value for key, value in source.items() if isinstance(value, str)}
    try:
        meta = _heuristics(_card(checkpoint.folder), source, folder, counts[0])
        writer = _written(meta, name, counts)
    except (TypeError, AttributeError, ValueError, KeyError, IndexError):
        # a card of unexpected form costs its own entries, not the conversion
        writer = _written(_heuristics({}, {}, folder, counts[0]), name, counts)
    values = {"general.architecture": string(name), "general.type": string("model")}
    return values | _sampling(checkpoint.folder) | writer


def _heuristics(card: Any, source: Any, folder: Path, n_parameters: int) -> Metadata:
    return Metadata.apply_metadata_heuristic(Metadata(), card, source, folder, n_parameters)


def _written(meta: Metadata, arch: str, counts: tuple[int, int, int, int]) -> dict[str, Value]:
    """What gguf's writer would store for ``meta``, as clean values."""
    meta.name = meta.name or "model"
    meta.size_label = meta.size_label or size_label(*counts)
    writer = GGUFWriter(None, arch)
    meta.set_gguf_meta_model(writer)
    pairs = writer.kv_data[0].items()
    kept = {key: _clean(pair.value) for key, pair in pairs if key != Keys.General.ARCHITECTURE}
    return {key: value for key, value in kept.items() if value is not None}


def _clean(value: Any) -> Value | None:
    """Text, count or list of texts from a model card; anything else is dropped."""
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, int):
        return u32(value) if 0 <= value < 2**32 else None
    if isinstance(value, list):
        return array(GGUFValueType.STRING, [_text(item) for item in value[:1000]])
    return string(_text(value))


def _text(value: Any) -> str:
    return str(value)[:MAX_TEXT].encode("utf-8", "replace").decode("utf-8")


def _model_folder(folder: Path) -> Path:
    """The folder for naming; in the Hugging Face cache the repository gives the name."""
    full = folder.resolve()
    repository = full.parent.parent.name
    if full.parent.name == "snapshots" and repository.startswith("models--"):
        return Path(repository.split("--")[-1])
    return Path(full.name)


def _card(folder: Path) -> dict[str, Any]:
    """Front matter of README.md; empty where there is none that can be read."""
    try:
        path = contained(folder, "README.md")
        if path is None or path.stat().st_size > MAX_CARD_BYTES:
            return {}
        return Metadata.load_model_card(folder)
    except (RefusedError, OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}


def _sampling(folder: Path) -> dict[str, Value]:
    """Recommended sampling from generation_config.json."""
    try:
        config = read_json(folder, "generation_config.json")
    except RefusedError:
        return {}
    values: dict[str, Value] = {}
    for key, source in SAMPLING.items():
        value = config.get(source)
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e6:
            name = f"general.sampling.{key}"
            values[name] = Value(GGUFValueType.INT32, int(value)) if key == "top_k" else f32(value)
    return values


def _parameters(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int, int, int]:
    """All parameters, those outside experts, those of one expert, and how many experts."""
    experts = {name: shape for name, shape in shapes.items() if "_exps." in name}
    inside = sum(map(math.prod, experts.values()))
    total = sum(map(math.prod, shapes.values()))
    count = max((shape[0] for shape in experts.values()), default=0)
    return total, total - inside, inside // count if count else 0, count


def hyper_metadata(
    arch: Arch, hyper: Hyper, config: Mapping[str, Any], name: str
) -> dict[str, Value]:
    """``<arch>.*``: every hyperparameter that llama.cpp's graph reads."""
    sizes, keys = hyper.sizes, Keys.LLM
    values = {
        keys.VOCAB_SIZE: u32(sizes["vocab"]),
        keys.CONTEXT_LENGTH: u32(hyper.context),
        keys.EMBEDDING_LENGTH: u32(sizes["embd"]),
        keys.BLOCK_COUNT: u32(hyper.n_layers),
        keys.FEED_FORWARD_LENGTH: u32(sizes.get("ff", sizes.get("ffe", 0))),
        Keys.Attention.HEAD_COUNT: u32(hyper.n_heads),
        Keys.Attention.HEAD_COUNT_KV: u32(hyper.n_kv_heads),
        Keys.Attention.KEY_LENGTH: u32(sizes["head"]),
        Keys.Attention.VALUE_LENGTH: u32(sizes["head"]),
        Keys.Attention.LAYERNORM_RMS_EPS: f32(hyper.norm_eps),
    }
    if hyper.n_experts:
        values[keys.EXPERT_COUNT] = u32(hyper.n_experts)
        values[keys.EXPERT_USED_COUNT] = u32(hyper.n_experts_used)
    if arch.softmax_key is not None:
        is_softmax = bool(config.get(arch.softmax_key, False))
        kind = ExpertGatingFuncType.SOFTMAX if is_softmax else ExpertGatingFuncType.SIGMOID
        values[keys.EXPERT_GATING_FUNC] = u32(kind.value)
    if arch.expert_ff not in (None, "intermediate_size"):
        values[keys.EXPERT_FEED_FORWARD_LENGTH] = u32(sizes["ffe"])
    if "ffs" in sizes:
        values[keys.EXPERT_SHARED_FEED_FORWARD_LENGTH] = u32(sizes["ffs"])
    values |= _rope_metadata(hyper.rope, hyper.context, name) | _window_metadata(arch, hyper)
    values |= _softcap_metadata(arch, config)
    return {key.format(arch=MODEL_ARCH_NAMES[arch.gguf]): value for key, value in values.items()}


def _rope_metadata(rope: Rope, context: int, name: str) -> dict[str, Value]:
    values = {
        Keys.Rope.DIMENSION_COUNT: u32(rope.dims),
        Keys.Rope.FREQ_BASE: f32(rope.theta),
    }
    if rope.local_theta is not None:
        values[Keys.Rope.FREQ_BASE_SWA] = f32(rope.local_theta)
    if rope.kind in ("linear", "yarn"):
        values[Keys.Rope.SCALING_TYPE] = string(rope.kind)
        values[Keys.Rope.SCALING_FACTOR] = f32(rope.factor)
    if rope.kind == "yarn":
        values[Keys.Rope.SCALING_ORIG_CTX_LEN] = u32(rope.original_context)
    if rope.kind == "longrope":
        values[Keys.Rope.SCALING_TYPE] = string(RopeScalingType.LONGROPE.value)
        values[Keys.Rope.SCALING_ORIG_CTX_LEN] = u32(rope.original_context)
        values[Keys.Rope.SCALING_ATTN_FACTOR] = f32(longrope_attention(rope, context, name))
    return values


def _window_metadata(arch: Arch, hyper: Hyper) -> dict[str, Value]:
    """Window and, where it is not the graph's own, the pattern of windowed layers."""
    if arch.model_type == "phi3":  # 0 keeps llama.cpp from guessing; its graph has no window
        return {Keys.Attention.SLIDING_WINDOW: u32(0)}
    if hyper.window is None:
        return {}
    values = {Keys.Attention.SLIDING_WINDOW: u32(hyper.window)}
    usual = tuple(arch.is_windowed(i) for i in range(hyper.n_layers))
    if hyper.windowed != usual:
        pattern = array(GGUFValueType.BOOL, hyper.windowed)
        values[Keys.Attention.SLIDING_WINDOW_PATTERN] = pattern
    return values


def _softcap_metadata(arch: Arch, config: Mapping[str, Any]) -> dict[str, Value]:
    values = {}
    for key, name in (
        ("attn_logit_softcapping", Keys.LLM.ATTN_LOGIT_SOFTCAPPING),
        ("final_logit_softcapping", Keys.LLM.FINAL_LOGIT_SOFTCAPPING),
    ):
        cap = config.get(key, arch.defaults.get(key))
        if arch.window_every and isinstance(cap, int | float) and not isinstance(cap, bool):
            values[name] = f32(cap)
    return values
