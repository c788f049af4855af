"""Decode experts, or dense tensors, from their levels, one chunk at a time."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from edgekit.codecs import CODECS
from edgekit.codecs.chunks import row_ranges, split_frames
from edgekit.kernels.ggml import row_bytes
from edgekit.stack import Level, Stack

ByteArray = npt.NDArray[np.uint8]
ReadPart = Callable[[Level, int], memoryview]


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
    def n_bytes(self) -> int:
        """Bytes of its blocks at that depth."""
        kind = self.stack.type_at(self.stack.tiers[self.depth - 1])
        return (self.stop - self.start) * row_bytes(kind, self.stack.cols)


def chunks_of(stack: Stack, depth: int, expert: int, chunk_weights: int) -> Iterator[Chunk]:
    """The chunks of one expert in order."""
    rows = stack.n_weights // stack.cols // stack.n_experts
    ranges = row_ranges(rows, stack.cols, chunk_weights)
    for index, (start, stop) in enumerate(ranges):
        yield Chunk(stack, depth, expert, index, len(ranges), start, stop)


class Decoder:
    """Decodes chunks of parts that a function reads; safe on several threads.

    The payloads of the parts used last are kept split, not decoded.
    """

    def __init__(self, read: ReadPart, n_kept: int = 64) -> None:
        """Read parts with ``read(level, expert)``, which checks their hashes."""
        self._read = read
        self._payloads = lru_cache(maxsize=n_kept)(self._split)
        self._stacks: dict[str, Stack] = {}

    def decode(self, chunk: Chunk) -> memoryview:
        """The blocks of a chunk: those of level 0, lifted level by level."""
        stack = chunk.stack
        self._stacks[stack.name] = stack
        row = row_bytes(stack.type_at(stack.tiers[0]), stack.cols)
        raw = self._read(stack.levels[0], chunk.expert)[chunk.start * row : chunk.stop * row]
        blocks: ByteArray = np.frombuffer(raw, np.uint8)
        for depth in range(1, chunk.depth):
            parent, level = stack.levels[depth - 1 : depth + 1]
            blocks = CODECS[level.codec].decode_chunk(
                stack.type_at(parent.tier),
                stack.type_at(level.tier),
                blocks,
                self._payloads(stack.name, depth, chunk.expert, chunk.n_chunks)[chunk.index],
                (chunk.stop - chunk.start) * stack.cols,
            )
        return blocks.data

    def forget(self) -> None:
        """Let go of what is kept."""
        self._payloads.cache_clear()

    def _split(self, name: str, depth: int, expert: int, n_chunks: int) -> list[memoryview]:
        return split_frames(self._read(self._stacks[name].levels[depth], expert), n_chunks)
