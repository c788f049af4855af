"""A Hugging Face model whose matrices are what an artifact stores: packed levels, or ggml's blocks.

transformers supplies the arithmetic; the class is chosen by `edgekit.arch`, the config is data, and
every linear layer, embedding and block of experts is replaced by one that computes with the packed
bytes. The resident weights are those bytes: levels can be added and dropped while the model is
there, and memory follows. The original matrices never exist.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gguf import get_tensor_name_map
from torch import Tensor, nn

from edgekit.arch.config import Hyper, find_arch, read_hyper
from edgekit.arch.source import interleaved
from edgekit.arch.table import Arch
from edgekit.artifact import Artifact
from edgekit.codecs import CODECS
from edgekit.decode import Decoder, chunks_of
from edgekit.errors import UsageError
from edgekit.evaluate import Quality, Reference, compare
from edgekit.float_model import build
from edgekit.kernels import bitstack_matmul, block_matmul
from edgekit.kernels.bitstack_level import Level
from edgekit.kernels.bitstack_matmul import PackedLevel
from edgekit.kernels.block_matmul import PackedBlocks
from edgekit.kernels.ggml import row_bytes
from edgekit.planner import Depths
from edgekit.stack import Stack

EMBEDDING, HEAD = "token_embd.weight", "output.weight"
SUFFIXES = (".weight", ".bias")
_EXPERTS = re.compile(r"^model\.layers\.(\d+)\..*experts$")
EMBEDDED_ROWS = 256  # that are looked up at once


@dataclass(frozen=True, eq=False)
class Matrix:
    """What is resident of one matrix: blocks, levels on top of them, or levels alone."""

    blocks: PackedBlocks | None
    levels: tuple[PackedLevel, ...] = ()

    @property
    def n_bytes(self) -> int:
        """Bytes of its tensors."""
        tensors = [t for level in self.levels for t in level.tensors]
        tensors += [self.blocks.data] if self.blocks is not None else []
        return sum(t.nbytes for t in tensors)

    def matmul(self, x: Tensor) -> Tensor:
        """``x @ weight.T``."""
        parts = [block_matmul.matmul(self.blocks, x)] if self.blocks is not None else []
        parts += [bitstack_matmul.matmul(self.levels, x)] if self.levels else []
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]

    def rows(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of the weight, ``[n, cols]``."""
        parts: list[Tensor] = []
        if self.blocks is not None:
            some = PackedBlocks(self.blocks.type_name, self.blocks.data[index])
            parts.append(block_matmul.dense_ref(some, dtype))
        if self.levels:
            levels = [level.rows(index) for level in self.levels]
            parts.append(bitstack_matmul.dense_ref(levels, dtype))
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]


class Weights:
    """The matrices of an artifact on a device, each at a depth that can change.

    Attributes:
        device: Where they are.
    """

    def __init__(self, artifact: Artifact, depths: Depths, device: str) -> None:
        """Load ``depths``."""
        self._artifact, self.device = artifact, device
        self._codec = CODECS[artifact.manifest.codec]
        self._decoder = Decoder(self._codec, artifact.part)
        self._tiers: dict[str, str] = {}
        self._matrices: dict[str, tuple[Matrix, ...]] = {}  # an entry per expert
        self.set_depths(depths)

    def __contains__(self, name: str) -> bool:
        return name in self._matrices

    def matrix(self, name: str, expert: int = 0) -> Matrix:
        """What is resident of a GGUF tensor; ask again after a change of depth."""
        return self._matrices[name][expert]

    def dense(self, name: str) -> Tensor:
        """A tensor that is stored as it is, float32: a norm, a bias, a router."""
        matrix = self.matrix(name)
        assert matrix.blocks is not None
        return block_matmul.dense_ref(matrix.blocks, torch.float32)

    @property
    def n_bytes(self) -> int:
        """Resident bytes of all of them."""
        return sum(matrix.n_bytes for name in self._matrices for matrix in self._matrices[name])

    def set_depths(self, depths: Depths) -> None:
        """Load and drop levels until every tensor has its tier; what stays is not read again."""
        for stack in self._artifact.stacks:
            tier = depths.tier(stack.name)
            if self._tiers.get(stack.name) == tier:
                continue
            old = self._matrices.get(stack.name, ())
            self._matrices[stack.name] = tuple(
                self._at(stack, stack.depth_of(tier), expert, old[expert] if old else None)
                for expert in range(stack.n_experts)
            )
            self._tiers[stack.name] = tier
        self._decoder.forget()
        self._artifact.release()

    def _at(self, stack: Stack, depth: int, expert: int, old: Matrix | None) -> Matrix:
        held = self._codec.held(stack, depth)
        if not held:
            return Matrix(self._blocks(stack, depth, expert))
        kept = old if old is not None and old.levels else Matrix(None)
        blocks = kept.blocks
        if blocks is None and 0 in held:
            blocks = self._blocks(stack, 1, expert)
        wanted = [d for d in held if d]
        levels = list(kept.levels[: len(wanted)])
        for d in wanted[len(levels) :]:
            part = self._artifact.part(stack.levels[d], expert)
            level = self._codec.open(part, stack, d, 1)
            assert isinstance(level, Level)
            levels.append(bitstack_matmul.packed(level, self.device))
        return Matrix(blocks, tuple(levels))

    def _blocks(self, stack: Stack, depth: int, expert: int) -> PackedBlocks:
        """The tensor as blocks, decoded chunk by chunk."""
        kind = stack.type_at(stack.tiers[depth - 1])
        data = np.empty((stack.n_rows, row_bytes(kind, stack.cols)), np.uint8)
        for chunk in chunks_of(stack, depth, expert, self._artifact.manifest.chunk_weights):
            self._decoder.decode(chunk, data[chunk.start : chunk.stop].reshape(-1))
        return PackedBlocks(kind, torch.from_numpy(data).to(self.device))


