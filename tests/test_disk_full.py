"""A full disk ends with exit code 4 and nothing under the final name; with room, one goes on."""

import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from bench.checkpoints import make_checkpoint
from tiny_artifact import SHAPE, UNMEASURED, make_artifact

from edgekit.artifact import open_artifact
from edgekit.convert import convert
from edgekit.errors import DiskFullError
from edgekit.materialize import materialize
from edgekit.plan import plan_tier
from edgekit.progress import Silent

SHAPE = replace(SHAPE, num_hidden_layers=3)
DISK_BYTES = 12 << 20  # a conversion of the 2.5 MiB checkpoint asks for 5.1 MiB


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> Path:
    """An undisturbed conversion, beside its checkpoint."""
    return make_artifact(tmp_path_factory.mktemp("sound"), SHAPE)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with little room."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root; file size limits are tested all the same")
    yield place
    subprocess.run(["umount", str(place)], check=True)


class Filling(Silent):
    """Fills the disk when a stage begins."""

    def __init__(self, disk: Path, stage: str, left: int) -> None:
        self.filler, self._stage, self._left = disk / "filler", stage, left

    def start(self, stage: str, total: int) -> None:
        if stage == self._stage:
            free = shutil.disk_usage(self.filler.parent).free
            self.filler.write_bytes(bytes(free - self._left))


def contents(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


@pytest.mark.parametrize(
    ("stage", "left"), [("encode", 0), ("encode", 300_000), ("write", 0), ("write", 900_000)]
)
def test_a_disk_that_fills_up_leaves_what_is_done_and_resume_ends_it(
    small_disk, artifact, stage, left
):
    checkpoint, output = artifact.with_name("checkpoint"), small_disk / "edge"
    progress, command = Filling(small_disk, stage, left), ["edgekit", "convert"]
    with pytest.raises(DiskFullError, match=r"edge: the disk is full .*make room.*--resume"):
        convert(checkpoint, output, UNMEASURED, progress, command)
    assert {p.name for p in small_disk.iterdir()} <= {".edge.partial", "filler"}
    progress.filler.unlink()
    convert(checkpoint, output, replace(UNMEASURED, resume=True), Silent(), command)
    assert [p.name for p in small_disk.iterdir()] == ["edge"]
    assert contents(output) == contents(artifact)


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(small_disk, artifact):
    (small_disk / "filler").write_bytes(bytes(DISK_BYTES - (1 << 20)))
    with pytest.raises(DiskFullError, match=r"needs about 5\.1\d MiB on the disk of .*1\.00 MiB"):
        convert(artifact.with_name("checkpoint"), small_disk / "edge", UNMEASURED, Silent())
    with open_artifact(artifact) as opened, pytest.raises(DiskFullError, match="needs about"):
        materialize(opened, plan_tier(opened, "source").depths, small_disk / "x.gguf")
    assert [p.name for p in small_disk.iterdir()] == ["filler"]


def edgekit(limit: int, *args: object) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process whose files may have at most ``limit`` bytes each."""
    return subprocess.run(
        [sys.executable, "-m", "edgekit", *map(str, args)],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def check_full(result: subprocess.CompletedProcess[str]) -> None:
    last = result.stderr.splitlines()[-1]
    assert (result.returncode, result.stdout) == (4, ""), result.stderr
    assert last.startswith("Error: ") and "the disk is full" in last and "make room" in last
    assert "Traceback" not in result.stderr


def spool_bytes(artifact: Path) -> list[int]:
    """Bytes of each tensor with all its levels, as the conversion keeps them, largest last."""
    sizes: dict[str, int] = {}
    for row in json.loads((artifact / "edgekit.json").read_bytes())["levels"]:
        sizes[row["tensor"]] = sizes.get(row["tensor"], 0) + row["bytes"]
    return sorted(sizes.values())


@pytest.mark.parametrize("stage", ["encode", "write"])
def test_convert_ends_with_exit_code_4_and_goes_on_when_there_is_room(artifact, tmp_path, stage):
    largest, whole = spool_bytes(artifact)[-1], (artifact / "checkpoint.levels").stat().st_size
    limit = largest // 2 if stage == "encode" else (largest + whole) // 2
    assert limit < (largest if stage == "encode" else whole)
    output = tmp_path / "edge"
    command = ["convert", artifact.with_name("checkpoint"), "-o", output]
    command += ["--no-calibration", "--no-measure", "--jobs", 2]
    check_full(edgekit(limit, *command))
    assert [p.name for p in tmp_path.iterdir()] == [".edge.partial"]
    result = edgekit(1 << 30, *command, "--resume")
    assert result.returncode == 0, result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["edge"]
    for kind in ("*.gguf", "*.levels"):
        (made,), (sound,) = output.glob(kind), artifact.glob(kind)
        assert made.read_bytes() == sound.read_bytes()


def test_materialize_ends_with_exit_code_4_and_leaves_nothing(artifact, tmp_path):
    command = ["materialize", artifact, "--tier", "Q8_0", "-o", tmp_path / "out.gguf"]
    check_full(edgekit(500_000, *command))
    assert list(tmp_path.iterdir()) == []
    assert edgekit(1 << 30, *command).returncode == 0


def test_a_file_that_materialize_would_replace_is_whole_after_a_full_disk(artifact, tmp_path):
    output = tmp_path / "out.gguf"
    output.write_bytes(b"before")
    check_full(edgekit(500_000, "materialize", artifact, "--tier", "Q8_0", "--force", "-o", output))
    assert output.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [output]


def test_the_fixture_checkpoint_is_what_the_sizes_above_assume(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "c", SHAPE)
    assert (checkpoint / "model.safetensors").stat().st_size == pytest.approx(2.5 * 2**20, rel=0.01)
