"""Decode experts, or dense tensors, from their levels, one chunk at a time."""

from collections.abc import Callable, Iterator
from functools import lru_cache

from edgekit.codecs.chunks import row_ranges
from edgekit.codecs.job import Chunk, Codec
from edgekit.kernels.ggml import ByteArray
from edgekit.stack import Level, Stack

ReadPart = Callable[[Level, int], memoryview]


def chunks_of(stack: Stack, depth: int, expert: int, chunk_weights: int) -> Iterator[Chunk]:
    """The chunks of one expert in order."""
    ranges = row_ranges(stack.n_rows, stack.cols, chunk_weights)
    for index, (start, stop) in enumerate(ranges):
        yield Chunk(stack, depth, expert, index, len(ranges), start, stop)


class Decoder:
    """Decodes chunks of parts that a function reads; safe on several threads.

    What the codec made of the parts used last is kept, not what was decoded.
    """

    def __init__(self, codec: Codec, read: ReadPart, n_kept: int = 64) -> None:
        """Read parts with ``read(level, expert)``, which checks their hashes."""
        self._codec, self._read = codec, read
        self._opened = lru_cache(maxsize=n_kept)(self._open)
        self._stacks: dict[str, Stack] = {}

    def decode(self, chunk: Chunk, out: ByteArray) -> None:
        """Put the blocks of a chunk into ``out``, uint8, flat, contiguous, `Chunk.n_bytes`."""
        name, expert, n_chunks = chunk.stack.name, chunk.expert, chunk.n_chunks
        self._stacks[name] = chunk.stack
        self._codec.decode(chunk, lambda depth: self._opened(name, depth, expert, n_chunks), out)

    def forget(self) -> None:
        """Let go of what is kept."""
        self._opened.cache_clear()

    def _open(self, name: str, depth: int, expert: int, n_chunks: int) -> object:
        """Level 0 as it is, another one as the codec prepares it."""
        stack = self._stacks[name]
        part = self._read(stack.levels[depth], expert)
        return self._codec.open(part, stack, depth, n_chunks) if depth else part