class PackedLinear(nn.Module):
    """A linear layer over a matrix of `Weights`."""

    def __init__(self, weights: Weights, name: str, bias: Tensor | None, order: Tensor | None):
        """Take the GGUF name of the matrix, and the place in its rows of each output."""
        super().__init__()
        self.bias: Tensor | None
        self.order: Tensor | None
        self._weights, self._name = weights, name
        self.register_buffer("bias", bias)
        self.register_buffer("order", order)

    def forward(self, x: Tensor) -> Tensor:
        """``x @ weight.T + bias``."""
        y = self._weights.matrix(self._name).matmul(x)
        if self.order is not None:
            y = y[..., self.order]
        return y if self.bias is None else y + self.bias


class PackedEmbedding(nn.Module):
    """An embedding over a matrix of `Weights`."""

    def __init__(self, weights: Weights, dtype: torch.dtype, scale: Tensor | None):
        """Take the scale of the rows, where the model has one (Gemma)."""
        super().__init__()
        self.scale: Tensor | None
        self._weights, self._dtype = weights, dtype
        self.register_buffer("scale", scale)

    def forward(self, ids: Tensor) -> Tensor:
        """Rows of the embedding."""
        matrix = self._weights.matrix(EMBEDDING)
        parts = ids.reshape(-1).split(EMBEDDED_ROWS)
        rows = torch.cat([matrix.rows(part, self._dtype) for part in parts])
        found = rows.reshape(*ids.shape, -1)
        return found if self.scale is None else found * self.scale.to(found.dtype)


