"""Hyperparameters of a checkpoint, checked against the row of its architecture."""

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from edgekit.arch.fields import MAX_CONTEXT, Fields
from edgekit.arch.rope import Rope, read_rope
from edgekit.arch.table import ARCHS, Arch
from edgekit.errors import RefusedError, UnsupportedError

MAX_LAYERS = 512  # LLAMA_MAX_LAYERS; more end the process in a failed assertion
MAX_EXPERTS = 1024  # LLAMA_MAX_EXPERTS
MAX_WIDTH = 1 << 22  # hidden and feed-forward; the largest published are about 2**17
MAX_HEADS = 1 << 12
MAX_VOCAB = 1 << 24


@dataclass(frozen=True)
class Hyper:
    """Checked hyperparameters.

    Attributes:
        sizes: Extents by the words of `edgekit.arch.table`: vocab, embd, q, kv, head, ff, ...
        n_layers, n_heads, n_kv_heads, context: Counts; ``context`` in tokens.
        n_experts, n_experts_used: 0 without experts.
        norm_eps: Epsilon of the RMS norms.
        rope: Rotary embedding.
        is_tied: config.json says that the output head is the embedding.
        window: Tokens of the sliding window where the graph has windows, else None.
        windowed: Whether each layer attends in the window; empty where the graph has none.
        notes: What llama.cpp computes otherwise, one line each.
    """

    sizes: Mapping[str, int]
    n_layers: int
    n_heads: int
    n_kv_heads: int
    context: int
    n_experts: int
    n_experts_used: int
    norm_eps: float
    rope: Rope
    is_tied: bool
    window: int | None
    windowed: tuple[bool, ...]
    notes: tuple[str, ...]


def find_arch(config: Mapping[str, Any]) -> Arch:
    """The row for a config.json.

    Raises:
        UnsupportedError: No row; the message names the nearest or all.
    """
    model_type, classes = config.get("model_type"), config.get("architectures")
    name = classes[0] if isinstance(classes, list) and classes else None
    row = ARCHS.get(model_type) if isinstance(model_type, str) else None
    if row is not None and name in (None, row.class_name):
        return row
    known = [arch.class_name for arch in ARCHS.values()]
    by_class = {arch.class_name: arch for arch in ARCHS.values()}
    if model_type is None and isinstance(name, str) and name in by_class:
        return by_class[name]
    shown = name if isinstance(name, str) else model_type
    close = get_close_matches(str(shown)[:100], known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}? " if close else ""
    raise UnsupportedError(
        f"unknown architecture {shown!r:.100}; {hint}edgekit converts {', '.join(known)}"
    )


