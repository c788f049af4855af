"""Experts on demand: hear what a router chose, read what is missing, go on."""

import ctypes
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from edgekit.errors import DoesNotFitError
from edgekit.llama import Listener, WeightMemory
from edgekit.llama.listener import Ids
from edgekit.paging.pool import Block, ExpertPool
from edgekit.paging.store import ExpertStore

READERS = 4  # threads that read; more gain nothing measurable on one disk
_BLOCK = re.compile(r"^blk\.(\d+)\.")


class Prefetcher(Protocol):
    """Guesses what a block will need."""

    def ahead(self, block: int, listener: Listener) -> tuple[int, Ids] | None:
        """Inside ``chosen`` for ``block``: another block, and experts likely chosen there."""
        ...


@dataclass(frozen=True)
class PagerOptions:
    """How experts are paged.

    Attributes:
        capacity_bytes: Of resident experts.
        n_readers: Threads that read and decode.
        prefetcher: Guesses what is read ahead; ``None`` reads when it is chosen.
        routes_early: Routers come before attention: reads begin there and are waited for when the
            experts are about to run.
    """

    capacity_bytes: int
    n_readers: int = READERS
    prefetcher: Prefetcher | None = None
    routes_early: bool = False


@dataclass
class PagingStats:
    """Counts since the last `Pager.reset`.

    Attributes:
        n_asked: Experts that passes asked for, each once per pass and block.
        n_hits: Those of them that were resident.
        bytes_read: From the store.
        n_missing: Experts that the graph waited for, if only to find that they had just come.
        n_guessed: Experts that were read ahead.
        n_guessed_right: Those of them that their block then chose.
        n_predicted: Experts that were guessed, resident or not.
        n_predicted_right: Those of them that their block then chose.
        stall_seconds: That the graph waited.
    """

    n_asked: int = 0
    n_hits: int = 0
    bytes_read: int = 0
    n_guessed: int = 0
    n_guessed_right: int = 0
    n_missing: int = 0
    n_predicted: int = 0
    n_predicted_right: int = 0
    stall_seconds: float = 0.0

    @property
    def hit_rate(self) -> float:
        """Share of what was asked for that was there."""
        return self.n_hits / self.n_asked if self.n_asked else 1.0