class PackedExperts(nn.Module):
    """A block of experts over matrices of `Weights`: only those that are chosen are computed."""

    def __init__(self, weights: Weights, layer: str, act_fn: Any) -> None:
        """Take the layer's number and the activation."""
        super().__init__()
        self._weights, self._layer, self.act_fn = weights, layer, act_fn

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sum over each token's experts, as transformers' blocks have it."""
        out = torch.zeros_like(hidden)
        for expert in top_k_index.unique().tolist():
            token, place = torch.where(top_k_index == expert)
            x = hidden[token]
            gated = self.act_fn(self._of("gate", expert, x)) * self._of("up", expert, x)
            y = self._of("down", expert, gated) * top_k_weights[token, place, None]
            out.index_add_(0, token, y.to(out.dtype))
        return out

    def _of(self, role: str, expert: int, x: Tensor) -> Tensor:
        name = f"blk.{self._layer}.ffn_{role}_exps.weight"
        return self._weights.matrix(name, expert).matmul(x)


class TorchModel:
    """A depth of an artifact in torch.

    Attributes:
        weights: Its matrices; `Weights.set_depths` changes the depth.
        model: transformers' model around them.
    """

    def __init__(self, artifact: Artifact, depths: Depths, device: str = "cpu") -> None:
        """Build the model.

        Raises:
            UsageError: The artifact does not carry its config, or there is no such device.
        """
        config = artifact.manifest.source.get("config")
        if not isinstance(config, dict):
            raise UsageError(
                f"{artifact.folder} does not carry the model's config.json; convert it again to "
                "run it in torch"
            )
        _check_device(device)
        arch = find_arch(config)
        hyper = read_hyper(arch, config, f"{artifact.folder}: config")
        self.weights = Weights(artifact, depths, device)
        self._dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
        self._names = _Names(arch, hyper)
        self.model = build(arch.class_name, config)
        self._replace()
        self.model.to(device)
        self.model.eval()

    @torch.no_grad()
    def logits(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Run token ids ``[T]``; float32 ``[T, vocab]``."""
        found = self.model(input_ids=torch.tensor(ids[None], device=self.weights.device))
        logits: npt.NDArray[np.float32] = found.logits[0].float().cpu().numpy()
        return logits

    def _replace(self) -> None:
        """Put packed modules, and the small tensors, in the place of all parameters."""
        for name, module in list(self.model.named_modules()):
            packed = self._packed(name, module)
            if packed is not None:
                owner, _, last = name.rpartition(".")
                setattr(self.model.get_submodule(owner), last, packed)
        for name, parameter in list(self.model.named_parameters()):
            if parameter.is_meta:
                owner, _, last = name.rpartition(".")
                values = nn.Parameter(self._small(name).to(self._dtype), requires_grad=False)
                setattr(self.model.get_submodule(owner), last, values)

    def _packed(self, name: str, module: nn.Module) -> nn.Module | None:
        if isinstance(module, nn.Embedding):
            return PackedEmbedding(self.weights, self._dtype, getattr(module, "embed_scale", None))
        if (match := _EXPERTS.match(name)) and hasattr(module, "gate_up_proj"):
            return PackedExperts(self.weights, match[1], module.act_fn)
        if not isinstance(module, nn.Linear):
            return None
        target = self._names.of(f"{name}.weight")
        if target == HEAD and HEAD not in self.weights:
            target = EMBEDDING
        has_bias = "bias" in dict(module.named_parameters())
        bias = self._small(f"{name}.bias").to(self._dtype) if has_bias else None
        order = self._names.order(target, module.out_features)
        return PackedLinear(self.weights, target, bias, order)

    def _small(self, name: str) -> Tensor:
        """A norm, bias or router of transformers' model."""
        target = self._names.of(name)
        values = self.weights.dense(target)
        values = values.reshape(-1) if values.shape[0] == 1 else values
        order = self._names.order(target, len(values)) if name.endswith(".bias") else None
        values = values if order is None else values[order]
        return values - self._names.shift(target)


class _Names:
    """Names and conventions of transformers' parameters in a GGUF."""

    def __init__(self, arch: Arch, hyper: Hyper) -> None:
        self._arch, self._hyper = arch, hyper
        self._map = get_tensor_name_map(arch.gguf, hyper.n_layers)

    def of(self, name: str) -> str:
        """The GGUF name of a parameter."""
        for candidate in (name, name.replace(".mlp.", ".block_sparse_moe.")):  # Mixtral's names
            found = self._map.get_name(candidate, SUFFIXES)
            if found is not None:
                return str(found)
        raise UsageError(f"no tensor of the artifact is transformers' {name!r}")

    def order(self, target: str, n_rows: int) -> Tensor | None:
        """The row of the GGUF's matrix for each output, where its graph wants another order."""
        heads = {"attn_q": self._hyper.n_heads, "attn_k": self._hyper.n_kv_heads}
        n_heads = heads.get(target.split(".")[-2], 0) if self._arch.is_interleaved else 0
        return torch.from_numpy(np.argsort(interleaved(n_heads, n_rows))) if n_heads else None

    def shift(self, target: str) -> float:
        """What conversion added to a norm."""
        return self._arch.norm_shift if target.endswith("_norm.weight") else 0.0


def _check_device(device: str) -> None:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"torch cannot use --device {device}: {str(error).splitlines()[0]}"
        ) from error


def run(artifact: Artifact, depths: Depths, reference: Reference, device: str) -> Quality:
    """Compare a depth in torch with a reference; see `edgekit.measure.RUNTIMES`."""
    model = TorchModel(artifact, depths, device)

    def rows() -> Iterator[npt.NDArray[np.float32]]:
        for ids, first in zip(reference.sequences.ids, reference.sequences.first, strict=True):
            yield model.logits(ids)[first:-1]

    return compare(rows(), reference, model.weights.n_bytes)
