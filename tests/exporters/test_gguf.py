"""The GGUF header: what gguf's own writer and reader, and llama.cpp, make of the same bytes."""

import io
import itertools
import struct
import time
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGUFValueType
from tiny_gguf import write_tiny_llama

from edgekit.errors import RefusedError
from edgekit.exporters.gguf import (
    TYPES,
    Gguf,
    TensorInfo,
    header_bytes,
    read_header,
    tensor_offsets,
    write_gguf,
)
from edgekit.exporters.gguf_values import array, boolean, f32, i32, string, u32, u64
from edgekit.exporters.tokenizer_check import llama_encoder

MIB = 1024**2


def _theirs(path: Path, alignment: int) -> bytes:
    """A file by gguf's writer with every kind of value and tensors of four shapes."""
    writer = gguf.GGUFWriter(path, "llama")
    for kind in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"):
        getattr(writer, f"add_{kind}")(f"a.{kind}", 7 if kind[0] == "u" else -7)
    writer.add_float32("a.float32", 0.1)
    writer.add_float64("a.float64", 0.1)
    writer.add_bool("a.bool", True)
    writer.add_string("general.name", "Größe 中")
    writer.add_array("a.ints", [1, -2, 3])
    writer.add_array("a.floats", [0.1, 2.5])
    writer.add_array("a.bools", [True, False])
    writer.add_array("tokenizer.ggml.tokens", ["x", "", "ÿ" * 300])
    if alignment != 32:
        writer.add_custom_alignment(alignment)
    random = np.random.default_rng(3)
    writer.add_tensor("b", random.standard_normal(5).astype(np.float32))
    writer.add_tensor("w", random.standard_normal((3, 64)).astype(np.float16))
    experts = random.standard_normal((2, 3, 96)).astype(np.float32)
    q4_0 = gguf.GGMLQuantizationType.Q4_0
    writer.add_tensor("e", gguf.quantize(experts, q4_0), raw_dtype=q4_0)
    writer.add_tensor("four", random.standard_normal((2, 1, 2, 8)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@pytest.mark.parametrize("alignment", [32, 64, 4096])
def test_a_header_by_gguf_writer_is_read_and_written_back_byte_for_byte(tmp_path, alignment):
    data = _theirs(tmp_path / "x.gguf", alignment)
    header = read_header(tmp_path / "x.gguf", allow_trailing=False)
    assert header.alignment == alignment
    assert header_bytes(header.metadata, header.tensors) == data[: header.data_offset]
    assert header.tensors[2] == TensorInfo("e", "Q4_0", (2, 3, 96))
    assert header.get("a.int64") == -7 and header.get("a.float32") == np.float32(0.1)


def test_a_whole_file_is_rewritten_in_chunks_byte_for_byte(tmp_path):
    data = _theirs(tmp_path / "x.gguf", 64)
    header = read_header(data)
    starts = [header.data_offset + at for at in tensor_offsets(header.tensors, header.alignment)]
    chunks = (
        (
            data[at : min(at + 100, start + tensor.n_bytes)]
            for at in range(start, start + tensor.n_bytes, 100)
        )
        for start, tensor in zip(starts, header.tensors, strict=True)
    )
    ours = io.BytesIO()
    assert write_gguf(ours, header.metadata, header.tensors, chunks) == len(data)
    assert ours.getvalue() == data


def test_gguf_reader_reads_what_we_wrote(tmp_path):
    metadata = {
        "general.architecture": string("llama"),
        "a.u32": u32(4_000_000_000),
        "a.i32": i32(-1),
        "a.u64": u64(2**63),
        "a.f32": f32(1.5),
        "a.bool": boolean(False),
        "a.names": array(GGUFValueType.STRING, ["ä", "b"]),
        "a.empty": array(GGUFValueType.INT32, []),
    }
    values = np.arange(2 * 3 * 32, dtype=np.float32).reshape(2, 3, 32)
    q8_0 = gguf.quantize(values, gguf.GGMLQuantizationType.Q8_0)
    tensors = (TensorInfo("v", "F32", (2, 3, 32)), TensorInfo("q", "Q8_0", (2, 3, 32)))
    with open(tmp_path / "x.gguf", "wb") as file:
        write_gguf(file, metadata, tensors, ([values], [q8_0[:1], q8_0[1:]]))
    theirs = gguf.GGUFReader(tmp_path / "x.gguf")
    for key, value in metadata.items():
        if value.value != []:
            assert theirs.fields[key].contents() == value.value
    np.testing.assert_array_equal(theirs.tensors[0].data, values)
    np.testing.assert_array_equal(theirs.tensors[1].data, q8_0)
    assert theirs.tensors[1].tensor_type.name == "Q8_0"


def test_block_sizes_are_those_of_libggml():
    ggml = pytest.importorskip("edgekit.kernels.ggml")
    for name, kind in ggml.TYPES.items():
        assert TYPES[name] == (kind.id, kind.block, kind.block_bytes), name


def test_llama_cpp_loads_a_file_rewritten_by_us(tmp_path):
    source = write_tiny_llama(tmp_path / "a.gguf", words=("▁hello", "lo"))
    header = read_header(source, allow_trailing=False)
    blob = source.read_bytes()
    starts = [header.data_offset + at for at in tensor_offsets(header.tensors)]
    data = [[blob[at : at + t.n_bytes]] for at, t in zip(starts, header.tensors, strict=True)]
    renamed = header.metadata | {"Weird Key!": string("x"), "general.name": string("again")}
    with open(tmp_path / "b.gguf", "wb") as file:
        write_gguf(file, renamed, header.tensors, data)
    assert read_header(tmp_path / "b.gguf").unusual_keys == ("Weird Key!",)
    with llama_encoder(source) as first, llama_encoder(tmp_path / "b.gguf") as second:
        assert first("hello ▁hello", True) == second("hello ▁hello", True) != []


def test_a_prefix_is_enough_when_the_size_is_known(tmp_path):
    data = _theirs(tmp_path / "x.gguf", 32)
    whole = read_header(data)
    prefix = data[: whole.data_offset]
    assert read_header(prefix, file_size=len(data)) == whole
    assert read_header(io.BytesIO(prefix), file_size=len(data)) == whole
    with pytest.raises(RefusedError, match="its tensors end at byte"):
        read_header(prefix)
    with pytest.raises(RefusedError, match=r"only \d+ could be read"):
        read_header(prefix[:-100], file_size=len(data))


def test_trailing_bytes_are_the_callers_choice(tmp_path):
    data = _theirs(tmp_path / "x.gguf", 32) + b"trailer"
    assert read_header(data).data_end <= len(data)
    with pytest.raises(RefusedError, match="7 bytes behind its last tensor"):
        read_header(data, allow_trailing=False)


# hostile input


def _text(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def _pair(key: str | bytes, kind: int, data: bytes) -> bytes:
    return _text(key) + struct.pack("<I", kind) + data


def _tensor(
    name: str = "w", dims: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0
) -> bytes:
    head = struct.pack(f"<I{len(dims)}q", len(dims), *dims)
    return _text(name) + head + struct.pack("<IQ", kind, offset & 2**64 - 1)


def _file(
    pairs: tuple[bytes, ...] = (),
    tensors: tuple[bytes, ...] = (),
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    counts: tuple[int, int] | None = None,
    data: int = 4096,
) -> bytes:
    n_tensors, n_pairs = counts or (len(tensors), len(pairs))
    head = magic + struct.pack("<IQQ", version, n_tensors & 2**64 - 1, n_pairs & 2**64 - 1)
    return head + b"".join(pairs + tensors) + bytes(data)


def _align(value: int, kind: int = 4) -> bytes:
    return _pair("general.alignment", kind, value.to_bytes(8 if kind > 9 else 4, "little"))


COUNTS = (2**31, 2**32, 2**40, 2**63 - 1, -1)
HOSTILE = {
    "empty": b"",
    "magic": _file(magic=b"GGML"),
    "version 1": _file(version=1),
    "version 4": _file(version=4),
    "big endian": _file(version=3 << 24),
    **{f"{n} tensors": _file(counts=(n, 0)) for n in COUNTS},
    **{f"{n} pairs": _file(counts=(0, n)) for n in COUNTS},
    **{
        f"string of {n}": _file((_text("k") + struct.pack("<IQ", 8, n & 2**64 - 1),))
        for n in (*COUNTS, 65 * MIB, 5000)
    },
    **{
        f"array of {n} of {kind}": _file((_pair("k", 9, struct.pack("<IQ", kind, n & 2**64 - 1)),))
        for n in (*COUNTS, 5_000_000)
        for kind in (0, 7, 8, 12)
    },
    "array of arrays": _file((_pair("k", 9, struct.pack("<IQIQ", 9, 1, 4, 0)),)),
    "value type 13": _file((_pair("k", 13, bytes(8)),)),
    "value type -1": _file((_pair("k", 2**32 - 1, bytes(8)),)),
    "array of type 99": _file((_pair("k", 9, struct.pack("<IQ", 99, 1)),)),
    "long token": _file((_pair("k", 9, struct.pack("<IQ", 8, 1) + _text(b"x" * 65537)),)),
    "token not UTF-8": _file((_pair("k", 9, struct.pack("<IQ", 8, 1) + _text(b"\xff")),)),
    "more items than a vocabulary has": _file(
        (_pair("k", 9, struct.pack("<IQ", 0, 5_000_000)),), data=6_000_000
    ),
    "boolean 2": _file((_pair("k", 7, b"\x02"),)),
    "empty key": _file((_pair("", 4, bytes(4)),)),
    "key twice": _file((_pair("k", 4, bytes(4)),) * 2),
    "key not UTF-8": _file((_pair(b"\xff", 4, bytes(4)),)),
    "key of 70 kB": _file((_pair("k" * 70_000, 4, bytes(4)),)),
    "value not UTF-8": _file((_pair("k", 8, _text(b"\xc3")),)),
    **{f"alignment {n}": _file((_align(n),)) for n in (0, 3, 2**31, 2**21, 2**32 - 1)},
    "alignment u64": _file((_align(32, kind=10),)),
    "alignment i32": _file((_align(32, kind=5),)),
    "alignment string": _file((_pair("general.alignment", 8, _text("32")),)),
    "tensor twice": _file((), (_tensor(), _tensor(offset=128))),
    "name of 64 bytes": _file((), (_tensor("n" * 64),)),
    "empty name": _file((), (_tensor(""),)),
    "name with NUL": _file((), (_tensor("a\0b"),)),
    "name with newline": _file((), (_tensor("a\nb"),)),
    "name not ASCII": _file((), (_tensor("ä"),)),
    "no dimensions": _file((), (_tensor(dims=()),)),
    "five dimensions": _file((), (_tensor(dims=(1, 1, 1, 1, 1)),)),
    "2**31 dimensions": _file((), (_text("w") + struct.pack("<I", 2**31),)),
    "extent 0": _file((), (_tensor(dims=(32, 0)),)),
    "extent -1": _file((), (_tensor(dims=(-1,)),)),
    "product overflow": _file((), (_tensor(dims=(2**32, 2**32)),)),
    "product wraps to 0": _file((), (_tensor(dims=(2**62, 4)),)),
    "bytes overflow": _file((), (_tensor(dims=(2**62,)),)),
    "half a block": _file((), (_tensor(dims=(33,), kind=2),)),
    **{f"type {n}": _file((), (_tensor(kind=n & 2**32 - 1),)) for n in (4, 5, 31, 43, 99, -1)},
    "first offset": _file((), (_tensor(offset=32),)),
    "gap": _file((), (_tensor("a"), _tensor("b", offset=160))),
    "overlap": _file((), (_tensor("a"), _tensor("b", offset=96))),
    "reordered": _file((), (_tensor("a", offset=128), _tensor("b", offset=0))),
    "offset not padded": _file((), (_tensor("a", dims=(1,)), _tensor("b", offset=4))),
    "data missing": _file((), (_tensor(dims=(4096,)),)),
    "sum overflow": _file(
        (), tuple(_tensor(c, (2**60,), 0, i * 2**62) for i, c in enumerate("abcde"))
    ),
}


def _outcome(data: bytes, allow_trailing: bool = True) -> Gguf | None:
    """Read; ``None`` where it was refused with one clear line. Anything else is a failure."""
    try:
        return read_header(data, allow_trailing=allow_trailing)
    except RefusedError as error:
        assert str(error).isprintable() and len(str(error)) < 400
        return None


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_headers_are_refused_in_little_memory_and_time(data):
    tracemalloc.start()
    began = time.process_time()
    try:
        assert _outcome(data) is None
        assert time.process_time() - began < 1
        assert tracemalloc.get_traced_memory()[1] < 64 * MIB
    finally:
        tracemalloc.stop()


def test_the_builder_of_hostile_headers_builds_sound_ones_too():
    pairs = (_align(64), _pair("k", 9, struct.pack("<IQ", 8, 1) + _text("x")))
    tensors = (_tensor("a"), _tensor("b", dims=(64, 2), kind=2, offset=128))
    header = read_header(_file(pairs, tensors))
    assert header.alignment == 64 and header.tensors[1] == TensorInfo("b", "Q4_0", (2, 64))


def test_every_truncation_is_refused(tmp_path):
    data = _theirs(tmp_path / "x.gguf", 32)
    end = read_header(data).data_end
    offset = read_header(data).data_offset
    for size in itertools.chain(range(offset + 8), range(end - 40, end)):
        assert _outcome(data[:size]) is None, size
    assert _outcome(data[:end]) is not None  # llama.cpp does not need the last padding either


def test_flipped_bits_never_raise_anything_else(tmp_path):
    data = bytearray(_theirs(tmp_path / "x.gguf", 32))
    offset = read_header(bytes(data)).data_offset
    random = np.random.default_rng(20)
    refused = 0
    for _ in range(4000):
        where = random.integers(0, 8 * offset, size=int(random.integers(1, 4)))
        for bit in where:
            data[bit // 8] ^= 1 << bit % 8
        refused += _outcome(bytes(data), allow_trailing=False) is None
        for bit in where:
            data[bit // 8] ^= 1 << bit % 8
    assert 1000 < refused < 4000  # a flip in a name or a number may leave a sound header


def test_random_bytes_behind_a_sound_start_are_refused():
    random = np.random.default_rng(21)
    for n_bytes in (*range(64), 1000, 100_000):
        assert _outcome(_file(counts=(1, 3), data=0) + random.bytes(n_bytes)) is None


# what the writer refuses


@pytest.mark.parametrize(
    ("metadata", "tensors", "message"),
    [
        ({"a": u32(-1)}, (), "'a' holds '-1', which is no UINT32"),
        ({"a": u32(2**32)}, (), "is no UINT32"),
        ({"a": string("\ud800")}, (), "lone surrogate"),
        ({"a": array(GGUFValueType.INT32, ["x"])}, (), "is no ARRAY"),
        ({"general.alignment": u32(48)}, (), "power of two"),
        ({}, (TensorInfo("n" * 64, "F32", (1,)),), "64 bytes, at most 63"),
        ({}, (TensorInfo("w", "Q4_0", (2, 48)),), "48 columns, Q4_0 needs a multiple of 32"),
        ({}, (TensorInfo("w", "F32", (2**62, 4)),), r"2\*\*63 weights"),
        ({}, (TensorInfo("w", "Q9_Z", (2, 48)),), "type 'Q9_Z'"),
        ({}, (TensorInfo("w", "F32", ()),), "1 to 4 extents"),
        ({}, (TensorInfo("w", "F32", (1,)),) * 2, "appears twice"),
    ],
)
def test_the_writer_refuses_what_it_could_not_read_back(metadata, tensors, message):
    with pytest.raises(RefusedError, match=message):
        header_bytes(metadata, tensors)


def test_the_writer_refuses_a_tensor_of_another_size():
    tensors = (TensorInfo("w", "F32", (4,)),)
    with pytest.raises(RefusedError, match="'w' got 12 bytes, needs 16"):
        write_gguf(io.BytesIO(), {}, tensors, [[bytes(12)]])