def read_hyper(arch: Arch, config: Mapping[str, Any], name: str) -> Hyper:
    """Check ``config`` against ``arch``.

    Raises:
        RefusedError: A field is missing, of the wrong type, out of range or contradicts another.
        UnsupportedError: llama.cpp's graph computes something else than the config asks for.
    """
    fields = Fields(config, arch.defaults, name)
    _check_fixed(arch, fields)
    n_layers = fields.integer("num_hidden_layers", 1, MAX_LAYERS)
    heads = fields.integer("num_attention_heads", 1, MAX_HEADS)
    kv_heads = fields.integer("num_key_value_heads", 1, heads, default=heads)
    embd = fields.integer("hidden_size", 1, MAX_WIDTH)
    head = fields.integer("head_dim", 2, MAX_WIDTH // heads, default=embd // heads)
    if heads % kv_heads or head % 2:
        raise RefusedError(
            f"{name}: {heads} heads of {head} with {kv_heads} key-value heads; it needs an even "
            "head width and heads that are a multiple of key-value heads"
        )
    if arch.is_head_derived and head * heads != embd:
        raise UnsupportedError(
            f"{name}: head_dim {head} x {heads} heads is not hidden_size {embd}; "
            f"llama.cpp's {arch.model_type} graph needs that"
        )
    sizes = {
        "one": 1, "vocab": fields.integer("vocab_size", 1, MAX_VOCAB), "embd": embd, "head": head,
        "q": heads * head, "kv": kv_heads * head, "qkv": (heads + 2 * kv_heads) * head,
    }  # fmt: skip
    n_experts, used = _experts(arch, fields, sizes)
    context = fields.integer("max_position_embeddings", 1, MAX_CONTEXT)
    windowed = _windows(arch, fields, n_layers)
    _check_graph(arch, fields, sizes, n_layers, heads, kv_heads)
    return Hyper(
        sizes=sizes,
        n_layers=n_layers,
        n_heads=heads,
        n_kv_heads=kv_heads,
        context=context,
        n_experts=n_experts,
        n_experts_used=used,
        norm_eps=fields.number("rms_norm_eps", 0.0, 1.0, default=1e-6),
        rope=read_rope(arch, fields, head, context),
        is_tied=fields.flag("tie_word_embeddings", False),
        window=fields.integer(arch.window_key, 1, MAX_CONTEXT) if any(windowed) else None,
        windowed=windowed,
        notes=_window_notes(arch, fields, context),
    )


def _experts(arch: Arch, fields: Fields, sizes: dict[str, int]) -> tuple[int, int]:
    """Experts and how many a token uses; adds the feed-forward widths to ``sizes``."""
    # with a width of their own, experts leave intermediate_size unused, but configs still have it
    own_width = arch.expert_ff not in (None, "intermediate_size")
    if not own_width or fields.get("intermediate_size") is not None:
        sizes["ff"] = fields.integer("intermediate_size", 1, MAX_WIDTH)
        sizes["ff2"] = 2 * sizes["ff"]
    if arch.expert_ff is None:
        return 0, 0
    known = [key for key in arch.expert_keys if fields.get(key) is not None]
    keys = known or [arch.expert_keys[0]]
    n_experts = fields.integer(keys[0], 1, MAX_EXPERTS)
    if fields.get(keys[-1], n_experts) != n_experts:
        raise fields.bad(keys[-1], fields.get(keys[-1]), f"the {n_experts} of '{keys[0]}'")
    sizes["experts"] = n_experts
    sizes["ffe"] = fields.integer(arch.expert_ff, 1, MAX_WIDTH)
    if "FFN_UP_SHEXP.weight" in arch.tensors:
        sizes["ffs"] = fields.integer("shared_expert_intermediate_size", 1, MAX_WIDTH)
    return n_experts, fields.integer(arch.used_key, 1, n_experts)


def _check_fixed(arch: Arch, fields: Fields) -> None:
    for key, value in arch.fixed.items():
        got = fields.get(key)
        if (got is not None and got != value) or (got is None and value):
            raise UnsupportedError(
                f"{fields.name}: '{key}' is {got!r:.80}; "
                f"llama.cpp's {arch.model_type} graph computes only {value!r}"
            )
    key = arch.activation_key
    activation = fields.get(key) or arch.activation
    if activation != arch.activation:
        raise UnsupportedError(
            f"{fields.name}: '{key}' is {activation!r:.80}; "
            f"llama.cpp's {arch.model_type} graph computes only {arch.activation}"
        )


def _check_graph(
    arch: Arch, fields: Fields, sizes: Mapping[str, int], n_layers: int, heads: int, kv_heads: int
) -> None:
    """Facts of single graphs that are no plain value of one field."""
    if arch.scalar_layers is not None:
        derived = n_layers == arch.scalar_layers
        want = sizes["embd"] // heads if derived else sizes["head"]
        got = fields.number("query_pre_attn_scalar", 0.0, 1e6)
        if got != want:
            raise UnsupportedError(
                f"{fields.name}: query_pre_attn_scalar is {got:g}; "
                f"llama.cpp scales the scores of this model by {want}"
            )
    if arch.model_type == "gemma2" and not any(_windows(arch, fields, n_layers)):
        raise UnsupportedError(  # a failed assertion in llama.cpp, which would end the process
            f"{fields.name}: no layer attends in a window; llama.cpp's gemma2 graph needs one"
        )
    if arch.model_type == "gemma2":
        fields.number("attn_logit_softcapping", 0.0, 1e6)
        fields.number("final_logit_softcapping", 0.0, 1e6)
    if arch.model_type == "olmoe" and heads != kv_heads:
        raise UnsupportedError(
            f"{fields.name}: {kv_heads} key-value heads for {heads} heads; "
            "llama.cpp's olmoe graph needs as many"
        )
    if arch.model_type == "smollm3":
        _check_no_rope(fields, n_layers)


def _check_no_rope(fields: Fields, n_layers: int) -> None:
    step = fields.integer("no_rope_layer_interval", 1, MAX_LAYERS, default=4)
    layers = fields.get("no_rope_layers")
    if layers is None:
        layers = [int((i + 1) % step != 0) for i in range(n_layers)]
    if layers != [int((i + 1) % 4 != 0) for i in range(n_layers)]:
        raise UnsupportedError(
            f"{fields.name}: no_rope_layers is {layers!r:.80}; "
            "llama.cpp's smollm3 graph leaves out the rotation in every fourth layer only"
        )


def _windows(arch: Arch, fields: Fields, n_layers: int) -> tuple[bool, ...]:
    """Which layers attend in a window, for graphs that have windows."""
    if not arch.window_every:
        return ()
    if arch.model_type == "smallthinker":
        return _smallthinker_windows(arch, fields, n_layers)
    kinds = fields.get("layer_types")
    if kinds is None:
        every = fields.integer("sliding_window_pattern", 1, 1 << 16, default=arch.window_every)
        return tuple((i + 1) % every != 0 for i in range(n_layers))
    known = {"sliding_attention", "full_attention"}
    if not isinstance(kinds, list) or len(kinds) != n_layers or not {*map(str, kinds)} <= known:
        raise fields.bad("layer_types", kinds, f"{n_layers} of {' or '.join(sorted(known))}")
    return tuple(kind == "sliding_attention" for kind in kinds)


def _smallthinker_windows(arch: Arch, fields: Fields, n_layers: int) -> tuple[bool, ...]:
    """Windows in all but every fourth layer, or none; what has none has rotations everywhere."""
    layouts = [
        fields.get("sliding_window_layout", [0] * n_layers),
        fields.get("rope_layout", [1] * n_layers),
    ]
    pattern = [int(arch.is_windowed(i)) for i in range(n_layers)]
    if layouts == [[0] * n_layers, [1] * n_layers]:
        return ()
    if layouts != [pattern, pattern]:
        raise UnsupportedError(
            f"{fields.name}: sliding_window_layout and rope_layout are {str(layouts)[:80]}; "
            "llama.cpp's smallthinker graph has both in all but every fourth layer, or no window "
            "and rotations everywhere"
        )
    if fields.integer(arch.window_key, 1, MAX_CONTEXT) != 4096:
        raise UnsupportedError(
            f"{fields.name}: {arch.window_key} is {fields.get(arch.window_key)}; "
            "llama.cpp's smallthinker graph computes only 4096"
        )
    return tuple(bool(item) for item in pattern)


def _window_notes(arch: Arch, fields: Fields, context: int) -> tuple[str, ...]:
    window = fields.get("sliding_window")
    # Qwen and SmolLM3 keep a window in the config that only use_sliding_window switches on
    used = fields.get("use_sliding_window", arch.has_window)
    if arch.window_every or not used or not isinstance(window, int) or window >= context:
        return ()
    return (
        f"the model attends in a window of {window} tokens; llama.cpp's {arch.model_type} graph "
        "attends to all, so results differ beyond that",
    )
