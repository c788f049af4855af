"""The checkpoint reader against the safetensors library, and against files made to harm."""

import itertools
import json
import os
import pickle
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from edgekit.checkpoint import Checkpoint, contained
from edgekit.errors import RefusedError, UnsupportedError, UsageError
from edgekit.safetensors_header import MAX_HEADER_BYTES, read_header

TENSORS = {
    "a.weight": torch.arange(15, dtype=torch.bfloat16).reshape(5, 3),
    "b.weight": torch.linspace(-2, 2, 24).reshape(2, 3, 4),
    "c.bias": torch.tensor([1.5, -2.25], dtype=torch.float16),
    "d.ids": torch.tensor([1, 2, 3]),
}


def write_config(folder: Path, **fields: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **fields}))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of one file, written by the safetensors library."""
    write_config(tmp_path / "model")
    save_file(TENSORS, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """The same in two shards with an index."""
    folder = write_config(tmp_path / "sharded")
    names = {"model-1.safetensors": ("a.weight", "b.weight"), "model-2.safetensors": ("c.bias",)}
    for shard, tensors in names.items():
        save_file({name: TENSORS[name] for name in tensors}, folder / shard)
    write_index(folder, {name: shard for shard, tensors in names.items() for name in tensors})
    return folder


def write_index(folder: Path, weight_map: Any) -> None:
    text = json.dumps({"weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)


def refused(folder: Path, text: str) -> None:
    with pytest.raises(RefusedError, match=text) as caught:
        Checkpoint.open(folder)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 5


def bits(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


# what a sound checkpoint gives


@pytest.mark.parametrize("kind", ["folder", "sharded"])
def test_values_are_those_of_the_safetensors_library(kind: str, request: Any) -> None:
    folder = request.getfixturevalue(kind)
    checkpoint = Checkpoint.open(folder)
    for file in folder.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            if tensor.is_floating_point():
                np.testing.assert_array_equal(checkpoint.read(name), bits(tensor))
            assert checkpoint.tensors[name].shape == tuple(tensor.shape)
        assert checkpoint.files[file.resolve()] == file.stat().st_size


def test_rows_are_rows_of_the_flattened_matrix(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    whole = TENSORS["b.weight"].reshape(6, 4).numpy()
    for rows in (slice(0, 6), slice(2, 5), slice(5, 6), slice(4, 99), slice(3, 3)):
        np.testing.assert_array_equal(checkpoint.read("b.weight", rows), whole[rows])
    np.testing.assert_array_equal(checkpoint.read("c.bias", slice(0, 1)), [[1.5, -2.25]])


def test_reading_rows_maps_only_their_pages(tmp_path: Path) -> None:
    """Resident memory follows the rows asked for, and goes when the array goes."""
    save_file(
        {"w": torch.zeros(1 << 14, 1 << 10)}, write_config(tmp_path / "m") / "model.safetensors"
    )
    checkpoint = Checkpoint.open(tmp_path / "m")
    before = resident()
    array = checkpoint.read("w", slice(0, 1 << 8))
    assert array.sum() == 0
    assert resident() - before < 4 << 20  # 1 MiB of the 64
    array = checkpoint.read("w")
    assert array.sum() == 0
    assert resident() - before > 32 << 20
    del array
    assert resident() - before < 4 << 20


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_only_float_tensors_can_be_read(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.tensors["d.ids"].dtype == "I64"
    with pytest.raises(UnsupportedError, match="I64"):
        checkpoint.read("d.ids")


def test_a_file_that_shrank_is_refused_not_a_bus_error(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    os.truncate(folder / "model.safetensors", 300)
    with pytest.raises(RefusedError, match="changed since"):
        checkpoint.read("b.weight")


# the cache of Hugging Face, and paths


def test_the_layout_of_the_hugging_face_cache_works(sharded: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    snapshot, blobs = repository / "snapshots" / "abc123", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, file in enumerate(sorted(sharded.iterdir())):
        file.rename(blobs / f"hash{i}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"hash{i}")
    checkpoint = Checkpoint.open(snapshot)
    np.testing.assert_array_equal(checkpoint.read("a.weight"), bits(TENSORS["a.weight"]))
    assert all(path.parent == blobs.resolve() for path in checkpoint.files)
    link = tmp_path / "link"
    link.symlink_to(snapshot)
    assert Checkpoint.open(link).tensors == checkpoint.tensors


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "/etc/passwd",
        "..",
        "",
        "C:model.safetensors",
        "\\\\host\\x.safetensors",
        "sub/x.safetensors",
        "x\0.safetensors",
        "x\n.safetensors",
        "x" * 300 + ".safetensors",
        "model.bin",
        "\ud800.safetensors",
        7,
        None,
        ["model-1.safetensors"],
    ],
)
def test_an_index_with_a_bad_shard_name_is_refused(sharded: Path, name: Any) -> None:
    write_index(sharded, {"a.weight": name})
    refused(sharded, "a shard must be a plain name")


def test_a_symlink_out_of_the_folder_is_refused(sharded: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.safetensors"
    (sharded / "model-1.safetensors").rename(outside)
    (sharded / "model-1.safetensors").symlink_to(outside)
    refused(sharded, "leads out of the checkpoint")
    other = tmp_path / "blobs"  # beside no snapshots folder it is no cache
    other.mkdir()
    outside.rename(other / "hash")
    (sharded / "model-1.safetensors").unlink()
    (sharded / "model-1.safetensors").symlink_to(other / "hash")
    refused(sharded, "leads out of the checkpoint")


def test_loops_folders_and_pipes_are_no_weight_files(sharded: Path) -> None:
    shard = sharded / "model-1.safetensors"
    shard.unlink()
    shard.symlink_to(shard.name)
    refused(sharded, "model-1.safetensors")
    shard.unlink()
    shard.mkdir()
    refused(sharded, "not a regular file")
    shard.rmdir()
    os.mkfifo(shard)
    refused(sharded, "not a regular file")


def test_contained_follows_a_link_inside_the_folder(folder: Path) -> None:
    (folder / "link.safetensors").symlink_to("model.safetensors")
    assert contained(folder, "link.safetensors") == (folder / "model.safetensors").resolve()
    assert contained(folder, "absent.json") is None


# shards


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "model-2.safetensors").unlink()
    refused(sharded, r"lacks the shard model-2\.safetensors")


def test_an_index_and_shards_that_disagree_are_refused(sharded: Path) -> None:
    index = {"a.weight": "model-1.safetensors", "b.weight": "model-1.safetensors"}
    write_index(sharded, {**index, "x": "model-2.safetensors", "c.bias": "model-2.safetensors"})
    refused(sharded, r"tensor 'x' is named by the index but not in model-2")
    write_index(sharded, {"a.weight": "model-1.safetensors", "c.bias": "model-2.safetensors"})
    refused(sharded, r"tensor 'b\.weight' is not named by the index but in model-1")
    save_file({"a.weight": TENSORS["a.weight"]}, sharded / "model-2.safetensors")
    write_index(sharded, {**index, "a.weight": "model-2.safetensors"})
    refused(sharded, r"tensor 'a\.weight' is")
    write_index(sharded, {})
    refused(sharded, "no weight_map")
    write_index(sharded, ["model-1.safetensors"])
    refused(sharded, "no weight_map")


def test_a_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    both = {name: TENSORS[name] for name in ("a.weight", "c.bias")}
    save_file(both, sharded / "model-2.safetensors")
    refused(sharded, r"tensor 'a\.weight' is not named by the index but in model-2")
    path = sharded / "model.safetensors.index.json"  # json would keep one key: written by hand
    path.write_text('{"weight_map": {"a.weight": "model-1.safetensors", "a.weight": "x"}}')
    refused(sharded, "the key 'a.weight' is there twice")


def test_the_single_file_wins_over_an_index(folder: Path) -> None:
    write_index(folder, {"a.weight": "absent.safetensors"})
    assert "index.json ignored" in " ".join(Checkpoint.open(folder).notes)


# code and pickles


class Canary:
    """Unpickling it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt", ".pkl", ".npz"])
