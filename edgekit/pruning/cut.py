"""How much of what is removed: kept layers and uniform widths, their parameters, their config."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gguf import MODEL_TENSOR, TENSOR_NAMES

from edgekit.arch import Mapping
from edgekit.arch.config import Hyper, read_hyper
from edgekit.errors import RefusedError, UnsupportedError, UsageError

Config = dict[str, Any]

MULTIPLE = 256  # weights in a block of a K-quant: narrower rows fall back to larger types
PER_LAYER = ("layer_types", "no_rope_layers")  # config fields with one entry per layer
SLACK = 0.03  # of all parameters: how far from the asked ratio a better combination may be


@dataclass(frozen=True)
class Cut:
    """What is kept. Widths are the same in every layer, as stock graphs of llama.cpp need.

    Attributes:
        layers: Indices of the layers that stay, ascending.
        kv_heads: Query groups: key-value heads, each with all of its query heads.
        ff: Neurons of a dense feed-forward block; 0 without one.
        experts: Experts per layer; 0 without experts.
        ffe: Neurons inside an expert; 0 without experts.
    """

    layers: tuple[int, ...]
    kv_heads: int
    ff: int
    experts: int = 0
    ffe: int = 0


def whole(mapping: Mapping) -> Cut:
    """The cut that removes nothing."""
    hyper = mapping.hyper
    dense = hyper.sizes["ff"] if not hyper.n_experts else 0
    n_layers = tuple(range(hyper.n_layers))
    return Cut(n_layers, hyper.n_kv_heads, dense, hyper.n_experts, hyper.sizes.get("ffe", 0))


def roles(mapping: Mapping) -> dict[str, tuple[str, ...]]:
    """Tensors of a layer under their GGUF suffix (``ffn_down.weight``) -> extents as words."""
    present = {t.name.removeprefix("blk.0.") for t in mapping.tensors if "blk.0." in t.name}
    found = {}
    for role, extents in mapping.arch.tensors.items():
        word, suffix = role.rstrip("?").split(".")
        stem = TENSOR_NAMES[MODEL_TENSOR[word]].removeprefix("blk.{bid}.")
        if f"{stem}.{suffix}" in present:
            found[f"{stem}.{suffix}"] = tuple(extents.split())
    return found


def sizes(hyper: Hyper, cut: Cut) -> dict[str, int]:
    """The words of `edgekit.arch.table` after the cut."""
    head, repeat = hyper.sizes["head"], hyper.n_heads // hyper.n_kv_heads
    changed = {
        "q": cut.kv_heads * repeat * head,
        "kv": cut.kv_heads * head,
        "qkv": cut.kv_heads * (repeat + 2) * head,
        "ff": cut.ff,
        "ff2": 2 * cut.ff,
        "experts": cut.experts,
        "ffe": cut.ffe,
    }
    return {word: changed.get(word, size) for word, size in hyper.sizes.items()}


def n_parameters(mapping: Mapping, cut: Cut) -> int:
    """Parameters of the model after the cut; a tied embedding counts once."""
    outside = sum(t.n_weights for t in mapping.tensors if not t.name.startswith("blk."))
    extents = sizes(mapping.hyper, cut)
    layer = sum(math.prod(extents[word] for word in words) for words in roles(mapping).values())
    return outside + len(cut.layers) * layer


def ratio_of(mapping: Mapping, cut: Cut) -> float:
    """Share of all parameters that the cut removes."""
    return 1 - n_parameters(mapping, cut) / n_parameters(mapping, whole(mapping))


def kept(mapping: Mapping, cut: Cut) -> dict[str, int]:
    """What is left, in plain words."""
    extents = sizes(mapping.hyper, cut)
    found = {
        "layers": len(cut.layers),
        "attention_heads": extents["q"] // extents["head"],
        "key_value_heads": cut.kv_heads,
    }
    if mapping.hyper.n_experts:
        return found | {"experts": cut.experts, "expert_neurons": cut.ffe}
    return found | {"neurons": cut.ff}


def cut_config(config: Config, mapping: Mapping, cut: Cut) -> Config:
    """The config.json of the result; every field with an entry per layer is rewritten.

    Raises:
        UnsupportedError: llama.cpp's graph takes for granted what the cut would change.
    """
    hyper, full = mapping.hyper, whole(mapping)
    changed: Config = {"num_hidden_layers": len(cut.layers)}
    if mapping.arch.window_every:  # by position in the config, by layer in the weights
        kinds = ("full_attention", "sliding_attention")
        changed["layer_types"] = [kinds[is_windowed] for is_windowed in hyper.windowed]
    for key in PER_LAYER:
        values = changed.get(key, config.get(key))
        if isinstance(values, list) and len(values) == hyper.n_layers:
            changed[key] = [values[layer] for layer in cut.layers]
    if cut.kv_heads != full.kv_heads:
        repeat = hyper.n_heads // hyper.n_kv_heads
        changed["num_attention_heads"] = cut.kv_heads * repeat
        changed["num_key_value_heads"] = cut.kv_heads
        changed["head_dim"] = hyper.sizes["head"]
    if cut.ff != full.ff:
        changed["intermediate_size"] = cut.ff
    if mapping.arch.expert_ff is not None:
        changed |= {
            key: cut.experts for key in mapping.arch.expert_keys if config.get(key) is not None
        }
        changed["num_experts_per_tok"] = min(hyper.n_experts_used, cut.experts)
        changed[mapping.arch.expert_ff] = cut.ffe
    result = {**config, **{k: v for k, v in changed.items() if config.get(k) != v}}
    read_hyper(mapping.arch, result, "the pruned config")
    return result


def candidates(
    mapping: Mapping, ratio: float, multiple: int = MULTIPLE, n_removed: int | None = None
) -> list[Cut]:
    """Combinations about as large as asked, at least the nearest of all.

    Of each number of layers, groups and experts the width that comes nearest is taken, if that is
    within `SLACK`; with ``n_removed`` only combinations that remove so many layers. A cut stands
    for its number of layers: which ones go is not known yet, the first are named.

    Raises:
        UsageError: ``ratio`` is out of range.
        UnsupportedError: Nothing the widths allow is near.
    """
    if not 0 <= ratio < 1:
        raise UsageError(f"a ratio of {ratio:g} is out of range; give 0 up to 1, such as 0.2")
    if ratio == 0:
        return [whole(mapping)]
    off = {c: abs(ratio_of(mapping, c) - ratio) for c in _combinations(mapping, multiple)}
    off.pop(whole(mapping))
    if n_removed is not None:
        n_left = mapping.hyper.n_layers - n_removed
        off = {cut: distance for cut, distance in off.items() if len(cut.layers) == n_left}
    best: dict[tuple[int, ...], Cut] = {}
    for cut in sorted(off, key=off.__getitem__):
        best.setdefault((len(cut.layers), cut.kv_heads, cut.experts), cut)
    nearest = min(off.values(), default=1.0)
    if nearest > ratio / 2:
        raise UnsupportedError(_unreachable(mapping, ratio, multiple, off))
    return [cut for cut in best.values() if off[cut] <= max(nearest, SLACK)]


def _combinations(mapping: Mapping, multiple: int) -> Iterator[Cut]:
    full = whole(mapping)
    axes = itertools.product(
        range(1, len(full.layers) + 1),
        _group_counts(mapping, multiple),
        _widths(full.ff, multiple),
        range(mapping.hyper.n_experts_used, full.experts + 1),
        _widths(full.ffe, multiple),
    )
    for n_layers, *rest in axes:
        yield Cut(full.layers[:n_layers], *rest)


def _widths(width: int, multiple: int) -> list[int]:
    """The width itself and the multiples below it."""
    return sorted({width, *range(multiple, width, multiple)})


def _group_counts(mapping: Mapping, multiple: int) -> list[int]:
    """Query groups whose rows of the output projection are whole blocks."""
    hyper = mapping.hyper
    words = {word for extents in roles(mapping).values() if len(extents) == 1 for word in extents}
    if mapping.arch.is_head_derived or "q" in words:  # a norm over all heads would change
        return [hyper.n_kv_heads]
    group, repeat = hyper.sizes["q"] // hyper.n_kv_heads, hyper.n_heads // hyper.n_kv_heads
    return [
        n
        for n in range(1, hyper.n_kv_heads + 1)
        if n == hyper.n_kv_heads
        # transformers' LlamaConfig wants whole shares of the hidden size, though heads have a width
        or (n * group % multiple == 0 and hyper.sizes["embd"] % (n * repeat) == 0)
    ]


def _unreachable(mapping: Mapping, ratio: float, multiple: int, off: dict[Cut, float]) -> str:
    hyper = mapping.hyper
    width = hyper.sizes.get("ffe", hyper.sizes.get("ff", 0))
    near = ratio_of(mapping, min(off, key=off.__getitem__)) if off else 0
    return (
        f"a ratio of {ratio:g} cannot be reached in multiples of {multiple}: the feed-forward "
        f"width is {width}, the attention {hyper.sizes['q']} in {hyper.n_kv_heads} groups, and the "
        f"nearest ratio is {near:.3f}; give that ratio, or a smaller --multiple such as 32"
    )


def is_allowed(config: Config, mapping: Mapping, cut: Cut) -> bool:
    """Whether llama.cpp's graph computes the result (SmolLM3's pattern of rotated layers)."""
    try:
        cut_config(config, mapping, cut)
    except RefusedError:
        return False
    return True
