"""Loading a model: from files that exist nowhere, with a progress, and what is refused."""

import ctypes
import mmap
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_gguf import WORDS, write_tiny_llama
from virtual_files import Reader

from edgekit.errors import EdgekitError, RefusedError, UnsupportedError
from edgekit.exporters.gguf import read_header, tensor_offsets
from edgekit.llama import Context, WeightMemory, capture_log, has_fopencookie, open_model
from edgekit.llama.weight_memory import MemorySink

needs_placing = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="weights are placed on Linux only"
)


def shared_bytes() -> int:
    """Resident pages of this process that are files in memory."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssShmem:")[1].split()[0]) << 10


def map_facts(address: int) -> dict[str, str]:
    """What the kernel says of the map that has the page at ``address``."""
    facts = dict[str, str]()
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            first, last = (int(end, 16) for end in line.split()[0].split("-"))
            facts, is_ours = {}, first <= address < last
        else:
            name, _, value = line.partition(":")
            facts[name] = value.strip()
            if name == "VmFlags" and is_ours:
                return facts
    raise AssertionError(f"nothing is mapped at {address:x}")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("gguf") / "tiny.gguf", words=WORDS)


@pytest.fixture(params=["stream", "memory"])
def extra_bufts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether weights are to be repacked, and so are read through a stream, in small reads."""
    monkeypatch.setattr("edgekit.llama.opening._COPY_BYTES", 1 << 14)
    return bool(request.param == "stream")


@pytest.mark.skipif(not has_fopencookie(), reason="the C library has no fopencookie")
def test_a_virtual_file_reads_every_tensor_once_and_nothing_across_tensors(
    tmp_path: Path,
) -> None:
    """As weights that are repacked are read.

    The file is five times the stream's buffer, or glibc would not read ahead of its seeks.
    """
    path = write_tiny_llama(tmp_path / "wide.gguf", hidden=256, ffn=512)
    reader = Reader(path.read_bytes())
    header = read_header(path)
    open_model(reader, header=header, extra_bufts=True).close()
    starts = [header.data_offset + n for n in tensor_offsets(header.tensors, header.alignment)]
    n_reads = dict.fromkeys(starts, 0)
    for offset, n in reader.calls:
        if offset >= header.data_offset:
            n_reads[offset] += 1  # a KeyError: a read that does not begin with a tensor
            index = starts.index(offset)
            end = starts[index + 1] if index + 1 < len(starts) else reader.size
            assert offset + n <= end
        else:
            assert offset + n <= header.data_offset
    assert set(n_reads.values()) == {1}


@needs_placing
def test_a_virtual_file_is_read_once_and_lies_in_memory_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tiny_llama(tmp_path / "wide.gguf", hidden=256, ffn=512, layers=8)
    reader, descriptors = Reader(path.read_bytes()), sorted(os.listdir("/proc/self/fd"))
    header, before, during = read_header(path), shared_bytes(), list[int]()
    placed = WeightMemory._placed

    def watched(self: WeightMemory, buffer: int, tensor: int) -> int:
        during.append(shared_bytes() - before)  # llama.cpp has the file mapped now
        return placed(self, buffer, tensor)

    monkeypatch.setattr(WeightMemory, "_placed", watched)
    with open_model(reader, header=header) as model:
        assert sorted(os.listdir("/proc/self/fd")) == descriptors
        assert shared_bytes() == before  # the header is gone, though a page's map may not be
        assert model.memory is not None
        facts = map_facts(next(iter(model.memory.spans.values())).address)
        taken = int(facts["Rss"].removesuffix(" kB")) << 10
        assert model.weights_bytes <= taken <= model.weights_bytes + (64 << 10)
        assert len(during) == len(header.tensors)
        assert max(during) <= header.data_offset + (64 << 10)  # no zeros behind the header
    ends = [offset + n for offset, n in reader.calls if offset >= header.data_offset]
    assert len(ends) == len(set(ends)) and ends[-1] == reader.size