def test_pickled_weights_are_refused_unopened(tmp_path: Path, suffix: str) -> None:
    folder, canary = write_config(tmp_path / "m"), tmp_path / "canary"
    (folder / f"pytorch_model{suffix}").write_bytes(pickle.dumps(Canary(canary)))
    refused(folder, "only pickled weights .* safetensors")
    save_file(TENSORS, folder / "model.safetensors")
    assert f"pytorch_model{suffix} ignored" in " ".join(Checkpoint.open(folder).notes)
    assert not canary.exists()


def test_code_of_a_model_is_ignored_and_reported(folder: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    code = f"import os; os.mkdir({str(canary)!r})\nclass Model: pass\n"
    (folder / "modeling_x.py").write_text(code)
    write_config(
        folder,
        auto_map={"AutoModelForCausalLM": "modeling_x.Model"},
        trust_remote_code=True,
        _attn_implementation_internal="org/kernel",
        _attn_implementation="modeling_x:run",
        custom_pipelines={"x": {"impl": "modeling_x.Model"}},
        text_config={"auto_map": {"AutoConfig": "modeling_x.Model"}, "keep": [{"auto_map": 1}]},
    )
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.config == {"model_type": "llama", "text_config": {"keep": [{}]}}
    notes = "\n".join(checkpoint.notes)
    keys = ("auto_map", "trust_remote_code", "_attn_implementation_internal", "custom_pipelines")
    assert all(f"'{key}' ignored" in notes for key in keys)
    assert "modeling_x.py ignored" in notes
    assert not canary.exists()


def test_quantized_checkpoints_are_unsupported(folder: Path) -> None:
    write_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UnsupportedError, match=r"already quantized .*use the unquantized"):
        Checkpoint.open(folder)
    write_config(folder)
    save_file({"x.qweight": torch.zeros(2, dtype=torch.int32)}, folder / "model.safetensors")
    with pytest.raises(UnsupportedError, match=r"already quantized \(x\.qweight\)"):
        Checkpoint.open(folder)
    save_file({"x": torch.zeros(2).to(torch.float8_e4m3fn)}, folder / "model.safetensors")
    with pytest.raises(UnsupportedError, match="F8_E4M3"):
        Checkpoint.open(folder)


