"""Hostile checkpoints at the command line: refused with exit code 5, or carried and never run."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench.checkpoints import SHAPES, make_checkpoint
from click.testing import CliRunner, Result

from edgekit.artifact import open_artifact, verify
from edgekit.cli import main

# GHSA-56xg-wfcc-g829, the payload of the advisory's proof of concept
PAYLOAD = (
    "{% for c in [].__class__.__base__.__subclasses__() %}{% if c.__name__=='catch_warnings' %}"
    "{{ c()._module.__builtins__['__import__']('os').system('touch CANARY') }}"
    "{% endif %}{% endfor %}"
)
CALIBRATION = "".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(99))


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("sound") / "model", SHAPES["tiny"])


@pytest.fixture
def model(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to make hostile; the working directory is beside it."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(sound, tmp_path / "model"))


def convert(checkpoint: Path, *options: str, output: str = "edge") -> Result:
    quick = ["--tiers", "Q4_K,source", "--no-measure", "--jobs", "2"]
    if "--calibration" not in options:
        quick.append("--no-calibration")
    return CliRunner().invoke(main, ["convert", str(checkpoint), "-o", output, *quick, *options])


def check_refused(result: Result, *words: str) -> None:
    """Exit code 5 and one line that says ``words``; nothing under the final name."""
    assert (result.exit_code, result.stdout) == (5, ""), (result.stderr, result.exception)
    last = result.stderr.splitlines()[-1]
    assert last.startswith("Error: ") and all(word in last for word in words), result.stderr
    assert "Traceback" not in result.stderr
    assert not Path("edge").exists()


def change(path: Path, **fields: Any) -> None:
    """Set fields of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def no_canary() -> bool:
    return not list(Path().rglob("CANARY*"))


