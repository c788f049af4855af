"""What a codec is given: a tensor to encode and how, or a piece of one to decode."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol

import numpy as np
import numpy.typing as npt

from edgekit.errors import RefusedError
from edgekit.kernels.ggml import ByteArray, F32Array, dequantize, row_bytes
from edgekit.sensitivity import Sensitivity
from edgekit.spool import TensorRecord
from edgekit.stack import Level, Stack


class Source(Protocol):
    """A tensor of a checkpoint as `edgekit.arch` maps it."""

    @property
    def name(self) -> str:
        """GGUF name."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Numpy order."""

    @property
    def source_type(self) -> str:
        """ggml type of the source tier."""

    @property
    def quantizable(self) -> bool:
        """Whether llama-quantize would quantize it."""

    def rows(self, start: int, stop: int) -> ByteArray:
        """Raw rows ``[start, stop)``, flat over experts, uint8 ``[n, row_bytes]``."""


@dataclass(frozen=True)
class Job:
    """How to encode a tensor.

    Attributes:
        tiers: Tiers asked for, lowest first, ``source`` last or absent.
        chunk_weights: Upper bound of weights in a chunk.
        imatrix: float32 ``[experts, cols]``, mean square of each input column, or ``None``.
        sensitivity: What errors of the tensor cost.
        column_group: Columns that have factors of their own; 0: all share theirs.
    """

    tiers: tuple[str, ...]
    chunk_weights: int
    imatrix: F32Array | None
    sensitivity: Sensitivity
    column_group: int = 0


@dataclass(frozen=True)
class Chunk:
    """Rows ``[start, stop)`` of one expert, chunk ``index`` of ``n_chunks``, at a depth."""

    stack: Stack
    depth: int
    expert: int
    index: int
    n_chunks: int
    start: int
    stop: int

    @property
    def n_weights(self) -> int:
        """Weights of the rows."""
        return (self.stop - self.start) * self.stack.cols

    @property
    def n_bytes(self) -> int:
        """Bytes of its blocks at that depth."""
        return self.rows_bytes(self.stack.type_at(self.stack.tiers[self.depth - 1]))

    def rows_bytes(self, type_name: str) -> int:
        """Bytes of the rows as blocks of ``type_name``."""
        return (self.stop - self.start) * row_bytes(type_name, self.stack.cols)


InOrder = Callable[[Iterable[Callable[[], Any]]], Iterator[Any]]  # runs tasks, yields in order
Opened = Callable[[int], object]  # depth of a level -> what `Codec.open` made of its part


@dataclass(frozen=True)
class Codec:
    """One way to make a stack of a tensor, and blocks of ggml's types of a stack.

    Attributes:
        tiers: Those of a conversion that asks for none.
        is_tier: Whether a name is a tier of this codec.
        check_tiers: Raises `UsageError` unless the tiers asked for are a chain.
        chain_of: Tiers of one tensor: the tensor, tiers asked for, whether its columns have
            weights. Raises `UsageError` where none is left.
        expected_type: ggml type that rows of so many columns most often have at a tier of their
            chain; for previews.
        size_bound: Most bytes of an artifact with these tiers, over those of a BF16 checkpoint.
        encode: Writes all levels of a tensor to a file, expert after expert, chunk after chunk;
            chunks may run on other threads. Raises `RefusedError` where a weight is NaN or
            infinite.
        tensors_at_once: Where a tensor's chunks keep all threads busy, how many tensors are begun
            together; 0: one per thread.
        gives: Whether this codec can have written a level of a stack that is not its base.
        open: Prepares a level's part, ``part, stack, depth, chunks``; `RefusedError` where it is
            corrupt.
        decode: Puts the blocks of a chunk, of the type that its stack has at its depth, into memory
            that it is given: uint8, flat, contiguous, `Chunk.n_bytes`.
        held: The levels, by depth, that a runtime can compute with as they are stored, for a stack
            at a depth; empty where it needs the blocks that `decode` makes.
    """

    tiers: tuple[str, ...]
    is_tier: Callable[[str], bool]
    check_tiers: Callable[[Sequence[str]], None]
    chain_of: Callable[[Source, Sequence[str], bool], tuple[str, ...]]
    expected_type: Callable[[str, int], str]
    size_bound: Callable[[Sequence[str]], float]
    encode: Callable[[Source, Job, BinaryIO, InOrder], TensorRecord]
    tensors_at_once: int
    gives: Callable[[Stack, Level], bool]
    open: Callable[[memoryview, Stack, int, int], object]
    decode: Callable[[Chunk, Opened, ByteArray], None]
    held: Callable[[Stack, int], tuple[int, ...]]


def one_by_one(tasks: Iterable[Callable[[], Any]]) -> Iterator[Any]:
    """Run tasks on this thread."""
    return (task() for task in tasks)


def base_blocks(chunk: Chunk, opened: Opened) -> ByteArray:
    """The chunk's rows of level 0, as they are stored, uint8, flat."""
    base = opened(0)
    assert isinstance(base, memoryview)
    row = row_bytes(chunk.stack.type_at(chunk.stack.tiers[0]), chunk.stack.cols)
    return np.frombuffer(base[chunk.start * row : chunk.stop * row], np.uint8)


def n_experts_of(source: Source) -> int:
    """Experts that can be read alone; 1 for a dense tensor."""
    return source.shape[0] if len(source.shape) == 3 else 1


def n_rows_of(source: Source) -> int:
    """Rows of an expert."""
    return int(np.prod(source.shape[:-1])) // n_experts_of(source)


def finite_rows(source: Source, start: int, stop: int) -> tuple[ByteArray, F32Array]:
    """Rows as they are stored, and as weights, float32 ``[n, cols]``.

    Raises:
        RefusedError: A weight is NaN or infinite.
    """
    raw = source.rows(start, stop)
    weights = dequantize(source.source_type, raw).reshape(stop - start, -1)
    if not np.isfinite(weights).all():
        rows = start + np.flatnonzero(~np.isfinite(weights).all(axis=1))
        told = f"row {rows[0]}" if len(rows) == 1 else f"rows {rows[0]} to {rows[-1]}"
        raise RefusedError(
            f"tensor {source.name} has NaN or infinite weights in {told}; repair the checkpoint"
        )
    return raw, weights


def rounded(losses: npt.NDArray[np.float64]) -> tuple[float, ...]:
    """Losses with the digits that a manifest keeps."""
    return tuple(float(f"{loss:.6g}") for loss in losses)
