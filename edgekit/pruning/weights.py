"""A layer's weights under role names, cut along the axes that the table of architectures names."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from edgekit.arch import Mapping as TensorMapping
from edgekit.arch import SourceTensor
from edgekit.arch.source import widened
from edgekit.checkpoint import Checkpoint

Tensor = Any
Layer = dict[str, Tensor]  # GGUF suffix (`ffn_down.weight`) -> float32, experts stacked first
Kept = Mapping[str, Tensor]  # word of an extent -> indices that stay
SHIFT = "shift"  # `ffn_down.shift`: added to that map's output, while measuring only
_LAYER = re.compile(r"^model\.layers\.(\d+)\.")
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
ROUND, HALF_ULP = np.uint32(0x7FFF), np.uint32(16)


def read_layer(mapping: TensorMapping, index: int) -> Layer:
    """The weights of layer ``index``, rows in the order of the checkpoint."""
    prefix = f"blk.{index}."
    found = (t for t in mapping.tensors if t.name.startswith(prefix))
    return {tensor.name.removeprefix(prefix): _values(tensor) for tensor in found}


def _values(tensor: SourceTensor) -> Tensor:
    read, stored = tensor.checkpoint.read, tensor.checkpoint.tensors
    parts = []
    for piece in tensor.pieces:
        rows = read(piece.tensor, slice(piece.first, piece.first + piece.n_rows))
        parts.append(widened(rows, stored[piece.tensor].dtype == "BF16"))
    return torch.from_numpy(np.concatenate(parts).reshape(tensor.shape))


def parameters(layer: Layer, mapping: TensorMapping, index: int = 0) -> dict[str, Tensor]:
    """The same weights under the names of transformers' modules inside a layer."""
    found: dict[str, Tensor] = {}
    for suffix, value in layer.items():
        if suffix.endswith(SHIFT):
            continue
        if len(value.shape) == 3 and "down" in suffix:
            found["mlp.experts.down_proj"] = value
        elif len(value.shape) != 3:
            found[_parameter(mapping, index, suffix)] = value
    if "ffn_gate_exps.weight" in layer:
        both = (layer["ffn_gate_exps.weight"], layer["ffn_up_exps.weight"])
        found["mlp.experts.gate_up_proj"] = torch.cat(both, 1)
    if "ffn_gate_inp_shexp.weight" in layer:  # one row, 1-D for llama.cpp
        found["mlp.shared_expert_gate.weight"] = layer["ffn_gate_inp_shexp.weight"].view(1, -1)
    return found


def _parameter(mapping: TensorMapping, index: int, suffix: str) -> str:
    name = f"blk.{index}.{suffix}"
    stored = next(t for t in mapping.tensors if t.name == name).pieces[0].tensor
    return _LAYER.sub("", stored).replace("block_sparse_moe.", "mlp.")


def cut_layer(layer: Layer, words: Mapping[str, tuple[str, ...]], kept: Kept) -> Layer:
    """``layer`` with only the ``kept`` indices along every axis that has a word in it."""
    result = {}
    for suffix, value in layer.items():
        axes = words.get(suffix, ())[-value.ndim :]
        for axis, word in enumerate(axes):
            if word in kept:
                value = _take(value, axis, kept[word])
        result[suffix] = value
    return result


def _take(value: Tensor, axis: int, indices: Tensor) -> Tensor:
    """Take indices along an axis; 2-D indices ``[experts, n]`` differ per expert."""
    if indices.ndim == 1:
        return value.index_select(axis, indices)
    return torch.stack([v.index_select(axis - 1, i) for v, i in zip(value, indices, strict=True)])


def attention_kept(groups: Tensor, head: int, n_heads: int, n_kv_heads: int) -> dict[str, Tensor]:
    """Kept rows of Q, K and V for kept query groups, also where the three are one tensor."""
    repeat = n_heads // n_kv_heads
    q, kv = _span(groups, repeat * head), _span(groups, head)
    first_k, first_v = n_heads * head, (n_heads + n_kv_heads) * head
    return {"q": q, "kv": kv, "qkv": torch.cat((q, kv + first_k, kv + first_v))}


def neurons_kept(neurons: Tensor, width: int) -> dict[str, Tensor]:
    """Kept rows of gate and up, also where the two are one tensor."""
    return {"ff": neurons, "ff2": torch.cat((neurons, neurons + width))}


def _span(blocks: Tensor, block: int) -> Tensor:
    return (blocks[:, None] * block + torch.arange(block)).flatten()


def stored_tensors(
    layer: Layer, mapping: TensorMapping, source: int, target: int
) -> Iterator[tuple[str, str, npt.NDArray[Any]]]:
    """The layer under its checkpoint names: name, dtype, values as bits of that dtype.

    Layers and experts are renumbered; experts that were one tensor are one tensor again.
    """
    fused: dict[str, list[Tensor]] = {}
    for suffix, value in layer.items():
        tensor = next(t for t in mapping.tensors if t.name == f"blk.{source}.{suffix}")
        name = _renumbered(tensor.pieces[0].tensor, target)
        if len(value.shape) == 3 and not _EXPERT.search(name):
            fused.setdefault(tensor.pieces[0].tensor, []).append(value)
            continue
        values = value if len(value.shape) == 3 else [value]
        for expert, one in enumerate(values):
            own = _EXPERT.sub(f".experts.{expert}.", name)
            yield own, *_stored(one, tensor.checkpoint, tensor.pieces[0].tensor)
    for name, parts in fused.items():
        whole = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        yield _renumbered(name, target), *_stored(whole, mapping.tensors[0].checkpoint, name)


def _renumbered(name: str, layer: int) -> str:
    return _LAYER.sub(f"model.layers.{layer}.", name)


def _stored(value: Tensor, checkpoint: Checkpoint, name: str) -> tuple[str, npt.NDArray[Any]]:
    ref = checkpoint.tensors[name]
    n_own = 1 if len(value.shape) == 1 and len(ref.shape) == 2 else 0
    return ref.dtype, narrowed(value.numpy(), ref.dtype).reshape((1,) * n_own + value.shape)


def narrowed(values: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[Any]:
    """float32 rounded to nearest even in a stored dtype; BF16 comes as uint16 bits."""
    if dtype == "F32":
        return values
    if dtype == "F16":
        return values.astype(np.float16)
    bits = np.ascontiguousarray(values).view(np.uint32)
    odd = (bits >> HALF_ULP) & np.uint32(1)
    return ((bits + ROUND + odd) >> HALF_ULP).astype("<u2")
