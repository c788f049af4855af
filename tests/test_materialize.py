"""Files written from an artifact: read by gguf, loaded by llama.cpp, never half there."""

import errno
import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest
from stock_llama import logits

from edgekit import materialize as module
from edgekit.artifact import Artifact, open_artifact
from edgekit.assembly import RELEASE_EVERY, REPORT_EVERY, Ahead, Assembly, Piece
from edgekit.codecs.job import Chunk
from edgekit.disk import write_at
from edgekit.errors import DiskFullError, DoesNotFitError, RefusedError, UsageError
from edgekit.exporters.gguf import tensor_offsets
from edgekit.kernels.ggml import ByteArray
from edgekit.materialize import materialize, preview
from edgekit.plan import plan_budget, plan_json, plan_tier, plan_weights
from edgekit.planner import Depths, uniform


def mixed(artifact: Artifact, seed: int = 0) -> Depths:
    """A tier at random for every tensor."""
    rng = random.Random(seed)
    return uniform(artifact.stacks, lambda stack: rng.choice(stack.tiers))


def weights_bytes(path: Path) -> int:
    """Bytes of all tensors, by gguf's reader."""
    return sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors)


@pytest.fixture(params=["llama", "moe"])
def artifact(request: pytest.FixtureRequest) -> Path:
    return Path(request.getfixturevalue(f"{request.param}_artifact"))


def whole(opened: Artifact, depths: Depths) -> bytes:
    assembly = Assembly(opened, depths)
    return assembly.read(0, assembly.size)


@pytest.mark.parametrize("has_pwrite", [True, False])
def test_all_is_written_where_it_belongs_also_in_short_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_pwrite: bool
) -> None:
    write, pwrite = os.write, os.pwrite
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:7]))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:7], at))
    if not has_pwrite:
        monkeypatch.delattr(os, "pwrite")
    descriptor = os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT)
    write_at(descriptor, bytes(range(100, 150)), 50)
    write_at(descriptor, bytes(range(50)), 0)
    os.close(descriptor)
    found = (tmp_path / "file").read_bytes()
    assert found == bytes(range(50)) + bytes(range(100, 150))


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


class Nowhere:
    """Takes everything and keeps the order."""

    def __init__(self) -> None:
        self.offsets: list[int] = []

    def takes(self, offset: int) -> bool:
        return True

    def room(self, offset: int, n_bytes: int) -> None:
        return None

    def put(self, offset: int, data: memoryview) -> None:
        self.offsets.append(offset)


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
    told, released, sink = list[int](), list[None](), Nowhere()
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

    sink = Nowhere()
    with pytest.raises(TimeoutError):
        many.write_to(sink, report)
    assert len(sink.offsets) < 3000
    many._pieces[1000] = Piece(1000, 1, fail)
    with pytest.raises(OSError, match="no room"):
        many.write_to(Nowhere(), lambda _: None)


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


