"""A GGUF at chosen depths that exists nowhere: its bytes are decoded when they are asked for.

``materialize`` writes one to a file, the loader hands one to llama.cpp. Nothing is held but the
chunks being decoded.
"""

import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from threading import Lock

import numpy as np

from edgekit.artifact import Artifact
from edgekit.codecs import CODECS
from edgekit.codecs.job import Chunk
from edgekit.decode import Decoder, chunks_of
from edgekit.exporters.file_types import file_type
from edgekit.exporters.gguf import Gguf, TensorInfo, header_bytes, padded
from edgekit.exporters.gguf_values import u32
from edgekit.kernels.ggml import ByteArray, fitting
from edgekit.planner import Depths
from edgekit.routing.gguf_keys import range_metadata
from edgekit.sink import Report, Sink
from edgekit.stack import Level, Stack

_NOTHING = memoryview(b"")
_NO_ROOM = np.empty(0, np.uint8)
REPORT_EVERY = 16  # pieces of many: waking up to tell of each would stop a thread that decodes
RELEASE_EVERY = 4  # pieces after which the artifact's pages are handed back, some 5 MiB


@dataclass(frozen=True)
class Piece:
    """A byte range of the assembled file and how to get its bytes.

    Attributes:
        offset: Where it begins.
        n_bytes: Its size.
        make: Gives the bytes, in the room that it is given, uint8, or elsewhere.
        room: Bytes of room that it needs.
        largest: Bytes of room that the largest piece of its tensor needs.
    """

    offset: int
    n_bytes: int
    make: Callable[[ByteArray], memoryview]
    room: int = 0
    largest: int = 0


class Ahead:
    """Pieces made on threads before they are asked for.

    llama.cpp reads tensors in another order than files have them: what was given once is not made
    ahead again, what was made and passed over is kept until its turn comes or it is too much.
    """

    def __init__(self, pieces: Sequence[Piece], n_threads: int) -> None:
        """Take ``pieces``; nothing is made yet."""
        self._pieces, self._n_ahead = pieces, 2 * n_threads
        self._pool = ThreadPoolExecutor(n_threads)
        self._made: dict[int, tuple[Future[memoryview], ByteArray]] = {}  # oldest first
        self._given: set[int] = set()
        self._free: list[ByteArray] = []  # rooms: fresh pages take a fifth of the time of loading
        self._lent: ByteArray | None = None

    def piece(self, index: int) -> memoryview:
        """The bytes of piece ``index``, there until the next call; the next ones are begun."""
        try:
            self._begin(index)
            made, self._lent = self._made.pop(index)
            block = made.result()
        except BaseException:
            self.drop()
            raise
        while len(self._made) > 2 * self._n_ahead:
            passed, _ = self._made.pop(next(iter(self._made)))
            passed.cancel()  # where it is too late a thread writes into its room: nobody gets it
        return block

    def _begin(self, index: int) -> None:
        """Have piece ``index`` made and some behind it, in rooms that nobody reads any more."""
        if self._lent is not None and self._lent.nbytes:
            self._free.append(self._lent)
        self._given.add(index)
        later = (i for i in range(index + 1, len(self._pieces)) if i not in self._given)
        wanted = [i for i in (index, *islice(later, self._n_ahead)) if i not in self._made]
        for i in wanted:
            room = self._room(self._pieces[i].room)
            self._made[i] = self._pool.submit(self._pieces[i].make, room), room
        if not wanted:  # the end is near: what is not needed again makes room for the weights
            self._free.clear()

    def _room(self, n_bytes: int) -> ByteArray:
        """A free room of about that size, else a new one."""
        room = self._free.pop() if self._free and n_bytes else None
        return fitting(room, n_bytes)

    def drop(self) -> None:
        """Forget what was made ahead, once the threads have let go of it."""
        for made, _ in self._made.values():
            made.cancel()
        wait(made for made, _ in self._made.values())
        self._made.clear()
        self._free.clear()
        self._lent = None

    def close(self) -> None:
        """Let the threads go, and the scratch memory that each one keeps."""
        self.drop()
        self._pool.shutdown()


