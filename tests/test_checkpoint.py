"""The checkpoint reader against the safetensors library, and against folders made to harm."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from edgekit.checkpoint import Checkpoint, contained
from edgekit.errors import RefusedError, UnsupportedError, UsageError

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
