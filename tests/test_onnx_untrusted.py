"""Hostile and damaged ONNX parts are refused, with one line and exit code 5."""

import dataclasses
import json
import shutil
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner
from onnx_models import checkpoint_of, onnx_artifact

from edgekit.catalog import read_manifest
from edgekit.cli import main
from edgekit.manifest import self_hash
from edgekit.onnx.artifact import open_onnx
from edgekit.publish import write_manifest
from edgekit.stack import FileRecord


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    return onnx_artifact(checkpoint_of("llama", folder / "checkpoint"), folder / "artifact")


@pytest.fixture
def artifact(made, tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path / "cache"))
    return Path(shutil.copytree(made, tmp_path / "artifact"))


def refused(artifact: Path, words: str = "") -> None:
    """By every command that reads the files, in one line."""
    commands = (
        ["verify", str(artifact)],
        ["run", str(artifact), "-p", "a", "-n", "1", "--budget", "1GiB"],
        ["materialize", str(artifact), "--format", "onnx", "--depth", "8", "-o",
         str(artifact.parent / "out")],
    )  # fmt: skip
    for command in commands:
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 5, (command, result.stderr, result.exception)
        assert result.stderr.count("\n") == 1 and words in result.stderr, result.stderr
    assert not (artifact.parent / "out").exists()


def rewritten(artifact: Path, name: str, data: bytes) -> None:
    """Replace a file and let the manifest vouch for it, as an attacker would."""
    import hashlib

    (artifact / "onnx" / name).write_bytes(data)
    manifest = read_manifest(artifact)
    record = FileRecord(name, len(data), hashlib.sha256(data).hexdigest())
    files = (*(r for r in manifest.onnx.files if r.name != name), record)
    part = dataclasses.replace(manifest.onnx, files=files)
    write_manifest(artifact, dataclasses.replace(manifest, onnx=part))


def with_manifest(artifact: Path, change) -> None:
    """Change the manifest's JSON and make its own hash agree again."""
    path = artifact / "edgekit.json"
    body = json.loads(path.read_bytes())
    change(body["onnx"])
    body["sha256"] = self_hash(body)
    path.write_text(json.dumps(body))


@pytest.mark.parametrize("location", ["../../etc/passwd", "/etc/passwd", "config.json", "x", ""])
def test_a_location_that_leads_elsewhere(artifact, location):
    model = onnx.load(artifact / "onnx/model_d4.onnx", load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.external_data)
    next(e for e in tensor.external_data if e.key == "location").value = location
    rewritten(artifact, "model_d4.onnx", model.SerializeToString())
    refused(artifact, "no data file of the artifact")


@pytest.mark.parametrize(("key", "value"), [("length", str(1 << 50)), ("offset", "-5"),
                                            ("offset", "x"), ("length", "")])  # fmt: skip
def test_a_place_outside_of_its_file(artifact, key, value):
    model = onnx.load(artifact / "onnx/model_d2.onnx", load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.external_data)
    next(e for e in tensor.external_data if e.key == key).value = value
    rewritten(artifact, "model_d2.onnx", model.SerializeToString())
    refused(artifact)


def test_a_graph_within_a_graph(artifact):
    model = onnx.load(artifact / "onnx/model_d2.onnx", load_external_data=False)
    inner = onnx.helper.make_graph([], "inner", [], [])
    model.graph.node.append(
        onnx.helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner)
    )
    rewritten(artifact, "model_d2.onnx", model.SerializeToString())
    refused(artifact, "graphs within its graph")


def with_attribute(artifact: Path, **attributes: object) -> None:
    """A node more in the graph of depth 2."""
    model = onnx.load(artifact / "onnx/model_d2.onnx", load_external_data=False)
    model.graph.node.append(onnx.helper.make_node("Strange", [], ["y"], **attributes))
    rewritten(artifact, "model_d2.onnx", model.SerializeToString())


