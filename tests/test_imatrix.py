"""Importance matrices: llama.cpp's formats, both ways, and what llama-quantize makes of them."""

import contextlib
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stock import quantize
from tiny_gguf import write_tiny_llama

from edgekit.errors import RefusedError
from edgekit.imatrix import Entry, Imatrix, read_imatrix, write_imatrix

Q, UP = "blk.0.attn_q.weight", "blk.0.ffn_up_exps.weight"


def imatrix() -> Imatrix:
    sums = np.array([[2, 4, 6, 8], [1, 1, 1, 1], [9, 0, 3, 6]], np.float32)
    return Imatrix(
        {
            UP: Entry(sums, np.array([2, 0, 3], np.float32)),
            Q: Entry(np.array([[1, 2, 3]], np.float32), np.array([512], np.float32)),
        },
        ("a.txt", "b.txt"),
        chunk_count=7,
        chunk_size=512,
    )


def write_theirs(path: Path, tensors: dict[str, np.ndarray], **keys: object) -> Path:
    """An imatrix as llama-imatrix writes it, through gguf's writer; keys replace or add to it."""
    writer = gguf.GGUFWriter(path, "")
    writer.kv_data[0].clear()  # no general.architecture
    writer.add_type(str(keys.get("type", "imatrix")))
    if "datasets" not in keys:
        writer.add_array("imatrix.datasets", ["x.txt"])
    writer.add_uint32("imatrix.chunk_count", 3)
    writer.add_uint32("imatrix.chunk_size", 256)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_weights_are_means_and_ones_for_an_expert_without_tokens():
    want = [[1, 2, 3, 4], [1, 1, 1, 1], [3, 0, 1, 2]]
    assert imatrix().weights_for(UP, 3, 4).tolist() == want
    third = np.float32([1, 2, 3]) / np.float32(512)
    assert np.array_equal(imatrix().weights_for(Q, 1, 3), third[None])


def test_one_count_for_all_rows_divides_all_of_them():
    entry = Entry(np.arange(6, dtype=np.float32).reshape(2, 3), np.array([2], np.float32))
    assert entry.weights().tolist() == [[0, 0.5, 1], [1.5, 2, 2.5]]


def test_what_is_missing_starved_or_of_another_model_is_told():
    ours = imatrix()
    assert ours.weights_for("blk.9.attn_q.weight", 1, 3) is None
    assert ours.missing([Q, "output.weight"]) == ("output.weight",)
    assert ours.starved() == {UP: 1}
    with pytest.raises(RefusedError, match=r"has statistics of 12 columns, the model needs 4 x 4"):
        ours.weights_for(UP, 4, 4)
    embedding = Imatrix({"token_embd.weight": ours.entries[Q]})
    assert embedding.weights_for("token_embd.weight", 1, 64) is None


def test_gguf_pys_reader_finds_what_we_wrote(tmp_path: Path):
    path = tmp_path / "imatrix.gguf"
    write_imatrix(imatrix(), path)
    reader = gguf.GGUFReader(path)
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.datasets"].contents() == ["a.txt", "b.txt"]
    assert reader.fields["imatrix.chunk_count"].contents() == 7
    assert reader.fields["imatrix.chunk_size"].contents() == 512
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert list(tensors) == sorted(
        [UP + ".counts", UP + ".in_sum2", Q + ".counts", Q + ".in_sum2"],
        key=lambda name: (name.rsplit(".", 1)[0], "c" in name[-6:]),
    )
    assert tensors[UP + ".in_sum2"].shape.tolist() == [4, 3]  # ggml order: columns first
    assert tensors[UP + ".counts"].shape.tolist() == [1, 3]
    assert np.array_equal(tensors[UP + ".in_sum2"].data, imatrix().entries[UP].sums)
    del reader, tensors


def test_reading_gives_back_what_was_written_and_equal_bytes(tmp_path: Path):
    path, again = tmp_path / "imatrix.gguf", tmp_path / "again.gguf"
    write_imatrix(imatrix(), path)
    back = read_imatrix(path)
    assert (back.datasets, back.chunk_count, back.chunk_size) == (("a.txt", "b.txt"), 7, 512)
    for name, entry in imatrix().entries.items():
        assert np.array_equal(back.entries[name].sums, entry.sums)
        assert np.array_equal(back.entries[name].counts, entry.counts)
    write_imatrix(back, again)
    assert again.read_bytes() == path.read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {"imatrix.gguf", "again.gguf"}


def test_a_file_of_llama_imatrix_is_read(tmp_path: Path):
    sums = np.array([[1, 2], [3, 4]], np.float32)
    tensors = {UP + ".in_sum2": sums, UP + ".counts": np.array([[2], [4]], np.float32)}
    ours = read_imatrix(write_theirs(tmp_path / "theirs.gguf", tensors))
    assert (ours.datasets, ours.chunk_count, ours.chunk_size) == (("x.txt",), 3, 256)
    assert ours.weights_for(UP, 2, 2).tolist() == [[0.5, 1], [0.75, 1]]