def damaged_copy(artifact: Path, parent: Path) -> Path:
    """The artifact with one bit of a level's payload flipped."""
    folder = parent / "damaged"
    folder.mkdir()
    for path in artifact.iterdir():
        data = bytearray(path.read_bytes())
        if path.suffix == ".levels":
            data[len(data) // 2] ^= 1
        (folder / path.name).write_bytes(data)
    return folder


def test_the_file_says_what_was_planned_and_gguf_reads_it(artifact: Path, tmp_path: Path) -> None:
    with open_artifact(artifact) as opened:
        depths = mixed(opened, seed=2)
        made = materialize(opened, depths, tmp_path / "model.gguf")
        expected = {s.name: s.type_at(depths.tier(s.name)) for s in opened.stacks}
        shapes = {s.name: s.shape for s in opened.stacks}
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    assert {t.name: t.tensor_type.name for t in reader.tensors} == expected
    assert {t.name: tuple(reversed([int(n) for n in t.shape])) for t in reader.tensors} == shapes
    assert weights_bytes(tmp_path / "model.gguf") == depths.weights_bytes
    assert made.bytes == (tmp_path / "model.gguf").stat().st_size
    assert {row["name"]: row["tier"] for row in made.tensors} == dict(depths.tiers)


def test_llama_cpp_runs_the_file_and_the_base(artifact: Path, tmp_path: Path) -> None:
    with open_artifact(artifact) as opened:
        materialize(opened, plan_tier(opened, opened.manifest.tiers[0]).depths, tmp_path / "m.gguf")
        base = artifact / opened.manifest.base.name
        assert (tmp_path / "m.gguf").read_bytes() == base.read_bytes()
        materialize(opened, plan_tier(opened, "source").depths, tmp_path / "source.gguf")
    lowest, source = (logits(p, [5, 6, 7, 8]) for p in (base, tmp_path / "source.gguf"))
    assert np.isfinite(lowest).all()
    assert not np.array_equal(lowest, source)


def test_n_threads_change_no_byte(artifact: Path, tmp_path: Path) -> None:
    with open_artifact(artifact) as opened:
        depths = mixed(opened, seed=3)
        for n_threads in (1, 3):
            materialize(opened, depths, tmp_path / f"{n_threads}.gguf", n_threads=n_threads)
    assert (tmp_path / "1.gguf").read_bytes() == (tmp_path / "3.gguf").read_bytes()


def test_a_target_size_is_never_passed_and_one_byte_less_buys_less(
    artifact: Path, tmp_path: Path
) -> None:
    with open_artifact(artifact) as opened:
        least = uniform(opened.stacks, lambda stack: stack.tiers[0]).weights_bytes
        most = uniform(opened.stacks, lambda stack: stack.tiers[-1]).weights_bytes
        rng = random.Random(4)
        for target in [least, most, *(rng.randrange(least, most) for _ in range(5))]:
            depths = plan_weights(opened, target).depths
            materialize(opened, depths, tmp_path / "m.gguf", force=True)
            size = weights_bytes(tmp_path / "m.gguf")
            assert size == depths.weights_bytes <= target
            if size > least:
                assert plan_weights(opened, size).depths.weights_bytes == size
                assert plan_weights(opened, size - 1).depths.weights_bytes < size
        assert plan_weights(opened, most).depths.weights_bytes == most
        with pytest.raises(DoesNotFitError):
            plan_weights(opened, least - 1)


def test_a_budget_holds_weights_and_all_else(artifact: Path, tmp_path: Path) -> None:
    with open_artifact(artifact) as opened:
        overhead = plan_budget(opened, 1 << 40, 128).memory.total
        least = uniform(opened.stacks, lambda stack: stack.tiers[0]).weights_bytes
        for budget in (overhead + least, overhead + least + 40_000, 1 << 40):
            plan = plan_budget(opened, budget, 128)
            body = plan_json(opened, plan)
            materialize(opened, plan.depths, tmp_path / "m.gguf", force=True)
            assert weights_bytes(tmp_path / "m.gguf") == body["weights_bytes"]
            assert body["weights_bytes"] == sum(row["bytes"] for row in body["tensors"])
            parts = ("weights_bytes", "kv_bytes", "compute_bytes", "overhead_bytes")
            assert sum(body[part] for part in parts) == body["total_bytes"] <= budget
            assert body["fits"]


def test_an_existing_file_stays_without_force(llama_artifact: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"mine")
    with open_artifact(llama_artifact) as opened:
        depths = plan_tier(opened, "Q2_K").depths
        with pytest.raises(UsageError, match=r"model.gguf exists; .*--force"):
            materialize(opened, depths, path)
        assert path.read_bytes() == b"mine"
        materialize(opened, depths, path, force=True)
    assert path.read_bytes()[:4] == b"GGUF"
    assert [p.name for p in tmp_path.iterdir()] == ["model.gguf"]


def test_a_link_a_folder_and_a_missing_folder_are_refused(
    llama_artifact: Path, tmp_path: Path
) -> None:
    (tmp_path / "target").write_bytes(b"mine")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with open_artifact(llama_artifact) as opened:
        depths = plan_tier(opened, "Q2_K").depths
        for name in ("link", ".", "nowhere/model.gguf"):
            with pytest.raises(UsageError):
                materialize(opened, depths, tmp_path / name, force=True)
    assert (tmp_path / "target").read_bytes() == b"mine"


def test_a_refused_level_leaves_no_file_and_the_old_one_whole(
    moe_artifact: Path, tmp_path: Path
) -> None:
    folder, out = damaged_copy(moe_artifact, tmp_path), tmp_path / "out"
    out.mkdir()
    (out / "old.gguf").write_bytes(b"mine")
    with open_artifact(folder) as opened:
        depths = plan_tier(opened, "source").depths
        for name in ("new.gguf", "old.gguf"):
            with pytest.raises(RefusedError):
                materialize(opened, depths, out / name, force=True)
    assert [p.name for p in out.iterdir()] == ["old.gguf"]
    assert (out / "old.gguf").read_bytes() == b"mine"


def test_a_full_disk_is_exit_code_4_and_leaves_no_file(
    llama_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with open_artifact(llama_artifact) as opened:
        depths = plan_tier(opened, "Q2_K").depths
        monkeypatch.setattr(module.os, "fsync", full)
        with pytest.raises(DiskFullError, match="No space left on device") as error:
            materialize(opened, depths, tmp_path / "m.gguf")
    assert error.value.exit_code == 4
    assert list(tmp_path.iterdir()) == []


def test_a_preview_is_right_to_the_byte_and_writes_nothing(
    llama_artifact: Path, tmp_path: Path
) -> None:
    with open_artifact(llama_artifact) as opened:
        depths = mixed(opened)
        told = preview(opened, depths, tmp_path / "m.gguf")
        assert list(tmp_path.iterdir()) == []
        assert told.bytes == materialize(opened, depths, tmp_path / "m.gguf").bytes


def test_the_file_type_is_the_one_llama_cpp_names(llama_artifact: Path, tmp_path: Path) -> None:
    wanted = {"Q2_K": "Q2_K", "Q4_K": "Q4_K_M", "Q8_0": "Q8_0", "source": "BF16"}
    with open_artifact(llama_artifact) as opened:
        for tier, name in wanted.items():
            materialize(opened, plan_tier(opened, tier).depths, tmp_path / tier)
            field = gguf.GGUFReader(tmp_path / tier).fields["general.file_type"].contents()
            assert field == getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}")
