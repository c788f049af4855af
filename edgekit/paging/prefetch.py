"""Guess which experts the next block will choose, while this one is computed.

`GateGuess` applies the next block's router to the residual stream as it is now (after Eliseev and
Mazur, arXiv 2312.17238). `TableGuess` takes what followed most often in the trace of the
conversion. Both guess for one token at a time: a prompt's batch needs nearly all experts anyway.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgekit.artifact import Artifact
from edgekit.errors import RefusedError, UsageError
from edgekit.kernels.ggml import dequantize
from edgekit.llama import Listener
from edgekit.llama.listener import Ids
from edgekit.routing.trace import Json

F32Array = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Router:
    """What a router computes: ``gate @ (norm * x / rms(x))``.

    Attributes:
        gate: float32 ``[experts, width]``.
        norm: float32 ``[width]``.
    """

    gate: F32Array
    norm: F32Array


@dataclass(frozen=True, eq=False)
class GateGuess:
    """The next block's router on the current residual stream.

    Attributes:
        routers: One per block, ``None`` for blocks without experts.
        n_used: Experts that a token takes.
        eps: Of the norms.
    """

    routers: Sequence[Router | None]
    n_used: int
    eps: float

    def ahead(self, block: int, listener: Listener) -> tuple[int, Ids] | None:
        """See `edgekit.paging.pager.Prefetcher`."""
        hidden = listener.hidden(block)
        router = self.routers[block + 1] if block + 1 < len(self.routers) else None
        if router is None or len(hidden) != 1:
            return None
        x = hidden[0] * (1 / np.sqrt(np.square(hidden[0]).mean() + self.eps))
        return block + 1, likeliest(router.gate @ (x * router.norm), self.n_used)


@dataclass(frozen=True, eq=False)
class TableGuess:
    """What followed most often in the trace.

    Attributes:
        tables: For each block the counts of the next one's experts, int64 ``[from, to]``; ``None``
            where there is no next.
        n_used: Experts that a token takes.
    """

    tables: Sequence[npt.NDArray[np.int64] | None]
    n_used: int

    def ahead(self, block: int, listener: Listener) -> tuple[int, Ids] | None:
        """See `edgekit.paging.pager.Prefetcher`."""
        table, chosen = self.tables[block], listener.topk()
        if table is None or len(chosen) != 1:
            return None
        return block + 1, likeliest(table[chosen[0]].sum(axis=0), self.n_used)


def likeliest(scores: npt.NDArray[np.float32] | npt.NDArray[np.int64], n: int) -> Ids:
    """The ``n`` ids with the highest scores."""
    return np.argsort(-scores, kind="stable")[:n].astype(np.int32)


def gate_guess(artifact: Artifact, n_blocks: int, n_used: int) -> GateGuess:
    """Read the routers of an artifact; they are kept in float32, some MiB."""
    names = {stack.name for stack in artifact.stacks}

    def router(block: int) -> Router | None:
        gate, norm = f"blk.{block}.ffn_gate_inp.weight", f"blk.{block}.ffn_norm.weight"
        if gate not in names or norm not in names:
            return None
        return Router(_float32(artifact, gate), _float32(artifact, norm))

    prefix = artifact.manifest.architecture
    eps = float(artifact.header.get(f"{prefix}.attention.layer_norm_rms_epsilon", 1e-6))
    return GateGuess([router(block) for block in range(n_blocks)], n_used, eps)


def table_guess(experts: Json, n_blocks: int, n: int, n_used: int) -> TableGuess:
    """Take the transitions of a manifest's ``experts``, for a model with ``n`` experts in a layer.

    Raises:
        UsageError: There is no trace.
        RefusedError: It is one of another model.
    """
    if not experts.get("next_layer"):
        raise UsageError(
            "this artifact has no trace of its routers; convert it with calibration, or choose "
            "--prefetch gate"
        )
    if experts["n_experts"] != n:
        raise RefusedError(
            f"edgekit.json: the trace has {experts['n_experts']} experts in a layer, the model has "
            f"{n}; get the artifact again, or leave --prefetch out"
        )
    tables = list[npt.NDArray[np.int64] | None]([None] * n_blocks)
    for block, layer in zip(experts["layers"], experts["next_layer"], strict=False):
        table = np.zeros((n, n), np.int64)
        for expert, successors in enumerate(layer):
            for successor, count in successors:
                table[expert, successor] = count
        if 0 <= block < n_blocks - 1:
            tables[block] = table
    return TableGuess(tables, n_used)


def _float32(artifact: Artifact, name: str) -> F32Array:
    stack = artifact.stack(name)
    blocks = np.frombuffer(artifact.part(stack.levels[0]), np.uint8)
    return dequantize(stack.type_at(stack.tiers[0]), blocks).reshape(stack.shape)