def test_graphs_within_a_graph(artifact):
    with_attribute(artifact, many=[onnx.helper.make_graph([], "inner", [], [])])
    refused(artifact, "graphs within its graph")


def elsewhere() -> onnx.TensorProto:
    tensor = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[1])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    return tensor


def test_a_constant_that_lies_elsewhere(artifact):
    with_attribute(artifact, value=elsewhere())
    refused(artifact, "no data file of the artifact")


def test_sparse_weights(artifact):
    with_attribute(artifact, value=onnx.SparseTensorProto(values=elsewhere(), dims=[1]))
    refused(artifact, "sparse weights")


def test_a_file_that_is_no_graph(artifact):
    rewritten(artifact, "model_d8.onnx", b"\xff" * 100)
    refused(artifact, "no ONNX graph")


@pytest.mark.parametrize("name", ["depth2.bin", "depth8.bin", "model_d4.onnx", "config.json"])
def test_a_link_out_of_the_artifact(artifact, name):
    """Although what it leads to has the right bytes."""
    path = artifact / "onnx" / name
    path.rename(artifact.parent / name)
    path.symlink_to(artifact.parent / name)
    refused(artifact, "leads out")


def test_a_folder_that_is_a_link_out(artifact):
    (artifact / "onnx").rename(artifact.parent / "elsewhere")
    (artifact / "onnx").symlink_to(artifact.parent / "elsewhere")
    result = CliRunner().invoke(main, ["verify", str(artifact)])
    assert result.exit_code == 5 and "no folder of the artifact" in result.stderr


@pytest.mark.parametrize("name", ["depth2.bin", "depth4.bin", "depth8.bin"])
def test_a_data_file_that_ends_early(artifact, name):
    path = artifact / "onnx" / name
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)
    refused(artifact, "the manifest says")


@pytest.mark.parametrize("name", ["depth2.bin", "depth4.bin", "depth8.bin", "tokenizer.json"])
def test_a_flipped_byte(artifact, name):
    path = artifact / "onnx" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)
    refused(artifact, "is corrupt")


def test_a_file_that_is_missing(artifact):
    (artifact / "onnx/depth2.bin").unlink()
    refused(artifact, "lacks depth2.bin")


