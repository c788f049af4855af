"""Rotary embedding: the scalings that config.json describes, as llama.cpp takes them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.arch.fields import MAX_CONTEXT, Fields
from edgekit.arch.table import Arch
from edgekit.errors import UnsupportedError

SCALED = ("linear", "llama3", "yarn")  # kinds that need a factor
YARN_USUAL = {"beta_fast": 32, "beta_slow": 1, "mscale": None, "mscale_all_dim": None}


@dataclass(frozen=True)
class Rope:
    """Rotary embedding.

    Attributes:
        theta: Base of the frequencies; ``local_theta``: that of windowed layers, if another.
        kind: ``default``, ``linear``, ``yarn``, ``llama3`` or ``longrope``.
        factor: Scaling factor (1 where there is none).
        dims: How many of a head's values rotate.
        fields: The other numbers of the scaling, checked where they are used.
        original_context: Context before scaling.
    """

    theta: float
    kind: str
    factor: float
    dims: int
    fields: Mapping[str, Any]
    original_context: int
    local_theta: float | None = None


def read_rope(arch: Arch, fields: Fields, head: int, context: int) -> Rope:
    """The rotary embedding of a config, in the spelling of transformers 4 or 5.

    Raises:
        RefusedError: A number is missing or out of range.
        UnsupportedError: llama.cpp's graph has no such rotation.
    """
    outer = _rope_table(fields, "rope_scaling") or _rope_table(fields, "rope_parameters")
    inner, local = outer, None
    if arch.model_type == "gemma3_text":
        inner, local = _gemma3_rope(fields)
    elif any(isinstance(value, dict) for value in outer.values()):
        raise UnsupportedError(
            f"{fields.name}: RoPE parameters differ by layer; llama.cpp's {arch.model_type} graph "
            "has one set"
        )
    rope = Fields(inner, {**fields.defaults, "rope_theta": _theta(fields)}, fields.name)
    kind = inner.get("rope_type", inner.get("type", "default"))
    if arch.model_type == "phi3" and kind in ("su", "yarn"):
        kind = "longrope"  # what Phi-3's first configs called it
    if not isinstance(kind, str) or kind not in arch.rope_scaling | {"default"}:
        raise UnsupportedError(
            f"{fields.name}: RoPE scaling {kind!r:.80} is not one that llama.cpp's "
            f"{arch.model_type} graph computes as transformers does; it has "
            f"{', '.join(sorted(arch.rope_scaling))}"
        )
    part = rope.number(
        "partial_rotary_factor", 0, 1, default=fields.number("partial_rotary_factor", 0, 1, 1.0)
    )
    if kind == "yarn":
        _check_yarn(arch, rope)
    original = Fields({**inner, **_given(fields.config)}, {}, fields.name)
    return Rope(
        theta=rope.number("rope_theta", 0.0, 1e12),
        kind=kind,
        factor=rope.number("factor", 0.0, 1e6) if kind in SCALED else 1.0,
        dims=_rotary_dims(arch, fields, head, part),
        fields=inner,
        original_context=original.integer(
            "original_max_position_embeddings", 1, MAX_CONTEXT, default=context
        ),
        local_theta=local,
    )


def _check_yarn(arch: Arch, rope: Fields) -> None:
    """llama.cpp's graphs of these architectures compute YaRN with the paper's constants only."""
    usual: dict[str, Any] = {**YARN_USUAL, "truncate": True}
    factor = rope.number("factor", 0.0, 1e6)
    if factor < 1.0:
        raise rope.bad("factor", factor, "at least 1 for YaRN")
    attention = 0.1 * math.log(factor) + 1.0  # arXiv:2309.00071, equation 22
    if rope.get("attention_factor") is not None:
        given = rope.number("attention_factor", 0.0, 1e6)
        if not math.isclose(given, attention, rel_tol=1e-4):
            usual["attention_factor"] = attention
    for key, value in usual.items():
        got = rope.get(key)
        if got is not None and got != value:
            raise UnsupportedError(
                f"{rope.name}: YaRN with '{key}' {got!r:.80}; "
                f"llama.cpp's {arch.model_type} graph computes it with {value!r:.80}"
            )


def _given(config: Mapping[str, Any]) -> dict[str, Any]:
    key = "original_max_position_embeddings"
    return {key: config[key]} if config.get(key) is not None else {}


def _theta(fields: Fields) -> Any:
    return fields.get("rope_theta", 10000.0)


def _rope_table(fields: Fields, key: str) -> dict[str, Any]:
    value = fields.get(key)
    if value is not None and not isinstance(value, dict):
        raise fields.bad(key, value, "an object or null")
    return value or {}


def _gemma3_rope(fields: Fields) -> tuple[dict[str, Any], float]:
    """RoPE of the full layers, and the base of the windowed ones."""
    table = _rope_table(fields, "rope_parameters")
    full, window = (table.get(f"{kind}_attention") or {} for kind in ("full", "sliding"))
    if not isinstance(full, dict) or not isinstance(window, dict):
        raise fields.bad("rope_parameters", table, "an object per kind of layer")
    if window.get("rope_type", "default") != "default":
        raise UnsupportedError(
            f"{fields.name}: windowed layers have RoPE scaling {window['rope_type']!r:.80}; "
            "llama.cpp's gemma3 graph scales only the others"
        )
    local = Fields({"rope_local_base_freq": fields.get("rope_local_base_freq")}, {}, fields.name)
    base = window.get("rope_theta")
    if base is not None:
        local = Fields({"rope_local_base_freq": base}, {}, fields.name)
    return {**full, **_rope_table(fields, "rope_scaling")}, local.number(
        "rope_local_base_freq", 0.0, 1e12
    )


def _rotary_dims(arch: Arch, fields: Fields, head: int, part: float) -> int:
    dims = int(head * part)
    if dims < 2 or dims % 2:
        raise fields.bad("partial_rotary_factor", part, f"an even share of a head of {head}")
    if dims != head and arch.model_type != "phi3":
        raise UnsupportedError(
            f"{fields.name}: {dims} of {head} values of a head rotate; "
            f"llama.cpp's {arch.model_type} graph rotates all"
        )
    return dims


def llama3_factors(rope: Rope, name: str) -> npt.NDArray[np.float32]:
    """What llama.cpp divides each frequency by, float32 ``[dims // 2]``, for Llama-3 scaling.

    Wavelengths above ``original / low_freq_factor`` grow by ``factor``, those below ``original /
    high_freq_factor`` stay, those between are interpolated, as in transformers'
    ``_compute_llama3_parameters``.
    """
    fields = Fields(rope.fields, {}, name)
    low = fields.number("low_freq_factor", 0.0, 1e6)
    high = fields.number("high_freq_factor", 0.0, 1e6)
    if high <= low:
        raise fields.bad("high_freq_factor", high, f"more than low_freq_factor {low:g}")
    steps = np.arange(0, rope.dims, 2, dtype=np.float32) / np.float32(rope.dims)
    frequency = 1.0 / np.float32(rope.theta) ** steps
    turns = rope.original_context * frequency / np.float32(2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    between = 1.0 / ((1.0 - smooth) / rope.factor + smooth)
    scaled = np.where(turns > high, 1.0, np.where(turns < low, rope.factor, between))
    return scaled.astype(np.float32)


def longrope_factors(rope: Rope, name: str) -> dict[str, npt.NDArray[np.float32]]:
    """Long and short factors of LongRoPE, float32 ``[dims // 2]`` each."""
    fields = Fields(rope.fields, {}, name)

    def factors(key: str) -> npt.NDArray[np.float32]:
        value = fields.get(key)
        if not isinstance(value, list) or len(value) != rope.dims // 2:
            raise fields.bad(key, value, f"{rope.dims // 2} numbers")
        single = (Fields({key: item}, {}, name).number(key, 0.0, 1e6) for item in value)
        return np.fromiter(single, np.float32, len(value))

    return {key: factors(f"{key}_factor") for key in ("long", "short")}


def longrope_attention(rope: Rope, context: int, name: str) -> float:
    """Factor on rotated queries and keys that makes up for the longer context.

    arXiv:2402.13753, equation 7, as transformers computes it.
    """
    fields = Fields(rope.fields, {}, name)
    if fields.get("attention_factor") is not None:
        return fields.number("attention_factor", 0.0, 1e6)
    scale = fields.number("factor", 0.0, 1e6, default=context / rope.original_context)
    if scale <= 1.0:
        return 1.0
    if rope.original_context < 2:
        raise fields.bad("original_max_position_embeddings", rope.original_context, "at least 2")
    return math.sqrt(1 + math.log(scale) / math.log(rope.original_context))