class Pager:
    """Keeps the experts of one model resident as they are needed.

    Attributes:
        listener: What the model's context is to be made with.
        pool: Of resident experts.
    """

    def __init__(
        self, memory: WeightMemory, n_experts: int, store: ExpertStore, options: PagerOptions
    ) -> None:
        """Page the experts of ``memory``, none of which was ever filled."""
        self._blocks = blocks_in(memory, n_experts)
        self._store, self._options = store, options
        has_guess = options.prefetcher is not None
        late = self._about_to_run if options.routes_early else None
        self.listener = Listener(
            len(self._blocks), n_experts, self._chosen, late=late, always=has_guess
        )
        uses = self.listener.uses
        self.pool = ExpertPool(memory, self._blocks, uses, options.capacity_bytes)
        self._threads = ThreadPoolExecutor(options.n_readers, "experts")
        self._reading: dict[tuple[int, int], list[Future[int]]] = {}
        self._stats = PagingStats()
        self._before = (0, 0)  # the listener's counts at the last reset
        self._about = -1  # the block whose experts run next, where the router came before
        self._predicted: tuple[int, set[int]] = (-1, set())

    @property
    def stats(self) -> PagingStats:
        """Counts so far."""
        asked, hits = self.listener.n_asked, self.listener.n_hits
        self._stats.n_asked, self._stats.n_hits = asked - self._before[0], hits - self._before[1]
        return self._stats

    def reset(self) -> None:
        """Begin counting anew."""
        self._before = self.listener.n_asked, self.listener.n_hits
        self._stats = PagingStats()

    def close(self) -> None:
        """Wait for reads and close the store; before the memory goes."""
        self._threads.shutdown(cancel_futures=True)
        self._store.close()

    def _chosen(self, block: int, ids: Ids) -> None:
        experts = ids.astype(np.int64)
        self.pool.pin(block, experts)
        self._settle(block, experts)
        resident = self.listener.uses.resident[block]
        missing = [int(e) for e in experts if not resident[e]]
        if missing and self._options.routes_early and block != self._about:
            self._begin(block, missing)
        elif missing:
            self._fetch(block, missing)
        self._guess(block)

    def _begin(self, block: int, missing: Sequence[int]) -> None:
        """Read experts while attention is computed."""
        self._stats.n_missing += len(missing)
        self._stats.n_guessed += len(missing)
        self._stats.n_guessed_right += len(missing)
        self._reserve(block, missing)
        self._submit(block, missing)

    def _about_to_run(self, block: int) -> None:
        """Wait for what was begun for this block."""
        self._about = block
        started = time.perf_counter()
        self._finish(block, [expert for at, expert in self._reading if at == block])
        self._stats.stall_seconds += time.perf_counter() - started

    def _fetch(self, block: int, missing: Sequence[int]) -> None:
        """Read experts and wait for them."""
        started = time.perf_counter()
        self._stats.n_missing += len(missing)
        new = [e for e in missing if (block, e) not in self._reading]
        if new:
            self._reserve(block, new)
            self._submit(block, new)
        self._finish(block, missing)
        self._stats.stall_seconds += time.perf_counter() - started

    def _reserve(self, block: int, experts: Sequence[int]) -> None:
        """Make room; what is being read ahead for others goes where it must."""
        try:
            self.pool.reserve(block, experts)
        except DoesNotFitError:
            others = [place for place in self._reading if place[0] != block]
            if not others:
                raise
            for at, expert in others:
                self._finish(at, [expert])
            self.pool.reserve(block, experts)

    def _submit(self, block: int, experts: Iterable[int]) -> None:
        for expert in experts:
            self._reading[block, expert] = [
                self._threads.submit(self._read, name, expert, span.address, span.n_bytes)
                for name, span in self.pool.views(block, expert)
            ]

    def _read(self, name: str, expert: int, address: int, n_bytes: int) -> int:
        place = (ctypes.c_ubyte * n_bytes).from_address(address)
        return self._store.read(name, expert, memoryview(place).cast("B"))

    def _finish(self, block: int, experts: Iterable[int]) -> None:
        """Wait for experts that are being read, and mark them."""
        for expert in experts:
            reads = self._reading[block, expert]
            try:
                self._stats.bytes_read += sum(read.result() for read in reads)
            except BaseException:  # also of who waits: Ctrl-C
                self._abandon()
                raise
            del self._reading[block, expert]
            self.pool.filled(block, [expert])

    def _abandon(self) -> None:
        """Forget every read that was begun, each once it has ended."""
        for (block, expert), reads in list(self._reading.items()):
            wait(reads)
            del self._reading[block, expert]
            self.pool.give_up(block, [expert])

    def _settle(self, block: int, chosen: npt.NDArray[np.int64]) -> None:
        """Take over what was read ahead for this block, and see how good the guess was."""
        at, predicted = self._predicted
        if at == block:
            self._stats.n_predicted += len(predicted)
            self._stats.n_predicted_right += len(predicted & set(chosen.tolist()))
            self._predicted = (-1, set())
        guessed = [expert for place, expert in self._reading if place == block]
        self._stats.n_guessed_right += len(set(guessed) & set(chosen.tolist()))
        for expert in guessed:
            if all(read.done() for read in self._reading[block, expert]):
                self._finish(block, [expert])

    def _guess(self, block: int) -> None:
        """Begin to read what the prefetcher expects."""
        prefetcher = self._options.prefetcher
        guess = prefetcher.ahead(block, self.listener) if prefetcher else None
        if guess is not None:
            self._read_ahead(*guess)

    def _read_ahead(self, block: int, ids: Ids) -> None:
        self._predicted = block, set(ids.tolist())
        wanted = [int(e) for e in ids if (block, int(e)) not in self.pool]
        if not wanted:
            return
        try:
            self.pool.reserve(block, wanted)
        except DoesNotFitError:  # no room to guess
            return
        self._stats.n_guessed += len(wanted)
        self._submit(block, wanted)


def blocks_in(memory: WeightMemory, n_experts: int) -> list[Block]:
    """The expert tensors by block; blocks without any have none."""
    found = defaultdict(list)
    for name in sorted(memory.paged):
        match = _BLOCK.match(name)
        assert match is not None, name
        found[int(match[1])].append((name, memory.spans[name]))
    return [Block(tuple(found[i]), n_experts) for i in range(max(found) + 1)]
