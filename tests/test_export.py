"""One artifact for both runtimes, and the ONNX part added later from the artifact's own weights."""

import hashlib
import io
import json
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from converted import tiny, unmeasured

import edgekit
from edgekit.catalog import read_manifest
from edgekit.cli import main
from edgekit.convert import convert
from edgekit.llama import Sampling
from edgekit.progress import Silent
from edgekit.pruning.prune import Options as Pruning
from edgekit.pruning.prune import prune
from edgekit.publish import write_manifest
from edgekit.samples import CALIBRATION_TEXT
from edgekit.tokenizer_archive import MAX_BYTES, NAME

TIERS = ("Q4_K", "source")
FORMATS = {"both": ("gguf", "onnx"), "gguf": ("gguf",), "onnx": ("onnx",)}


@pytest.fixture(scope="module", params=["llama", "qwen2_moe"])
def made(request, tmp_path_factory):
    """A checkpoint and its artifacts in every choice of formats."""
    folder = tmp_path_factory.mktemp(request.param)
    options = {"dtype": "bfloat16", "width": "wide"}
    checkpoint = tiny(folder / "checkpoint", request.param, **options)
    for name, formats in FORMATS.items():
        chosen = unmeasured(TIERS, statistics=False, formats=formats)
        convert(checkpoint, folder / name, chosen, Silent())
    return folder


def json_of(*words: str) -> dict:
    result = CliRunner().invoke(main, [*words, "--json"])
    assert result.exit_code == 0, (result.stderr, result.exception)
    return json.loads(result.stdout)


def json_of_verify(artifact: Path) -> dict:
    return json.loads(CliRunner().invoke(main, ["verify", str(artifact), "--json"]).stdout)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("has_archive", [True, False])
def test_what_is_added_later_is_what_convert_writes(made, tmp_path, has_archive):
    """From the artifact alone, bit for bit; without its archive a folder gives the tokenizer."""
    artifact = Path(shutil.copytree(made / "gguf", tmp_path / "artifact"))
    words = ["export", str(artifact), "--format", "onnx"]
    if not has_archive:
        (artifact / NAME).unlink()
        assert json_of("verify", str(artifact))["ok"]
        lacking = CliRunner().invoke(main, words)
        assert lacking.exit_code == 2 and "--checkpoint FOLDER" in lacking.stderr
        bare = Path(shutil.copytree(made / "checkpoint", tmp_path / "checkpoint"))
        (bare / "model.safetensors").unlink()
        words += ["--checkpoint", str(bare)]
    body = json_of(*words)
    assert body["bytes"] == sum(map(len, files(artifact / "onnx").values()))
    assert files(artifact / "onnx") == files(made / "onnx/onnx") == files(made / "both/onnx")
    assert json_of("verify", str(artifact))["ok"]
    again = CliRunner().invoke(main, words)
    assert again.exit_code == 2 and "replace it with --force" in again.stderr
    assert json_of(*words, "--force")["depths"] == body["depths"]


