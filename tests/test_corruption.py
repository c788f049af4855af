"""Damage of any kind is refused before native code sees it."""

import json
import os
import random
import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from damage import assembled, damaged, files_of, top

from edgekit.artifact import open_artifact, verify
from edgekit.assembly import Assembly
from edgekit.cli import main
from edgekit.errors import RefusedError
from edgekit.llama.binding import capture_log
from edgekit.loader import load
from edgekit.materialize import materialize
from edgekit.plan import plan_tier
from edgekit.planner import Depths, uniform

N_CASES = 2000
N_BATCHES = 20
BUDGET = 1 << 30
READ_BYTES = 1 << 16  # at a time, as llama.cpp reads a stream


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(sound, tmp_path / "artifact"))


def changes_something_used(kind: str, old: bytes, new: bytes, manifest: Any) -> bool:
    """Whether a reader of the format would see another artifact; no code of ours is asked."""
    if kind == "manifest":
        try:
            return bool(json.loads(new) != manifest)  # white space between tokens is nothing
        except ValueError:
            return True
    if kind == "base" or len(new) >= len(old):
        return new != old
    rows = [row for row in manifest["levels"] if row["parent"]]
    places = [slice(row["offset"], row["offset"] + row["bytes"]) for row in rows]
    return any(new[place] != old[place] for place in places if place.stop <= len(new))


@pytest.mark.parametrize("batch", range(N_BATCHES))
def test_every_corruption_is_refused_before_a_changed_byte_is_used(sound, folder, batch):
    rng, paths = random.Random(batch), files_of(folder)
    manifest = json.loads(paths["manifest"].read_bytes())
    for case in range(N_CASES // N_BATCHES):
        kind = rng.choice(("base", "levels", "manifest"))
        old = paths[kind].read_bytes()
        new = damaged(rng, old, may_cut=kind != "levels")
        paths[kind].write_bytes(new)
        told = f"batch {batch}, case {case}, {kind}"
        if changes_something_used(kind, old, new, manifest):
            check_refused(folder, told)
        else:
            assert CliRunner().invoke(main, ["verify", str(folder)]).exit_code == 0, told
        check_only_sound_bytes_come_out(sound, folder, rng.randrange(6), told)
        paths[kind].write_bytes(old)


def check_refused(folder: Path, told: str) -> None:
    """The command line ends with exit code 5 and one line."""
    result = CliRunner().invoke(main, ["verify", str(folder)])
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (5, "", 1), told


def check_only_sound_bytes_come_out(sound: Path, folder: Path, depth: int, told: str) -> None:
    """What llama.cpp would be given is equal to the sound model, byte for byte, up to a refusal."""
    at = 0
    try:
        with open_artifact(folder) as artifact:
            depths = uniform(artifact.stacks, lambda s: s.tiers[min(depth, len(s.tiers) - 1)])
            whole = sound_bytes(sound, tuple(depths.tiers.items()))
            assembly = Assembly(artifact, depths)
            while block := assembly.read(at, READ_BYTES):
                assert block == whole[at : at + len(block)], told
                at += len(block)
            assert at == len(whole), told
    except RefusedError:
        pass


@lru_cache(maxsize=8)
def sound_bytes(sound: Path, tiers: tuple[tuple[str, str], ...]) -> bytes:
    return assembled(sound, Depths(dict(tiers), 0))


@pytest.mark.parametrize("kind", ["base", "levels"])
def test_a_corrupt_level_is_refused_by_materialize_and_by_loading(folder, tmp_path, kind):
    path = files_of(folder)[kind]
    data = bytearray(path.read_bytes())
    data[-len(data) // 3] ^= 1
    path.write_bytes(data)
    output = tmp_path / "out.gguf"
    with open_artifact(folder) as artifact, pytest.raises(RefusedError, match="corrupt"):
        materialize(artifact, top(artifact), output)
    assert list(tmp_path.iterdir()) == [folder]
    with pytest.raises(RefusedError, match="corrupt"), load(folder, BUDGET):
        pass


@pytest.mark.parametrize("kind", ["base", "manifest"])
def test_a_corrupt_header_or_manifest_is_refused_before_llama_cpp_starts(folder, kind):
    path = files_of(folder)[kind]
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with capture_log() as lines, pytest.raises(RefusedError), load(folder, BUDGET):
        pass
    assert lines == []


def test_a_level_that_is_not_used_may_be_corrupt(sound, folder):
    path = files_of(folder)["levels"]
    path.write_bytes(b"\xff" * path.stat().st_size)
    with open_artifact(folder) as artifact:
        depths = plan_tier(artifact, "Q2_K").depths
    assert assembled(folder, depths) == assembled(sound, depths)


def test_a_link_out_of_the_folder_is_refused_and_the_hub_s_cache_layout_works(sound, tmp_path):
    snapshot, blobs = tmp_path / "repo/snapshots/abc", tmp_path / "repo/blobs"
    for place in (snapshot, blobs):
        place.mkdir(parents=True)
    for i, path in enumerate(sorted(sound.iterdir())):
        shutil.copy(path, blobs / f"{i:040x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{i:040x}")
    with open_artifact(snapshot) as artifact:
        assert verify(artifact).ok
    levels = files_of(snapshot)["levels"]
    levels.unlink()
    levels.symlink_to("/etc/passwd")
    with pytest.raises(RefusedError, match="/etc/passwd"):
        open_artifact(snapshot)


def test_a_pipe_in_place_of_a_file_is_refused_at_once(folder):
    base = files_of(folder)["base"]
    base.unlink()
    os.mkfifo(base)
    with pytest.raises(RefusedError, match="not a regular file"):
        open_artifact(folder)