@needs_placing
def test_pages_are_large_where_weights_stay_and_small_where_they_come_and_go(
    tmp_path: Path,
) -> None:
    path = write_tiny_llama(tmp_path / "wide.gguf", hidden=512, ffn=2048, layers=2)
    paged = {"blk.0.ffn_up.weight", "blk.1.ffn_down.weight"}
    with open_model(Reader(path.read_bytes()), paged=paged) as model:
        assert model.memory is not None
        large = {k: v for k, v in model.memory.spans.items() if v.n_bytes > 2 * mmap.PAGESIZE}
        assert len(large) > 10
        for name, span in large.items():
            facts = map_facts(span.address + span.n_bytes // 2)
            assert ("nh" if name in paged else "hg") in facts["VmFlags"].split()
            is_there = any((ctypes.c_uint8 * span.n_bytes).from_address(span.address))
            assert is_there == (name not in paged)


@needs_placing
def test_a_llama_cpp_that_does_not_ask_where_weights_go_is_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would compute with zeros."""
    monkeypatch.setattr("edgekit.llama.weight_memory._ALL", rb"no such tensor")
    with pytest.raises(EdgekitError, match=r"does not put weights.*--residency mapped"):
        open_model(Reader(path.read_bytes()))


@needs_placing
def test_bytes_of_a_file_find_their_tensors_and_what_has_no_place_is_passed_over(
    path: Path,
) -> None:
    header, data = read_header(path), path.read_bytes()
    offsets = tensor_offsets(header.tensors, header.alignment)
    starts = {
        t.name: header.data_offset + at for t, at in zip(header.tensors, offsets, strict=True)
    }
    unused, used = "blk.1.ffn_up.weight", "blk.1.ffn_gate.weight"
    with open_model(Reader(data)) as model:
        assert model.memory is not None
        spans = model.memory.spans
        left = spans.pop(unused)  # as one that llama.cpp does not create
        sink = MemorySink(model.memory, header)
        assert not sink.takes(0) and not sink.takes(starts[unused]) and sink.takes(starts[used])
        assert sink.room(0, 10) is None and sink.room(starts[unused], 4) is None
        room = sink.room(starts[used], spans[used].n_bytes)
        assert room is not None and room.ctypes.data == spans[used].address
        assert sink.room(starts[used], spans[used].n_bytes + 1) is None  # reaches beyond it
        flipped = bytes(255 - byte for byte in data)
        sink.put(0, memoryview(flipped))  # header, padding and all
        for name, span in {**spans, unused: left}.items():
            found = ctypes.string_at(span.address, span.n_bytes)
            source = data if name == unused else flipped
            assert found == source[starts[name] :][: span.n_bytes]


@needs_placing
def test_where_addresses_are_limited_weights_are_mapped_once(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "wide.gguf", hidden=1024, ffn=4096, layers=4)
    script = """if True:
        import resource, sys
        from pathlib import Path
        from edgekit.llama import MemoryFile, open_model
        file = MemoryFile(Path(sys.argv[1]).read_bytes())
        open_model(file, vocab_only=True).close()
        status = Path("/proc/self/status").read_text()
        room = int(status.split("VmSize:")[1].split()[0]) * 1024 + file.size * 3 // 2
        resource.setrlimit(resource.RLIMIT_AS, (room, room))
        with open_model(file) as model:
            print(model.memory, model.weights_bytes)
    """
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True
    )
    n_bytes = sum(tensor.n_bytes for tensor in read_header(path).tensors)
    assert done.stdout.split() == ["None", str(n_bytes)] and n_bytes > 100 << 20


def refused(*_: object) -> int:
    raise OSError("not permitted")


@needs_placing
@pytest.mark.parametrize("call", ["memfd_create", "ftruncate"])
def test_without_files_in_memory_the_header_is_on_disk_and_without_holes_a_stream_is_read(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    descriptors = sorted(os.listdir("/proc/self/fd"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with open_model(path) as model, Context(model, 64, n_threads=1) as context:
        logits = context.decode([1, 2, 3])
    monkeypatch.setattr(os, call, refused, raising=False)
    with open_model(Reader(path.read_bytes())) as model, Context(model, 64, n_threads=1) as context:
        assert (context.decode([1, 2, 3]) == logits).all()
        assert (model.memory is None) == (call == "ftruncate")
        assert not list(tmp_path.iterdir())
    assert sorted(os.listdir("/proc/self/fd")) == descriptors


@needs_placing
def test_weights_can_be_paged_where_they_can_be_placed_only(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "ftruncate", refused)
    with pytest.raises(UnsupportedError, match=r"experts on demand need Linux.*--no-pager"):
        open_model(Reader(path.read_bytes()), paged={"blk.0.ffn_up.weight"})


@pytest.mark.parametrize("error", [KeyError("level 7"), KeyboardInterrupt(), MemoryError()])
def test_what_a_reader_raises_arrives(path: Path, error: BaseException, extra_bufts: bool) -> None:
    class Failing(Reader):
        def read(self, offset: int, n: int) -> bytes:
            if offset > 50_000:
                raise error
            return super().read(offset, n)

    with pytest.raises(type(error)) as caught:
        open_model(Failing(path.read_bytes()), extra_bufts=extra_bufts)
    assert caught.value is error


@pytest.mark.parametrize("wrong", [b"", bytes(1 << 22)])
def test_a_reader_that_gives_too_little_or_too_much_is_an_error(
    path: Path, wrong: bytes, extra_bufts: bool
) -> None:
    class Wrong(Reader):
        def read(self, offset: int, n: int) -> bytes:
            return wrong if offset > 50_000 else super().read(offset, n)

    with pytest.raises(EdgekitError, match=rf"gave {len(wrong)} bytes at offset \d+ where 1 to"):
        open_model(Wrong(path.read_bytes()), extra_bufts=extra_bufts)


def test_progress_rises_and_an_exception_in_it_cancels(path: Path, extra_bufts: bool) -> None:
    shares: list[float] = []
    open_model(path, residency="anon", progress=shares.append).close()
    assert shares == sorted(shares) and len(shares) >= 20 and 0 <= shares[0] < 0.5 < shares[-1] <= 1

    def cancel(share: float) -> None:
        if share > 0.5:
            raise TimeoutError("enough")

    with pytest.raises(TimeoutError, match="enough"):
        open_model(Reader(path.read_bytes()), progress=cancel, extra_bufts=extra_bufts)


def test_a_load_that_fails_gives_llama_cpps_reason_and_prints_nothing(
    path: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(path.read_bytes().replace(b"llama", b"lxama"))
    with pytest.raises(EdgekitError, match=r"other\.gguf: unknown model architecture: 'lxama'"):
        open_model(other)
    other.write_bytes(path.read_bytes().replace(b"blk.1.ffn_up", b"blk.1.ffn_xx"))
    with pytest.raises(EdgekitError, match=r"tensor 'blk\.1\.ffn_up\.weight' not found"):
        open_model(Reader(other.read_bytes()))
    assert capfd.readouterr() == ("", "")


def test_a_cut_file_is_refused_before_llama_cpp_sees_it(path: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(path.read_bytes()[:-100])
    for source in (cut, Reader(cut.read_bytes())):
        with pytest.raises(RefusedError, match="its tensors end at byte"):
            open_model(source)


def test_a_part_of_a_split_model_is_not_loaded(path: Path) -> None:
    from gguf import GGUFValueType

    from edgekit.exporters.gguf import Gguf, Value

    header = read_header(path)
    split = {**header.metadata, "split.count": Value(GGUFValueType.UINT16, 3)}
    with pytest.raises(UnsupportedError, match="one of 3 parts of a model; join them"):
        open_model(path, header=Gguf(split, header.tensors, 32, header.data_offset))


def test_no_alloc_counts_weights_and_reads_none(path: Path) -> None:
    reader = Reader(path.read_bytes())
    with open_model(reader, no_alloc=True) as model, capture_log() as lines:
        Context(model, 256, n_threads=1).close()
        assert model.weights_bytes == sum(t.n_bytes for t in read_header(path).tensors)
    offset = read_header(path).data_offset
    assert all(call[0] < offset for call in reader.calls)
    assert any("llama_kv_cache: size =" in line for line in lines)


def test_vocab_only_tokenizes(path: Path) -> None:
    text = "the sum of ab, é 日本 🙂"
    with open_model(path) as model, open_model(Reader(path.read_bytes()), vocab_only=True) as vocab:
        assert vocab.tokenize(text) == model.tokenize(text)


@pytest.mark.skipif(sys.platform != "linux", reason="VmHWM is Linux's")
def test_a_ten_megabyte_model_runs_in_a_light_process(tmp_path: Path) -> None:
    """Measured 70 MiB: Python 10, numpy 15, gguf 8, llama_cpp 13, the model 10, context 6, rest."""
    path = write_tiny_llama(tmp_path / "ten.gguf", layers=4, hidden=256, ffn=512, context=2048)
    script = """if True:
        import sys
        from edgekit.llama import Context, generate, open_model
        class File:
            file = open(sys.argv[1], "rb")
            size = file.seek(0, 2)
            def read(self, offset, n):
                self.file.seek(offset)
                return self.file.read(min(n, 1 << 18))
        with open_model(File()) as model, Context(model, 2048, n_threads=1) as context:
            "".join(generate(context, [1] * 400, 20))
        assert "torch" not in sys.modules
        print(next(line.split()[1] for line in open("/proc/self/status") if "VmHWM" in line))
    """
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 100 * 1024  # KiB