# config.json


def test_folders_that_are_none_or_incomplete_say_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a folder"):
        Checkpoint.open(tmp_path / "absent")
    refused(tmp_path, r"has no config\.json")
    refused(write_config(tmp_path / "m"), r"neither model\.safetensors nor")
    save_file(TENSORS, tmp_path / "m" / "other.safetensors")
    refused(tmp_path / "m", r"has other\.safetensors but neither")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"a": 1, "a": 2}', "the key 'a' is there twice"),
        ('{"x": {"b": 1, "b": 1}}', "the key 'b' is there twice"),
        ('{"a": NaN}', "the number NaN"),
        ('{"a": -Infinity}', "the number -Infinity"),
        ('{"a": 1', "not sound JSON"),
        ("[1]", "holds a list"),
        ("\xff\xfe", "not sound JSON"),
        ('{"a":' + "[" * 100_000 + "]" * 100_000 + "}", "not sound JSON"),
        ('{"a":' + "[" * 100 + "]" * 100 + "}", "nested too deeply"),
        ('{"a": ' + "9" * 10_000 + "}", "not sound JSON"),
    ],
)
def test_a_config_that_is_no_sound_json_is_refused(folder: Path, text: str, why: str) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    refused(folder, why)


# headers of safetensors


def file_with(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8), **more: Any) -> Any:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