def hostile(kind: str, whole: bytes) -> bytes:
    """Archives that must not be unpacked."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        name = {"outside": "../tokenizer.json", "other": "config.json"}.get(kind, "tokenizer.json")
        archive.writestr(name, b"{}" if kind != "bomb" else bytes(MAX_BYTES + 1))
        if kind == "twice":
            with pytest.warns(UserWarning, match="Duplicate"):
                archive.writestr(name, b"[]")
    return {"changed": whole[:-1] + b"x", "cut": whole[:99]}.get(kind, out.getvalue())


@pytest.mark.parametrize("kind", ["outside", "other", "twice", "bomb", "cut", "changed"])
def test_a_tokenizer_archive_that_lies_is_refused(made, tmp_path, kind):
    """Also with the hash that the manifest tells, as its author can make it."""
    artifact = Path(shutil.copytree(made / "gguf", tmp_path / "artifact"))
    data = hostile(kind, (artifact / NAME).read_bytes())
    (artifact / NAME).write_bytes(data)
    if kind != "changed":
        manifest = read_manifest(artifact)
        told = {"file": NAME, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        write_manifest(artifact, replace(manifest, source=manifest.source | {"tokenizer": told}))
    done = CliRunner().invoke(main, ["export", str(artifact), "--format", "onnx"])
    assert done.exit_code == 5 and len(done.stderr.splitlines()) == 1, done.stderr
    assert not (artifact / "onnx").exists() and not json_of_verify(artifact)["ok"]


def test_a_config_of_another_model_in_the_manifest_is_refused(made, tmp_path):
    artifact = Path(shutil.copytree(made / "gguf", tmp_path / "artifact"))
    manifest = read_manifest(artifact)
    config = manifest.source["config"] | {"num_hidden_layers": 5}
    write_manifest(artifact, replace(manifest, source=manifest.source | {"config": config}))
    done = CliRunner().invoke(main, ["export", str(artifact), "--format", "onnx"])
    assert done.exit_code == 5 and len(done.stderr.splitlines()) == 1, done.stderr
    assert sorted(files(artifact)) == sorted(files(made / "gguf"))


def test_another_model_s_config_is_refused(made, tmp_path):
    artifact = Path(shutil.copytree(made / "gguf", tmp_path / "artifact"))
    other = Path(shutil.copytree(made / "checkpoint", tmp_path / "checkpoint"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rope_theta": 12345.0}))
    result = CliRunner().invoke(
        main, ["export", str(artifact), "--format", "onnx", "--checkpoint", str(other)]
    )
    assert result.exit_code == 5 and "is not the one that" in result.stderr
    assert not (artifact / "onnx").exists()


def test_both_runtimes_run_from_one_folder(made, tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path))
    greedy = Sampling(temperature=0.0, ignore_eos=True)
    for runtime in ("llama", "onnx"):
        with edgekit.load(
            made / "both", 1 << 33, 64, n_threads=1, follow=False, runtime=runtime
        ) as session:
            generation = session.generate("a b", 3, greedy)
            assert "".join(generation) and len(generation.ids) == 3


def test_inspect_and_the_report_tell_of_both(made):
    body = json_of("inspect", str(made / "both"))
    assert [row["depth"] for row in body["onnx"]["depths"]] == [2, 4, 8]
    assert body["tiers"] == list(TIERS) and body["levels"]
    bare = json_of("inspect", str(made / "onnx"))
    assert bare["tiers"] == [] and bare["n_parameters"] > 1e5
    card = (made / "both/README.md").read_text()
    assert "For ONNX Runtime" in card and "What a budget buys" in card


def test_a_dry_run_tells_the_bytes_of_both_formats(made, tmp_path):
    found = {}
    for name, formats in FORMATS.items():
        words = ("convert", str(made / "checkpoint"), "-o", str(tmp_path / "x"), "--dry-run")
        words += ("--format", ",".join(formats), "--no-calibration")
        words += ("--tiers", ",".join(TIERS)) if "gguf" in formats else ()
        words += ("--block-size", "32") if "onnx" in formats else ()
        body = json_of(*words)
        found[name] = body["artifact_bytes"]
    assert found["both"] == found["gguf"] + found["onnx"]
    weights = sum(row["bytes"] for row in json_of("inspect", str(made / "onnx"))["onnx"]["depths"])
    assert weights / 3 < found["onnx"] < weights


def test_a_pruned_checkpoint_becomes_an_onnx_artifact(made, tmp_path):
    """File for file what the pruned checkpoint gives when it is converted by itself."""
    text = tmp_path / "text"
    text.write_bytes(CALIBRATION_TEXT.read_bytes()[: 1 << 12])
    prune(made / "checkpoint", tmp_path / "pruned", Pruning(0.2, calibration=text), Silent())
    options = unmeasured(TIERS, statistics=False, formats=("onnx",), calibration=text)
    convert(tmp_path / "pruned", tmp_path / "alone", options, Silent())
    convert(made / "checkpoint", tmp_path / "a", replace(options, prune=0.2), Silent())
    assert files(tmp_path / "a/onnx") == files(tmp_path / "alone/onnx")
    n, whole = (json_of("inspect", str(f))["n_parameters"] for f in (tmp_path / "a", made / "onnx"))
    assert 0.5 < n / whole < 0.85
    with edgekit.load(tmp_path / "a", 1 << 33, 64, n_threads=1, runtime="onnx") as session:
        assert len(list(session.generate("a b", 3, Sampling(temperature=0.0)))) > 0
    assert {path.name for path in tmp_path.iterdir()} == {"a", "alone", "pruned", "text"}


def test_another_device_than_the_cpu_is_refused(made):
    words = ["eval", str(made / "onnx"), "--runtime", "onnx", "--text", __file__]
    result = CliRunner().invoke(main, [*words, "--device", "cuda"])
    assert result.exit_code == 2 and "runs on the CPU here, not on cuda" in result.stderr


def test_an_unknown_format_is_a_wrong_use(made, tmp_path):
    result = CliRunner().invoke(
        main, ["convert", str(made / "checkpoint"), "-o", str(tmp_path / "x"), "--format", "onxn"]
    )
    assert result.exit_code == 2 and "did you mean 'onnx'?" in result.stderr


def test_what_is_pulled_is_for_llama_cpp_and_the_rest_counts_as_not_here(made, tmp_path):
    pulled = tmp_path / "pulled"
    words = ("--budget", "1GiB", "--context", "64")
    json_of("pull", (made / "both").as_uri(), "-o", str(pulled), *words)
    body = json_of("verify", str(pulled))
    whole = json_of("verify", str(made / "both"))
    n_files = len(files(made / "both/onnx"))
    assert body["ok"] and body["missing"] == n_files
    assert body["checked"] == whole["checked"] - n_files
    runner = CliRunner()
    done = runner.invoke(main, ["plan", str(pulled), "--runtime", "onnx", *words])
    assert done.exit_code == 0
    for option in (["--kv-type", "q8_0"], ["--expert-cache", "4"]):
        done = runner.invoke(main, ["plan", str(pulled), "--runtime", "onnx", *option])
        assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert "ONNX Runtime has no such choice" in done.stderr
    done = runner.invoke(main, ["eval", str(pulled), "--runtime", "onnx", "--text", __file__])
    assert done.exit_code == 5 and "pulled/onnx is not here; copy it from" in done.stderr
    done = runner.invoke(
        main, ["pull", (made / "onnx").as_uri(), "-o", str(tmp_path / "x"), *words]
    )
    assert done.exit_code == 2 and "is for ONNX Runtime alone" in done.stderr
    assert not (tmp_path / "x").exists()
