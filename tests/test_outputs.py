"""What ``--force`` may replace: what edgekit made, and nothing that is read."""

import os
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from edgekit.cli import main
from edgekit.disk import require_new_folder
from edgekit.errors import UsageError

FAST = ("--no-calibration", "--no-measure", "--tiers", "Q8_0,source")


def edgekit(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def refused(result: Result, message: str) -> None:
    assert result.exit_code == 2 and message in result.stderr, result.stderr
    assert result.stderr.count("\n") == 1


@pytest.fixture
def artifact(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "artifact"))


@pytest.mark.parametrize(
    "command", [("convert",), ("convert", "--dry-run"), ("prune", "--ratio", "0.2")]
)
def test_a_folder_of_other_things_is_not_replaced(
    command: tuple[str, ...], llama_artifact: Path, tmp_path: Path
) -> None:
    name, *options = command
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    checkpoint = llama_artifact.with_name("checkpoint")
    result = edgekit(name, checkpoint, "-o", tmp_path / "mine", "--force", *options)
    refused(result, "--force replaces what edgekit made")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_an_artifact_and_an_empty_folder_are_replaced(llama_artifact: Path, tmp_path: Path) -> None:
    checkpoint, output = llama_artifact.with_name("checkpoint"), tmp_path / "output"
    output.mkdir()
    for _ in range(2):
        assert edgekit("convert", checkpoint, "-o", output, "--force", *FAST).exit_code == 0
    assert (output / "edgekit.json").is_file()


def test_the_input_is_not_replaced(llama_artifact: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama_artifact.with_name("checkpoint"), tmp_path / "a" / "b"))
    for mark in ("edgekit.json", "pruning.json"):  # even where it looks like an output
        (folder / mark).write_text("{}")
    names = sorted(path.name for path in folder.iterdir())
    for output in (folder, folder.parent, tmp_path / "a" / ".." / "a" / "b"):
        refused(edgekit("convert", folder, "-o", output, "--force"), "which is read")
        refused(edgekit("prune", folder, "-o", output, "--force", "--ratio", "0.2"), "is read")
    assert sorted(path.name for path in folder.iterdir()) == names


def test_a_link_is_told_as_one(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(UsageError, match="link is a link; give the folder it leads to"):
        require_new_folder(tmp_path / "link", True, "edgekit.json")


@pytest.mark.parametrize("command", [("materialize", "--tier", "Q4_K"), ("profile",)])
def test_files_of_an_artifact_are_not_replaced_and_others_are(
    command: tuple[str, ...], llama_artifact: Path, tmp_path: Path
) -> None:
    artifact = Path(shutil.copytree(llama_artifact, tmp_path / "artifact"))
    assert (artifact / "tokenizer.zip").is_file()
    name, *options = command
    before = {path.name: path.read_bytes() for path in artifact.iterdir()}
    for path in artifact.iterdir():
        if path.name != "README.md":
            result = edgekit(name, artifact, "-o", path, "--force", *options)
            refused(result, "is a file of an artifact")
    assert {path.name: path.read_bytes() for path in artifact.iterdir()} == before
    (artifact / "other.html").write_text("")
    result = edgekit(name, artifact, "-o", artifact / "other.html", "--force", *options)
    assert result.exit_code == 0, result.stderr


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_what_is_no_plain_file_is_not_replaced(artifact: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", Path("/dev/null")):
        result = edgekit("materialize", artifact, "--tier", "Q4_K", "-o", place, "--force")
        refused(result, "is a folder, a link or a device")
        assert place.exists() and not place.is_file()


def test_an_artifact_that_lost_bytes_is_not_complete(llama_artifact: Path, tmp_path: Path) -> None:
    checkpoint, output = llama_artifact.with_name("checkpoint"), tmp_path / "output"
    command = ("convert", checkpoint, "-o", output, "--resume")
    assert edgekit(*command, *FAST).exit_code == 0
    assert "nothing to resume" in edgekit(*command, *FAST).stderr
    refused(edgekit(*command, *FAST[1:]), "with other options")  # calibrated
    (levels,) = output.glob("*.levels")
    os.truncate(levels, levels.stat().st_size - 1)
    result = edgekit(*command, *FAST)
    assert result.exit_code == 5 and "convert again with --force" in result.stderr


@pytest.mark.parametrize(
    ("command", "stage"),
    [
        (("convert",), "edgekit.convert._Conversion._statistics"),
        (("prune", "--ratio", "0.22"), "edgekit.pruning.prune._Pruning._stage"),
    ],
)
def test_after_ctrl_c_it_is_told_how_to_go_on(
    command: tuple[str, ...],
    stage: str,
    llama_artifact: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    name, *options = command
    monkeypatch.setattr(stage, stop)
    result = edgekit(name, llama_artifact.with_name("checkpoint"), "-o", tmp_path / "x", *options)
    assert result.exit_code == 1 and "repeat the command with --resume" in result.stderr
    assert result.stderr.rstrip().endswith("Error: stopped")
    assert (tmp_path / ".x.partial").is_dir()


def test_a_state_that_is_none_is_refused(llama_artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    command = ("run", llama_artifact, "-p", "a", "-n", "1", "--budget", "4GiB", "--state")
    refused(edgekit(*command, tmp_path), "is no plain file; give another --state")
    result = edgekit(*command, tmp_path / "empty")
    assert result.exit_code == 5 and "is no conversation with this model" in result.stderr
