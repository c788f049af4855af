"""A checkpoint's facts as the ONNX graph builder takes them: rotations, windows, factors.

The same rows of `edgekit.arch.table` as for llama.cpp; where llama.cpp's graph differs from
transformers (windows of Mistral and Phi-3), this follows transformers.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.arch.config import Hyper
from edgekit.arch.fields import MAX_CONTEXT, Fields
from edgekit.arch.rope import Rope, llama3_factors, longrope_attention, longrope_factors
from edgekit.arch.table import Arch
from edgekit.errors import UnsupportedError
from edgekit.exporters.onnx_decoder import Decoder, Rotation

MAX_POSITIONS = 1 << 15  # of the tables of rotations: 8 MiB for heads of 64
HEAD_MULTIPLE = 16
F32Array = npt.NDArray[np.float32]


def decoder_of(arch: Arch, hyper: Hyper, config: Mapping[str, Any], name: str) -> Decoder:
    """The decoder that ``config`` describes; ``name`` is for messages.

    Raises:
        RefusedError: A field is of the wrong type or out of range.
        UnsupportedError: ONNX Runtime's operators cannot compute it.
    """
    if not arch.has_onnx:
        raise UnsupportedError(f"{name}: {arch.model_type} has no ONNX graph; use --format gguf")
    fields, sizes = Fields(config, arch.defaults, name), hyper.sizes
    if sizes["head"] % HEAD_MULTIPLE:
        raise UnsupportedError(
            f"{name}: heads are {sizes['head']} wide; ONNX Runtime's attention needs a multiple of "
            f"{HEAD_MULTIPLE}: use --format gguf"
        )
    context = min(hyper.context, MAX_POSITIONS)
    rotations = [_rotation(hyper.rope, hyper.rope.theta, context, hyper.context, name)]
    rotation_of: list[int | None] = [0] * hyper.n_layers
    if hyper.rope.local_theta is not None:  # windowed layers have a base of their own, unscaled
        plain = _angles(_frequencies(hyper.rope.local_theta, hyper.rope.dims), context)
        rotations.append(Rotation(*plain))
        rotation_of = [int(windowed) for windowed in hyper.windowed]
    if arch.unrotated_every:
        step = arch.unrotated_every
        rotation_of = [None if (i + 1) % step == 0 else 0 for i in range(hyper.n_layers)]
    scalar = fields.get("query_pre_attn_scalar") if arch.scalar_layers is not None else None
    return Decoder(
        n_layers=hyper.n_layers,
        n_heads=hyper.n_heads,
        n_kv_heads=hyper.n_kv_heads,
        head=sizes["head"],
        hidden=sizes["embd"],
        vocab=sizes["vocab"],
        context=context,
        norm_eps=hyper.norm_eps,
        rotations=tuple(rotations),
        rotation_of=tuple(rotation_of),
        is_interleaved=arch.is_interleaved,
        windows=_windows(arch, hyper, fields),
        score_scale=float(scalar or sizes["head"]) ** -0.5,
        score_cap=_cap(arch, fields, "attn_logit_softcapping"),
        logit_cap=_cap(arch, fields, "final_logit_softcapping"),
        embedding_scale=math.sqrt(sizes["embd"]) if arch.scales_embedding else 1.0,
        activation="silu" if arch.activation == "silu" else "gelu",
        n_used=hyper.n_experts_used,
        renormalizes=arch.fixed.get("norm_topk_prob", True),
    )


def _cap(arch: Arch, fields: Fields, key: str) -> float:
    return fields.number(key, 0.0, 1e6) if arch.window_every and fields.get(key) else 0.0


def _windows(arch: Arch, hyper: Hyper, fields: Fields) -> tuple[int, ...]:
    """Tokens that each layer attends to, as transformers has it; 0: all."""
    if arch.window_every:
        return tuple((hyper.window or 0) * windowed for windowed in hyper.windowed)
    used = fields.get("use_sliding_window", arch.has_window)
    if not used or fields.get("sliding_window") is None:
        return (0,) * hyper.n_layers
    window = fields.integer("sliding_window", 1, MAX_CONTEXT)
    kinds = fields.get("layer_types")
    if isinstance(kinds, list) and len(kinds) == hyper.n_layers:
        return tuple(window * (kind == "sliding_attention") for kind in kinds)
    first = 0 if arch.has_window else fields.integer("max_window_layers", 0, MAX_CONTEXT, 28)
    return tuple(window * (i >= first) for i in range(hyper.n_layers))


def _frequencies(theta: float, dims: int) -> F32Array:
    steps = np.arange(0, dims, 2, dtype=np.float32) / np.float32(dims)
    found: F32Array = (1.0 / np.float32(theta) ** steps).astype(np.float32)
    return found


def _angles(frequencies: F32Array, context: int, factor: float = 1.0) -> tuple[F32Array, F32Array]:
    angles = np.arange(context, dtype=np.float32)[:, None] * frequencies
    scale = np.float32(factor)
    return np.cos(angles) * scale, np.sin(angles) * scale


def _rotation(rope: Rope, theta: float, context: int, trained: int, name: str) -> Rotation:
    plain = _frequencies(theta, rope.dims)
    match rope.kind:
        case "linear":
            return Rotation(*_angles(plain / np.float32(rope.factor), context))
        case "llama3":
            return Rotation(*_angles(plain / llama3_factors(rope, name), context))
        case "yarn":
            attention = 0.1 * math.log(rope.factor) + 1.0  # arXiv:2309.00071, equation 22
            return Rotation(*_angles(_yarn(rope, plain), context, attention))
        case "longrope":
            factors = longrope_factors(rope, name)
            attention = longrope_attention(rope, trained, name)
            short = min(rope.original_context, context)
            tables = [
                _angles(plain / factors["short"], short, attention),
                _angles(plain / factors["long"], context, attention),
            ]
            cos, sin = (np.concatenate(pair) for pair in zip(*tables, strict=True))
            return Rotation(cos, sin, short)
        case _:
            return Rotation(*_angles(plain, context))


def _yarn(rope: Rope, plain: F32Array) -> F32Array:
    """Frequencies between interpolated and original ones; arXiv:2309.00071, section 3.2."""

    def dimension(turns: float) -> float:
        length = rope.original_context / (turns * 2 * math.pi)
        return rope.dims * math.log(length) / (2 * math.log(rope.theta))

    low = max(math.floor(dimension(32)), 0)
    high = min(math.ceil(dimension(1)), rope.dims - 1)
    steps = (np.arange(len(plain), dtype=np.float32) - low) / max(high - low, 0.001)
    kept = 1 - steps.clip(0, 1)
    found: F32Array = plain / np.float32(rope.factor) * (1 - kept) + plain * kept
    return found.astype(np.float32)