def legacy(n_calls: int = 4, end: bytes = struct.pack("<ii5s", 9, 5, b"w.txt")) -> bytes:
    name = Q.encode()
    head = struct.pack(f"<ii{len(name)}sii", 1, len(name), name, n_calls, 3)
    return head + struct.pack("<3f", 4, 8, 12) + end


def test_an_old_dat_file_is_read(tmp_path: Path):
    path = tmp_path / "old.dat"
    path.write_bytes(legacy())
    ours = read_imatrix(path)
    assert (ours.datasets, ours.chunk_count, ours.chunk_size) == (("w.txt",), 9, 0)
    assert ours.weights_for(Q, 1, 3).tolist() == [[1, 2, 3]]
    path.write_bytes(legacy(n_calls=0, end=b""))
    assert read_imatrix(path).weights_for(Q, 1, 3).tolist() == [[4, 8, 12]]


BAD = np.array([[1, np.nan]], np.float32)
ONE = np.ones((1, 1), np.float32)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {Q + ".in_sum2": BAD, Q + ".counts": ONE},
            "sums of 'blk.0.attn_q.weight' are not all fin",
        ),
        ({Q + ".in_sum2": -BAD[:, :1], Q + ".counts": ONE}, "not all finite and 0 or more"),
        ({Q + ".in_sum2": ONE, Q + ".counts": -ONE}, "counts of 'blk.0.attn_q.weight' are not"),
        ({Q + ".in_sum2": ONE}, "has not both sums and counts"),
        ({Q + ".counts": ONE}, "has not both sums and counts"),
        ({"other": ONE}, "holds no statistics"),
        ({Q + ".in_sum2": ONE.astype(np.float16), Q + ".counts": ONE}, "is F16, needs F32"),
        ({Q + ".in_sum2": np.ones((1, 3), np.float32), Q + ".counts": ONE.repeat(2)}, "2 counts"),
    ],
)
def test_wrong_statistics_are_refused(tensors, message, tmp_path: Path):
    with pytest.raises(RefusedError, match=message):
        read_imatrix(write_theirs(tmp_path / "bad.gguf", tensors))


def test_other_files_are_refused(tmp_path: Path):
    tensors = {Q + ".in_sum2": ONE, Q + ".counts": ONE}
    with pytest.raises(RefusedError, match="is a GGUF of type 'adapter', not an imatrix"):
        read_imatrix(write_theirs(tmp_path / "a.gguf", tensors, type="adapter"))
    with pytest.raises(RefusedError, match=r"has no imatrix\.datasets"):
        read_imatrix(write_theirs(tmp_path / "b.gguf", tensors, datasets=None))
    with pytest.raises(RefusedError, match="is a GGUF of type 'llama', not an imatrix"):
        read_imatrix(write_tiny_llama(tmp_path / "model.gguf"))
    with pytest.raises(RefusedError, match="is no file"):
        read_imatrix(tmp_path / "absent.dat")


@given(cut=st.integers(0, 60), flip=st.integers(0, 60), bit=st.integers(0, 7))
def test_a_damaged_file_is_read_or_refused_never_more(tmp_path_factory, cut, flip, bit):
    folder = tmp_path_factory.mktemp("damaged")
    write_imatrix(imatrix(), folder / "new")
    for data in (legacy(), (folder / "new").read_bytes()):
        scale = max(1, len(data) // 60)
        damaged = bytearray(data[: len(data) - cut * scale % len(data)])
        if damaged:
            damaged[flip * scale % len(damaged)] ^= 1 << bit
        (folder / "file").write_bytes(damaged)
        with contextlib.suppress(RefusedError):
            read_imatrix(folder / "file")


def test_llama_quantize_takes_our_weights_and_they_change_the_result(tmp_path: Path):
    source = write_tiny_llama(tmp_path / "f32.gguf", hidden=256, ffn=256, layers=1)
    name, random = "blk.0.ffn_up.weight", np.random.default_rng(0)
    sums = (random.random((1, 256), np.float32) ** 8 * 100).astype(np.float32)
    ours = Imatrix({name: Entry(sums, np.array([64], np.float32))})
    write_imatrix(ours, tmp_path / "imatrix.gguf")
    weights = read_imatrix(tmp_path / "imatrix.gguf").weights_for(name, 1, 256)
    plain = _dequantized(quantize(source, tmp_path / "a.gguf", "Q3_K_S"), name)
    weighed = _dequantized(
        quantize(source, tmp_path / "b.gguf", "Q3_K_S", weights={name: weights}), name
    )
    exact = _dequantized(source, name)
    errors = [float((weights * (exact - q) ** 2).sum()) for q in (plain, weighed)]
    assert errors[1] < 0.8 * errors[0]


def _dequantized(path: Path, name: str) -> np.ndarray:
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == name)
    return np.array(gguf.dequantize(tensor.data, tensor.tensor_type))
