"""The file that exists nowhere: read from any offset, written in any order, made in pieces."""

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path

import pytest
from damage import damaged_copy, mixed

from edgekit.artifact import Artifact, open_artifact
from edgekit.assembly import RELEASE_EVERY, REPORT_EVERY, Ahead, Assembly, Piece
from edgekit.codecs.job import Chunk
from edgekit.errors import RefusedError
from edgekit.exporters.gguf import tensor_offsets
from edgekit.kernels.ggml import ByteArray
from edgekit.materialize import materialize
from edgekit.plan import plan_tier
from edgekit.planner import Depths, uniform


@pytest.fixture(params=["llama", "moe"])
def artifact(request: pytest.FixtureRequest) -> Path:
    return Path(request.getfixturevalue(f"{request.param}_artifact"))


def whole(opened: Artifact, depths: Depths) -> bytes:
    assembly = Assembly(opened, depths)
    return assembly.read(0, assembly.size)


def test_reads_at_any_offset_are_the_files_bytes(artifact: Path, tmp_path: Path) -> None:
    with open_artifact(artifact) as opened:
        depths = mixed(opened)
        path = tmp_path / "model.gguf"
        materialize(opened, depths, path, n_threads=2)
        data, assembly = path.read_bytes(), Assembly(opened, depths)
        assert assembly.size == len(data)
        rng = random.Random(1)
        for _ in range(60):
            offset, n_bytes = rng.randrange(len(data) + 10), rng.choice((0, 1, 33, 4096, 300_000))
            assert assembly.read(offset, n_bytes) == data[offset : offset + n_bytes], offset


def test_memory_is_filled_with_the_files_bytes_in_whatever_order(artifact: Path) -> None:
    """As llama.cpp reads: pieces of a few sizes, tensors in an order of its own."""
    with open_artifact(artifact) as opened:
        depths = mixed(opened)
        data = whole(opened, depths)
        assembly, got = Assembly(opened, depths, n_threads=2), bytearray(len(data))
        starts = list(range(0, len(data), 70_001))
        random.Random(2).shuffle(starts)
        for start in starts:
            for at in range(start, min(start + 70_001, len(data)), 30_000):
                here = memoryview(got)[at : min(at + 30_000, start + 70_001)]
                assert assembly.readinto(at, here) == len(here)
        assert got == data
        assert assembly.readinto(len(data) - 3, memoryview(got)) == 3
        assert assembly.readinto(len(data), memoryview(got)) == 0