def test_files_of_deeper_depths_may_be_missing(artifact):
    for name in ("depth8.bin", "model_d8.onnx"):
        (artifact / "onnx" / name).unlink()
    open_onnx(artifact, 4)
    command = ["materialize", str(artifact), "--format", "onnx", "--depth", "4"]
    result = CliRunner().invoke(main, [*command, "-o", str(artifact.parent / "out")])
    assert result.exit_code == 0, result.stderr
    command = ["run", str(artifact), "-p", "a", "-n", "1", "--budget", "1GiB", "--json"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["plan"]["depth"] == 4
    result = CliRunner().invoke(main, ["plan", str(artifact), "--budget", "1GiB", "--json"])
    assert json.loads(result.stdout)["depth"] == 4
    result = CliRunner().invoke(main, ["verify", str(artifact), "--json"])
    assert result.exit_code == 0 and json.loads(result.stdout)["missing"] == 2
    (artifact / "onnx/depth4.bin").write_bytes(b"")
    assert CliRunner().invoke(main, ["verify", str(artifact)]).exit_code == 5


VOUCHED = {  # content that a hostile manifest vouches for
    "a config that is a list": ("config.json", "[]"),
    "a config that is no JSON": ("config.json", "{"),
    "another model's config": ("config.json", {"num_hidden_layers": 1}),
    "a config with more context": ("config.json", {"max_position_embeddings": 4096}),
    "ends that are no tokens": ("generation_config.json", {"eos_token_id": "</s>"}),
    "a tokenizer config that is a list": ("tokenizer_config.json", "[]"),
    "a tokenizer that is none": ("tokenizer.json", "{}"),
    "a template that is no text": ("chat_template.jinja", b"\xff\xfe"),
}


@pytest.mark.parametrize(("name", "content"), VOUCHED.values(), ids=VOUCHED.keys())
def test_a_file_whose_content_is_hostile(artifact, name, content):
    """`verify` finds every byte as the manifest says; `run` refuses."""
    if isinstance(content, dict):
        path = artifact / "onnx" / name
        content = json.dumps((json.loads(path.read_text()) if path.exists() else {}) | content)
    rewritten(artifact, name, content if isinstance(content, bytes) else content.encode())
    command = ["run", str(artifact), "-p", "a", "-n", "1", "--budget", "1GiB"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 5, (result.stderr, result.exception)
    assert result.stderr.count("\n") == 1 and name in result.stderr, result.stderr


def test_a_template_that_is_a_link_out(artifact):
    """Although the manifest tells of no such file."""
    (artifact.parent / "secret").write_text("secret")
    (artifact / "onnx/chat_template.jinja").symlink_to(artifact.parent / "secret")
    command = ["run", str(artifact), "-p", "a", "-n", "1", "--budget", "1GiB"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 5 and "leads out" in result.stderr, result.stderr


STRANGE = {
    "a tensor less": lambda o: o["arrays"].pop(),
    "a matrix less": lambda o: o["matrices"].pop(1),
    "a matrix of three dimensions": lambda o: o["matrices"][0].update(
        shape=[1, *o["matrices"][0]["shape"]]
    ),
    "more layers": lambda o: o["facts"].update(n_layers=5),
    "wider heads": lambda o: o["facts"].update(head=16),
}


@pytest.mark.parametrize("change", STRANGE.values(), ids=STRANGE.keys())
def test_a_manifest_of_another_model(artifact, change):
    """Sound in itself, but its tensors and facts are not those of config.json."""
    with_manifest(artifact, change)
    for command in (
        ["run", str(artifact), "-p", "a", "-n", "1", "--budget", "1GiB"],
        ["materialize", str(artifact), "--format", "onnx", "--depth", "4", "-o",
         str(artifact.parent / "out")],
    ):  # fmt: skip
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 5, (command, result.stderr, result.exception)
        assert result.stderr.count("\n") == 1 and "edgekit.json" in result.stderr
    assert not (artifact.parent / "out").exists()


HOSTILE = {
    "a file name with a path": lambda o: o["files"][0].update(file="../depth2.bin"),
    "a hidden file": lambda o: o["files"][0].update(file=".depth2.bin"),
    "a file twice": lambda o: o["files"].append(dict(o["files"][0])),
    "a matrix outside": lambda o: o["matrices"][0]["planes"][0]["codes"].__setitem__(1, 1 << 45),
    "a negative offset": lambda o: o["matrices"][0]["planes"][0]["codes"].__setitem__(1, -64),
    "fewer bytes": lambda o: o["matrices"][0]["planes"][0]["codes"].__setitem__(2, 1),
    "an unknown file": lambda o: o["arrays"][0]["place"].__setitem__(0, "config.json"),
    "a huge shape": lambda o: o["matrices"][0].update(shape=[1 << 39, 1 << 39]),
    "a shape of texts": lambda o: o["matrices"][0].update(shape=["a", 2]),
    "other depths": lambda o: o["matrices"][0]["planes"][0].update(depth=3),
    "an odd block": lambda o: o["matrices"][0].update(block=48),
    "a name twice": lambda o: o["matrices"][0].update(name=o["matrices"][1]["name"]),
    "no facts": lambda o: o.update(facts={}),
    "a fact that is no count": lambda o: o["facts"].update(n_layers=True),
    "a folder elsewhere": lambda o: o.update(folder=".."),
    "an error that is none": lambda o: o["depths"][0].update(error=-1.0),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_manifest_that_lies(artifact, change):
    with_manifest(artifact, change)
    refused(artifact, "edgekit.json")
