"""The pool of resident experts: a number of bytes that it never exceeds.

An expert lies at its own place in llama.cpp's tensors all the time; resident are only the pages of
those that are in the pool. Neighbours share a page at their border: it stays while either of them
is in.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgekit.errors import DoesNotFitError
from edgekit.expert_budget import PAGE, paged_bytes
from edgekit.llama.weight_memory import Span, WeightMemory
from edgekit.routing.eviction import Uses, victims

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Block:
    """The tensors of experts of one block: name and place of each."""

    spans: tuple[tuple[str, Span], ...]
    n_experts: int

    @property
    def expert_bytes(self) -> int:
        """What one expert takes at most, with the pages at its borders."""
        return sum(paged_bytes(span.n_bytes // self.n_experts) for _, span in self.spans)

    def places(self, expert: int) -> Iterator[tuple[str, Span]]:
        """Where one expert lies in each tensor."""
        for name, span in self.spans:
            n_bytes = span.n_bytes // self.n_experts
            yield name, Span(span.address + expert * n_bytes, n_bytes)


class ExpertPool:
    """Which experts are resident.

    Attributes:
        capacity_bytes: Most bytes of resident experts.
        used_bytes: Bytes of those that are, or are being filled.
    """

    def __init__(
        self, memory: WeightMemory, blocks: Sequence[Block], uses: Uses, capacity_bytes: int
    ) -> None:
        """Start empty; ``uses.resident`` is kept here from now on."""
        self._memory, self._blocks, self._uses = memory, blocks, uses
        self._held = np.zeros_like(uses.resident)  # resident, or being filled
        self._pinned = np.zeros_like(uses.resident)
        self.capacity_bytes, self.used_bytes = capacity_bytes, 0

    def __contains__(self, place: tuple[int, int]) -> bool:
        """Whether expert ``place[1]`` of block ``place[0]`` has its room."""
        return bool(self._held[place])

    def pin(self, block: int, experts: Ids) -> None:
        """From now on these, which are about to run, stay; those pinned before may go."""
        self._pinned[:] = False
        self._pinned[block, experts] = True

    def reserve(self, block: int, experts: Sequence[int]) -> None:
        """Make room for experts of a block that are about to be filled, evicting others for it.

        Raises:
            DoesNotFitError: There is not so much room even without all others.
        """
        need = len(experts) * self._blocks[block].expert_bytes
        self._evict(block, self.used_bytes + need - self.capacity_bytes)
        if self.used_bytes + need > self.capacity_bytes:
            raise DoesNotFitError(
                f"{len(experts)} more experts of block {block} are needed at once, the pool of "
                f"{self.capacity_bytes} bytes holds fewer; give a larger --budget or --expert-cache"
            )
        self._held[block, experts] = True
        self.used_bytes += need

    def filled(self, block: int, experts: Sequence[int]) -> None:
        """Mark experts as resident: their bytes are in place."""
        self._uses.resident[block, experts] = True

    def give_up(self, block: int, experts: Sequence[int]) -> None:
        """Let experts go, filled or not."""
        for expert in experts:
            if self._held[block, expert]:
                self._drop(block, expert)

    def views(self, block: int, expert: int) -> Iterator[tuple[str, Span]]:
        """Where the bytes of an expert belong, by tensor."""
        return self._blocks[block].places(expert)

    def _evict(self, block: int, n_bytes: int) -> None:
        """Evict until ``n_bytes`` more are free, if so many may go."""
        if n_bytes <= 0:
            return
        least = min(b.expert_bytes for b in self._blocks if b.spans)
        for row, expert in victims(self._uses, block, self._pinned, -(-n_bytes // least)):
            if n_bytes <= 0:
                break
            n_bytes -= self._blocks[row].expert_bytes
            self._drop(row, expert)

    def _drop(self, block: int, expert: int) -> None:
        self._uses.resident[block, expert] = self._held[block, expert] = False
        self.used_bytes -= self._blocks[block].expert_bytes
        held = self._held[block]
        before = bool(expert and held[expert - 1])
        after = bool(expert + 1 < len(held) and held[expert + 1])
        is_first, is_last = expert == 0, expert == len(held) - 1  # another tensor may lie there
        for _, span in self._blocks[block].places(expert):
            start, end = span.address, span.address + span.n_bytes
            first = -(-start // PAGE) if before or is_first else start // PAGE
            last = end // PAGE if after or is_last else -(-end // PAGE)
            self._memory.drop(first * PAGE, max(0, last - first) * PAGE)