def test_reading_the_header_alone_decodes_nothing(
    llama_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As loading does, which then has tensors made in an order of its own."""
    made, decode = list[Chunk](), Assembly._decode

    def counted(self: Assembly, chunk: Chunk, room: ByteArray) -> memoryview:
        made.append(chunk)
        return decode(self, chunk, room)

    monkeypatch.setattr(Assembly, "_decode", counted)
    with open_artifact(llama_artifact) as opened:
        with Assembly(opened, mixed(opened), 2) as assembly:
            assert len(assembly.read(0, assembly.gguf.data_offset)) == assembly.gguf.data_offset
        assert made == []
        with Assembly(opened, mixed(opened), 2) as assembly:
            assembly.read(assembly.gguf.data_offset, 1)
        assert made != []


class Order:
    """A sink that notes what comes when."""

    def __init__(self) -> None:
        self.offsets: list[int] = []

    def takes(self, offset: int) -> bool:
        return True

    def room(self, offset: int, n_bytes: int) -> None:
        return

    def put(self, offset: int, data: memoryview) -> None:
        self.offsets.append(offset)


def test_tensors_with_large_chunks_come_first_and_every_tensor_in_one_go(
    llama_artifact: Path,
) -> None:
    """A part that is opened twice is read twice, and what large chunks take comes on top."""
    with open_artifact(llama_artifact) as opened:
        chunk_weights = 10_240  # so that the last chunk of a matrix is smaller than the others
        opened.manifest = replace(opened.manifest, chunk_weights=chunk_weights)
        lowest = uniform(opened.stacks, lambda stack: stack.tiers[0])
        with Assembly(opened, lowest) as assembly:
            sink = Order()
            assembly.write_to(sink, lambda n_bytes: None)
            header = assembly.gguf
    offsets = tensor_offsets(header.tensors, header.alignment)
    spans = [
        range(header.data_offset + offset, header.data_offset + offset + tensor.n_bytes)
        for offset, tensor in zip(offsets, header.tensors, strict=True)
    ]
    tensors = [i for at in sink.offsets for i, span in enumerate(spans) if at in span]
    in_turn = [i for i, _ in groupby(tensors)]
    assert len(in_turn) == len(set(in_turn)) == len(header.tensors) < len(tensors)
    classes = [min(header.tensors[i].n_weights, chunk_weights).bit_length() for i in in_turn]
    assert classes[0] == max(classes) > classes[-1]


def test_pieces_that_are_passed_over_are_made_once_all_the_same() -> None:
    made: list[int] = []

    def make(i: int, room: ByteArray) -> memoryview:
        made.append(i)
        room[:] = i
        return room.data

    pieces = [Piece(i, 1, partial(make, i), room=1) for i in range(40)]
    ahead = Ahead(pieces, n_threads=1)
    order = [0, 39, *range(1, 11), *range(21, 31), *range(11, 21), *range(31, 39)]
    assert [ahead.piece(i)[0] for i in order] == order
    assert sorted(made) == list(range(40))


@pytest.fixture
def many(llama_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Assembly]:
    """Of three thousand pieces of a byte."""
    with open_artifact(llama_artifact) as opened:
        depths = plan_tier(opened, "Q4_K").depths
        with Assembly(opened, depths, n_threads=2) as assembly:
            pieces = [Piece(i, 1, lambda room: room.data, room=1) for i in range(3000)]
            monkeypatch.setattr(assembly, "_pieces", pieces)
            yield assembly


def test_of_many_pieces_not_each_is_told_and_pages_are_handed_back(
    many: Assembly, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, released, sink = list[int](), list[None](), Order()
    monkeypatch.setattr(Artifact, "release", lambda self: released.append(None))
    many.write_to(sink, told.append)
    assert sorted(sink.offsets) == list(range(3000))
    assert told == [*range(REPORT_EVERY, 3000, REPORT_EVERY), 3000]
    assert len(released) == 3000 // RELEASE_EVERY


def test_what_goes_wrong_with_a_piece_or_in_a_report_ends_the_writing(many: Assembly) -> None:
    def fail(_room: ByteArray) -> memoryview:
        raise OSError("no room")

    def report(n_bytes: int) -> None:
        if n_bytes > 500:
            raise TimeoutError

    sink = Order()
    with pytest.raises(TimeoutError):
        many.write_to(sink, report)
    assert len(sink.offsets) < 3000
    many._pieces[1000] = Piece(1000, 1, fail)
    with pytest.raises(OSError, match="no room"):
        many.write_to(Order(), lambda _: None)


@contextmanager
def no_memory_for_rooms() -> Iterator[None]:
    def full(room: ByteArray | None, _n_bytes: int) -> ByteArray:
        if room is not None:
            return room
        time.sleep(0.1)  # what was begun gets on
        raise MemoryError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edgekit.assembly.fitting", full)
        yield


def test_memory_is_not_given_twice_after_a_failure() -> None:
    def make(i: int, room: ByteArray) -> memoryview:
        room[:] = i
        return room.data

    pieces = [Piece(i, 1, partial(make, i), room=1) for i in range(40)]
    ahead = Ahead(pieces, n_threads=1)
    ahead.piece(0)

    with no_memory_for_rooms(), pytest.raises(MemoryError):
        ahead.piece(10)
    assert [ahead.piece(i)[0] for i in (11, 10, 1, 2)] == [11, 10, 1, 2]


def test_after_a_read_that_failed_another_one_goes_on_where_the_last_was(artifact: Path) -> None:
    with open_artifact(artifact) as opened:
        depths = mixed(opened)
        assembly, again = Assembly(opened, depths), Assembly(opened, depths)
        gguf, data = assembly.gguf, again.read(0, again.size)
        offsets = tensor_offsets(gguf.tensors, gguf.alignment)
        first, other = (gguf.data_offset + offsets[i] for i in (0, len(offsets) // 2))
        assert assembly.read(first, 10) == data[first : first + 10]
        with no_memory_for_rooms(), pytest.raises(MemoryError):
            assembly.read(other, 1)
        assert assembly.read(first + 10, 100) == data[first + 10 : first + 110]


def test_ten_thousand_small_reads_in_a_row_are_the_files_bytes(llama_artifact: Path) -> None:
    with open_artifact(llama_artifact) as opened:
        depths = mixed(opened)
        data = whole(opened, depths)
        assembly = Assembly(opened, depths)
        assert b"".join(assembly.read(i, 19) for i in range(0, 190_000, 19)) == data[:190_000]


def test_a_read_after_a_refused_one_is_refused_again(moe_artifact: Path, tmp_path: Path) -> None:
    folder = damaged_copy(moe_artifact, tmp_path)
    with open_artifact(folder) as opened:
        assembly = Assembly(opened, uniform(opened.stacks, lambda stack: stack.tiers[-1]))
        for _ in range(2):
            with pytest.raises(RefusedError, match="sha256 differs"):
                assembly.read(0, assembly.size)