class Assembly:
    """The GGUF of ``artifact`` at ``depths``, readable from any offset; a context manager.

    Attributes:
        size: Bytes of the whole file.
        gguf: Its header.
    """

    def __init__(
        self,
        artifact: Artifact,
        depths: Depths,
        n_threads: int = 1,
    ) -> None:
        """Lay the file out; decodes nothing yet."""
        self._artifact, self._depths, self._n_threads = artifact, depths, n_threads
        self.gguf, self._head = self._header()
        self._decoder = Decoder(CODECS[artifact.manifest.codec], self._part)
        self._locks: dict[tuple[str, str, int], Lock] = {}
        self._pieces = list(self._lay_out())
        self._offsets = [piece.offset for piece in self._pieces]
        self.size = self._pieces[-1].offset + self._pieces[-1].n_bytes
        self._ahead = Ahead(self._pieces, n_threads)
        self._n_done = 0  # pieces that were read in order
        self._at, self._rest = 0, _NOTHING  # what was decoded and not yet read, and its offset

    def __enter__(self) -> "Assembly":
        """Use as a context manager."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Let threads and what was decoded ahead go; twice is once."""
        self._ahead.close()
        self._decoder.forget()
        self._rest = _NOTHING

    def read(self, offset: int, n_bytes: int) -> bytes:
        """The bytes ``[offset, offset + n_bytes)``, fewer at the end; fast when read in order."""
        data = bytearray(max(0, min(n_bytes, self.size - offset)))
        self.readinto(offset, memoryview(data))
        return bytes(data)

    def readinto(self, offset: int, buffer: memoryview) -> int:
        """Fill ``buffer``, uint8, with the bytes from ``offset``; fast when read in order.

        Returns:
            How many bytes that are: fewer than ``buffer`` holds at the end of the file.
        """
        done, n_bytes = 0, max(0, min(len(buffer), self.size - offset))
        while done < n_bytes:
            if not self._rest or self._at != offset + done:
                self._rest = _NOTHING  # its memory is given away now, also where this fails
                self._rest = self._bytes_from(offset + done)
            here = min(len(self._rest), n_bytes - done)
            buffer[done : done + here] = self._rest[:here]
            self._rest = self._rest[here:]
            done += here
            self._at = offset + done
        return done

    def write_to(self, sink: Sink, report: Report) -> None:
        """Give everything that ``sink`` takes to it, in no particular order, on the threads.

        Args:
            sink: Where it goes.
            report: Called with the bytes written or passed over, every `REPORT_EVERY` pieces or
                more often; what it raises ends the writing.

        Raises:
            OSError: There is no room for it.
        """
        counter = count(1)
        rooms = threading.local()  # fresh pages take longer than what is done with them

        def own_room(n_bytes: int) -> ByteArray:
            room: ByteArray = getattr(rooms, "kept", _NO_ROOM)
            if room.nbytes < n_bytes:
                room = rooms.kept = np.empty(n_bytes, np.uint8)
            return room

        def write(piece: Piece) -> int:
            if sink.takes(piece.offset):
                room = sink.room(piece.offset, piece.room) if piece.room else _NO_ROOM
                sink.put(piece.offset, piece.make(own_room(piece.room) if room is None else room))
            if next(counter) % RELEASE_EVERY == 0:
                self._artifact.release()
            return piece.n_bytes

        # tensors that take most room while they are made come when least of the rest is there
        order = sorted(self._pieces, key=lambda piece: -piece.largest.bit_length())
        n_written = 0
        with ThreadPoolExecutor(self._n_threads) as pool:
            written = [pool.submit(write, piece) for piece in order]
            step = max(1, min(REPORT_EVERY, len(written) // 64))
            try:
                for start in range(0, len(written), step):
                    some = written[start : start + step]
                    wait(some, return_when=FIRST_EXCEPTION)
                    n_written += sum(task.result() for task in some)
                    report(n_written)
            finally:
                pool.shutdown(cancel_futures=True)

    def _bytes_from(self, offset: int) -> memoryview:
        """The rest of the piece that has the byte at ``offset``."""
        index = bisect_right(self._offsets, offset) - 1
        piece, at = self._pieces[index], offset - self._offsets[index]
        if not piece.room:  # who reads the header alone wants nothing decoded
            return piece.make(_NO_ROOM)[at:]
        block = self._ahead.piece(index)[at:]
        self._n_done += 1
        if self._n_done % RELEASE_EVERY == 0:
            self._artifact.release()
        return block

    def _lay_out(self) -> Iterator[Piece]:
        head, at = self._head, len(self._head)
        yield Piece(0, at, _constant(memoryview(head)))
        for stack, info in zip(self._artifact.stacks, self.gguf.tensors, strict=True):
            yield from self._chunks(stack, at)
            end = padded(at + info.n_bytes, self.gguf.alignment)
            gap, at = end - at - info.n_bytes, end
            if gap:
                yield Piece(end - gap, gap, _constant(memoryview(bytes(gap))))

    def _header(self) -> tuple[Gguf, bytes]:
        base = self._artifact.header
        tensors = tuple(
            TensorInfo(s.name, s.type_at(self._depths.tier(s.name)), s.shape)
            for s in self._artifact.stacks
        )
        typed = {"general.file_type": u32(file_type(tensors))}
        metadata = base.metadata | typed | range_metadata(tensors, base.alignment)
        head = header_bytes(metadata, tensors)
        return Gguf(metadata, tensors, base.alignment, len(head)), head

    def _chunks(self, stack: Stack, at: int) -> Iterator[Piece]:
        depth = stack.depth_of(self._depths.tier(stack.name))
        for expert in range(stack.n_experts):
            chunks = list(chunks_of(stack, depth, expert, self._artifact.manifest.chunk_weights))
            largest = max(chunk.n_bytes for chunk in chunks)
            for chunk in chunks:
                make = partial(self._decode, chunk)
                yield Piece(at, chunk.n_bytes, make, chunk.n_bytes, largest)
                at += chunk.n_bytes

    def _decode(self, chunk: Chunk, room: ByteArray) -> memoryview:
        blocks = room[: chunk.n_bytes]
        self._decoder.decode(chunk, blocks)
        return blocks.data

    def _part(self, level: Level, expert: int) -> memoryview:
        """A part's bytes; one thread takes their hash, others that need them wait for it."""
        with self._locks.setdefault((level.tensor, level.tier, expert), Lock()):
            return self._artifact.part(level, expert)


def _constant(view: memoryview) -> Callable[[ByteArray], memoryview]:
    return lambda _room: view