SOUND = {"x": entry()}
BAD_HEADERS = {
    "longer than the file": (SOUND, 8, 2**20, "must fit the file"),
    "2**63 long": (SOUND, 8, 2**63, "must fit the file"),
    "all ones": (SOUND, 8, 2**64 - 1, "must fit the file"),
    "one byte": (SOUND, 8, 1, "must fit the file"),
    "no object": (b"[1, 2]  ", 0, None, "no JSON object"),
    "not UTF-8": (b'{"\xff\xff": 1}', 0, None, "not sound JSON"),
    "not JSON": (b"{nonsense  ", 0, None, "not sound JSON"),
    "nested": (b'{"a":' + b"[" * 99_999, 0, None, "not sound JSON"),
    "duplicate name": (
        b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        b'"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        8,
        None,
        "the key 'x' is there twice",
    ),
    "duplicate field": (
        b'{"x":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        8,
        None,
        "the key 'dtype' is there twice",
    ),
    "metadata no table": ({"__metadata__": 1, **SOUND}, 8, None, "__metadata__"),
    "metadata of numbers": ({"__metadata__": {"a": 1}, **SOUND}, 8, None, "__metadata__"),
    "entry no table": ({"x": [1]}, 8, None, "must have exactly"),
    "missing field": ({"x": {"dtype": "F32", "shape": [2]}}, 8, None, "must have exactly"),
    "extra field": ({"x": entry(strides=[1])}, 8, None, "must have exactly"),
    "unknown dtype": ({"x": entry("Q4_K")}, 8, None, "has the dtype 'Q4_K'"),
    "dtype no text": ({"x": entry(["F32"])}, 8, None, "has the dtype"),
    "negative extent": ({"x": entry(shape=(-2,))}, 8, None, "has the shape"),
    "extent a float": ({"x": entry(shape=(2.0,))}, 8, None, "has the shape"),
    "extent a bool": ({"x": entry(shape=(True, 2))}, 8, None, "has the shape"),
    "extent 2**64": ({"x": entry(shape=(2**64,))}, 8, None, "has the shape"),
    "product 2**64": ({"x": entry(shape=(2**32, 2**32))}, 8, None, "needs 73786976294838206464"),
    "many extents": ({"x": entry(shape=(1,) * 999)}, 8, None, "has the shape"),
    "wrong length": ({"x": entry(offsets=(0, 4))}, 4, None, "has 4 bytes; F32"),
    "one offset": ({"x": entry(offsets=(0,))}, 8, None, "has the data_offsets"),
    "end before begin": ({"x": entry(offsets=(8, 0))}, 8, None, "has -8 bytes"),
    "negative offset": ({"x": entry(offsets=(-8, 0))}, 8, None, "has the data_offsets"),
    "overlap": ({"x": entry(), "y": entry(offsets=(4, 12))}, 12, None, "overlaps"),
    "same place": ({"x": entry(), "y": entry()}, 8, None, "overlaps"),
    "hole": ({"x": entry(), "y": entry(offsets=(12, 20))}, 20, None, "leaves a hole"),
    "hole at the start": ({"x": entry(offsets=(8, 16))}, 16, None, "leaves a hole"),
    "data cut": (SOUND, 7, None, "its tensors end at"),
    "data after": (SOUND, 9, None, "its tensors end at"),
    "empty name": ({"": entry()}, 8, None, "needs a printable name"),
    "control name": ({"a\nb": entry()}, 8, None, "needs a printable name"),
    "surrogate name": (b'{"\\ud800":{"dtype":"F32"}}', 8, None, "needs a printable name"),
    "long name": ({"a" * 999: entry()}, 8, None, "needs a printable name"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_a_crafted_header_is_refused(tmp_path: Path, case: str) -> None:
    header, n_data, length, why = BAD_HEADERS[case]
    path = file_with(tmp_path / "model.safetensors", header, bytes(n_data), length)
    with pytest.raises(RefusedError, match=why) as caught:
        read_header(path)
    assert len(str(caught.value)) < 700
    assert "\n" not in str(caught.value)


def test_a_header_beyond_100_mb_is_refused_unread(tmp_path: Path) -> None:
    path = file_with(tmp_path / "x.safetensors", b"{", length=MAX_HEADER_BYTES + 1)
    os.truncate(path, MAX_HEADER_BYTES + 100)  # sparse: costs no disk
    with pytest.raises(RefusedError, match="must fit the file"):
        read_header(path)


def test_every_truncation_of_a_sound_file_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    assert read_header(path)
    for n in reversed(range(len(data))):
        os.truncate(path, n)
        with pytest.raises(RefusedError):
            read_header(path)


def test_no_mutation_of_a_header_gives_anything_but_refusal_or_sense(folder: Path) -> None:
    """3,000 seeded mutations; what is accepted lies inside the file, tensor behind tensor."""
    rng = random.Random(7)
    path = folder / "model.safetensors"
    sound = path.read_bytes()
    n_head = 8 + int.from_bytes(sound[:8], "little")
    accepted = 0
    for _ in range(3000):
        data = bytearray(sound)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(n_head)
            match rng.randrange(4):
                case 0:
                    data[at] ^= 1 << rng.randrange(8)
                case 1:
                    data[at] = rng.choice(b'0123456789"{}[],:-eE.')
                case 2:
                    del data[at : at + rng.randint(1, 5)]
                case 3:
                    data[at:at] = rng.choice([b"9" * 20, b'"x":', b"[[", b"null", b"-1", b"1e999"])
        path.unlink()  # writing over it would wait for the disk
        path.write_bytes(data)
        try:
            refs = list(read_header(path).values())
        except RefusedError:
            continue
        accepted += 1
        assert all(one.stop == two.start for one, two in itertools.pairwise(refs))
        assert refs[-1].stop == len(data)
    assert 0 < accepted < 1500  # letters of a name may change, and some did