class Canary:
    """Unpickling it leaves a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("CANARY"),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl"])
def test_pickled_weights_are_refused_unopened_and_the_next_step_is_named(model, name):
    (model / "model.safetensors").unlink()
    import pickle

    (model / name).write_bytes(pickle.dumps(Canary()))
    check_refused(convert(model), name, "pickled", "safetensors")
    assert no_canary()


@pytest.mark.parametrize(
    "shard",
    ["../secret.safetensors", "/etc/passwd", "..\\secret.safetensors", "C:\\x.safetensors", "a\0b"],
)
def test_a_shard_outside_the_folder_is_refused(model, shard):
    (model / "model.safetensors").rename(model.parent / "secret.safetensors")
    index = {"weight_map": {"model.norm.weight": shard}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    check_refused(convert(model), "plain name")


@pytest.mark.parametrize(
    "name",
    ["config.json", "tokenizer_config.json", "chat_template.jinja", "model.safetensors"],
)
def test_a_link_out_of_the_folder_is_refused(model, name):
    secret = model.parent / "secret"
    secret.write_bytes((model / name).read_bytes() if (model / name).exists() else b"secret")
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(secret)
    check_refused(convert(model), name, "leads out of the checkpoint")


def test_named_chat_templates_cannot_carry_a_file_from_elsewhere(model):
    (model.parent / "secrets").mkdir()
    (model.parent / "secrets/key.jinja").write_text("secret")
    folder = model / "additional_chat_templates"
    folder.symlink_to(model.parent / "secrets")
    check_refused(convert(model), "leads out of the checkpoint")
    folder.unlink()
    folder.mkdir()
    (folder / "key.jinja").symlink_to(model.parent / "secrets/key.jinja")
    check_refused(convert(model), "leads out of the checkpoint")


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors.index.json", "tokenizer_config.json"]
)
def test_a_key_that_is_there_twice_is_refused(model, name):
    if name == "model.safetensors.index.json":
        (model / "model.safetensors").rename(model / "model-1.safetensors")
        (model / name).write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    text = (model / name).read_text()
    (model / name).write_text('{"bos_token": "a", "bos_token": "b",' + text.lstrip()[1:])
    check_refused(convert(model), "'bos_token' is there twice")


def test_code_that_a_checkpoint_brings_is_ignored_with_a_notice_also_when_it_calibrates(model):
    (model / "modeling_x.py").write_text("open('CANARY', 'w')\nclass X: pass\n")
    auto_map = {"AutoConfig": "modeling_x.X", "AutoModelForCausalLM": "modeling_x.X"}
    change(
        model / "config.json",
        auto_map=auto_map,
        trust_remote_code=True,
        _attn_implementation_internal="someone/kernels:modeling_x.X",
        _attn_implementation="someone/kernels",
    )
    change(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["modeling_x.X", None]})
    Path("text").write_text(CALIBRATION)
    result = convert(model, "--calibration", "text")
    assert result.exit_code == 0, (result.stderr, result.exception)
    for word in ("auto_map", "_attn_implementation_internal", "trust_remote_code", "modeling_x.py"):
        assert f"'{word}' ignored" in result.stderr or f"{word} ignored" in result.stderr
    assert no_canary()
    manifest = json.loads(Path("edge/edgekit.json").read_text())
    assert manifest["statistics"]["kind"] == "imatrix"
    assert not list(Path("edge").glob("*.py"))


def test_a_hostile_chat_template_is_carried_verbatim_flagged_and_never_run(model):
    change(model / "tokenizer_config.json", chat_template=PAYLOAD)
    result = convert(model)
    assert result.exit_code == 0, (result.stderr, result.exception)
    assert "chat template" in result.stderr and "__" in result.stderr
    with open_artifact(Path("edge")) as artifact:
        assert artifact.header.get("tokenizer.chat_template") == PAYLOAD
    command = ["run", "edge", "-p", "hello", "-n", "1", "--budget", "1GiB", "--context", "64"]
    ran = CliRunner().invoke(main, command)
    assert ran.exit_code == 2
    assert "chat template" in ran.stderr and "Traceback" not in ran.stderr
    raw = CliRunner().invoke(main, [*command, "--raw"])
    assert raw.exit_code == 0, (raw.stderr, raw.exception)
    assert no_canary()


def test_the_layout_of_the_hugging_face_cache_works(sound, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    snapshot = tmp_path / "models--someone--Some-Model" / "snapshots" / "0123abcd"
    blobs = snapshot.parent.parent / "blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, path in enumerate(sorted(sound.iterdir())):
        shutil.copy(path, blobs / f"{i:064x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{i:064x}")
    result = convert(snapshot, "--json")
    assert result.exit_code == 0, (result.stderr, result.exception)
    assert json.loads(result.stdout)["source_bytes"] == (sound / "model.safetensors").stat().st_size
    names = {path.name for path in Path("edge").iterdir()}
    assert {"Some-Model-Q4_K.gguf", "Some-Model.levels"} < names
    files = json.loads(Path("edge/edgekit.json").read_text())["source"]["files"]
    assert {row["name"] for row in files} == {path.name for path in sound.iterdir()}


@pytest.mark.parametrize("target", ["elsewhere", "nowhere"])
def test_an_output_that_is_a_link_is_refused_and_what_it_points_to_stays(model, target):
    Path("elsewhere").mkdir()
    Path("elsewhere/file").write_text("mine")
    Path("edge").symlink_to(target)
    for options in ((), ("--force",)):
        result = convert(model, *options)
        assert result.exit_code == 2, (result.stderr, result.exception)
        assert Path("edge").is_symlink()
    assert [path.name for path in Path("elsewhere").iterdir()] == ["file"]
    assert not Path("nowhere").exists()


def test_materialize_writes_through_no_link(model):
    assert convert(model).exit_code == 0
    Path("mine").write_text("mine")
    Path("out.gguf").symlink_to("mine")
    command = ["materialize", "edge", "--tier", "Q4_K", "-o", "out.gguf", "--force"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 2
    assert Path("mine").read_text() == "mine"


@pytest.mark.parametrize("bits", [0x7FC0, 0x7F80, 0xFF80], ids=["nan", "inf", "-inf"])
def test_weights_that_are_no_numbers_are_refused_with_tensor_and_row(model, bits):
    path = model / "model.safetensors"
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    entry = json.loads(data[8 : 8 + length])["model.layers.1.mlp.up_proj.weight"]
    row, cols = 700, entry["shape"][1]
    at = 8 + length + entry["data_offsets"][0] + 2 * (row * cols + 3)
    data[at : at + 2] = np.uint16(bits).tobytes()
    path.write_bytes(data)
    check_refused(convert(model), "blk.1.ffn_up.weight", "in row 700;", "NaN or infinite")


@pytest.mark.parametrize("name", ["ü edge", "a'b\"c", "--x", "edge\nline", "$(touch CANARY)", "%s"])
def test_output_names_with_odd_characters_work(model, name):
    result = convert(model, output=f"./{name}")
    assert result.exit_code == 0, (result.stderr, result.exception)
    with open_artifact(Path(name)) as artifact:
        assert verify(artifact).ok
    result = CliRunner().invoke(
        main, ["materialize", f"./{name}", "--tier", "Q4_K", "-o", f"./{name}.gguf"]
    )
    assert result.exit_code == 0
    assert Path(f"{name}.gguf").is_file()
    assert no_canary()


@pytest.mark.parametrize("name", ["ü model", "..hidden", "a b", "-o"])
def test_checkpoint_names_with_odd_characters_give_plain_file_names(model, name):
    odd = model.rename(model.parent / name)
    result = convert(odd)
    assert result.exit_code == 0, (result.stderr, result.exception)
    with open_artifact(Path("edge")) as artifact:
        assert verify(artifact).ok


SPOILERS: dict[str, Callable[[Path], object]] = {
    "an architecture": lambda m: change(m / "config.json", model_type="mamba9"),
    "numbers beyond reason": lambda m: change(m / "config.json", num_hidden_layers=1 << 60),
    "a negative size": lambda m: change(m / "config.json", hidden_size=-256),
    "heads of nothing": lambda m: change(m / "config.json", num_attention_heads=0),
    "a vocabulary as text": lambda m: change(m / "config.json", vocab_size="512"),
    "no config": lambda m: (m / "config.json").unlink(),
    "a config that is a list": lambda m: (m / "config.json").write_text("[]"),
    "a config that is nested": lambda m: (m / "config.json").write_text("[" * 9999),
    "no tokenizer": lambda m: (m / "tokenizer.json").unlink(),
    "a tokenizer that is none": lambda m: (m / "tokenizer.json").write_text("{}"),
    "weights cut short": lambda m: (m / "model.safetensors").write_bytes(
        (m / "model.safetensors").read_bytes()[:-1]
    ),
    "weights that are text": lambda m: (m / "model.safetensors").write_text("weights"),
}


@pytest.mark.parametrize("spoil", SPOILERS.values(), ids=list(SPOILERS))
def test_a_spoilt_checkpoint_ends_in_one_line(model, spoil):
    spoil(model)
    check_refused(convert(model))
