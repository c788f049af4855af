"""A conversion killed at any moment goes on with ``--resume`` and ends as if nothing had been."""

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from bench.checkpoints import Shape, make_checkpoint

SHAPE = Shape(
    num_hidden_layers=1,
    hidden_size=64,
    intermediate_size=96,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=320,
)
N_KILLS, N_BITSTACK_KILLS = 20, 7
Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with a checkpoint and a text to calibrate on."""
    folder = tmp_path_factory.mktemp("home")
    make_checkpoint(folder / "model", SHAPE)
    (folder / "text").write_text("".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(99)))
    return folder


MEASURED = [
    *("convert", "../model", "-o", "edge", "--tiers", "Q4_0,Q8_0,source"),
    *("--jobs", "1", "--calibration", "../text"),
]
UNMEASURED = [*MEASURED, "--no-measure"]  # nine tenths of the time go into measuring
BITSTACK = [
    *("convert", "../model", "-o", "edge", "--codec", "bitstack", "--tiers", "Q4_0,B1,B2,source"),
    *("--jobs", "1", "--no-calibration", "--no-measure"),
]


def contents(folder: Path) -> dict[str, str]:
    """Hash of every file."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


@dataclass(frozen=True)
class Conversion:
    """A command, and what it makes when nothing disturbs it."""

    run: Run
    command: list[str]
    made: dict[str, str]
    seconds: float
    changes: int

    def killed(self, folder: Path, *options: str, **kill: float) -> bool:
        """Run and kill; False if it had ended. Under the final name all is whole or nothing."""
        folder.mkdir(exist_ok=True)
        answer = self.run(folder, *self.command, *options, **kill)
        assert answer["code"] in (0, -9), answer["stderr"]
        if (folder / "edge").exists():
            assert contents(folder / "edge") == self.made
        return bool(answer["code"] == -9)

    def ends_the_same(self, folder: Path) -> bool:
        """Resume; whether the artifact is the undisturbed one and nothing else is left."""
        answer = self.run(folder, *self.command, "--resume")
        assert answer["code"] == 0, answer["stderr"]
        assert [p.name for p in folder.iterdir()] == ["edge"]
        return contents(folder / "edge") == self.made


def undisturbed(run: Run, folder: Path, command: list[str]) -> Conversion:
    folder.mkdir()
    answer = run(folder, *command)
    assert answer["code"] == 0, answer["stderr"]
    made = contents(folder / "edge")
    assert len(made) == 5
    return Conversion(run, command, made, answer["seconds"], answer["changes"])


def undisturbed_twice(run: Run, folder: Path, command: list[str]) -> Conversion:
    """The second time is the one that counts: the first warms caches."""
    once = undisturbed(run, folder.with_name(f"{folder.name}-warm"), command)
    again = undisturbed(run, folder, command)
    assert again.made == once.made
    return again


@pytest.fixture(scope="module")
def unmeasured(run, home) -> Conversion:
    return undisturbed_twice(run, home / "unmeasured", UNMEASURED)


@pytest.fixture(scope="module")
def bitstack(run, home) -> Conversion:
    return undisturbed_twice(run, home / "bitstack", BITSTACK)


@pytest.fixture(scope="module")
def measured(run, home) -> Conversion:
    return undisturbed(run, home / "measured", MEASURED)


@pytest.mark.parametrize("moment", range(N_KILLS))
def test_killed_at_a_random_moment_it_ends_byte_identical(unmeasured, home, moment):
    share = (moment + random.Random(moment).random()) / N_KILLS
    unmeasured.killed(home / f"{moment}", kill_after=share * unmeasured.seconds)
    assert unmeasured.ends_the_same(home / f"{moment}")


@pytest.mark.parametrize("moment", range(N_BITSTACK_KILLS))
def test_so_does_bitstack(bitstack, home, moment):
    """Killed twice: at a random moment, then before a random change of a name on disk."""
    folder, rng = home / f"bitstack-{moment}", random.Random(moment)
    share = (moment + rng.random()) / N_BITSTACK_KILLS
    bitstack.killed(folder, kill_after=share * bitstack.seconds)
    bitstack.killed(folder, "--resume", kill_at_change=1 + rng.randrange(bitstack.changes // 3))
    assert bitstack.ends_the_same(folder)


@pytest.mark.slow
def test_killed_again_and_again_also_while_measuring_it_ends_byte_identical(measured, home):
    """Early moments first: on a machine that has become faster the late ones come too late."""
    folder, rng, n_killed = home / "chain", random.Random(0), 0
    for share in sorted(rng.uniform(0.1, 0.9) for _ in range(4)):
        n_killed += measured.killed(folder, "--resume", kill_after=share * measured.seconds)
    assert n_killed
    assert measured.ends_the_same(folder)


def test_killed_before_each_of_its_last_changes_on_disk_it_ends_byte_identical(unmeasured, home):
    last = unmeasured.changes
    for change in range(last - 9, last + 1):  # writing, the renames, the cleaning up
        folder = home / f"change-{change}"
        assert unmeasured.killed(folder, kill_at_change=change)
        assert unmeasured.ends_the_same(folder)


def test_another_conversion_is_not_resumed(run, unmeasured, home):
    folder = home / "other"
    assert unmeasured.killed(folder, kill_at_change=unmeasured.changes // 2)
    other = [word.replace("Q8_0", "Q5_0") for word in UNMEASURED]
    answer = run(folder, *other, "--resume")
    assert answer["code"] == 2
    assert "other options" in answer["stderr"]
    assert unmeasured.ends_the_same(folder)


def test_another_conversion_is_not_resumed_where_one_is_complete(run, unmeasured, home):
    folder = home / "complete"
    undisturbed(run, folder, UNMEASURED)
    answer = run(folder, *UNMEASURED, "--resume")
    assert answer["code"] == 0 and "complete; nothing to resume" in answer["stderr"]
    answer = run(folder, *[word.replace("Q8_0", "Q5_0") for word in UNMEASURED], "--resume")
    assert answer["code"] == 2 and "other options" in answer["stderr"]


def test_killed_while_it_replaces_an_artifact_the_old_or_the_new_one_comes_back(run, home):
    command = [*UNMEASURED, "--force"]
    new = undisturbed(run, home / "forced", command)
    folder = home / "replace"
    old = undisturbed(run, folder, [word.replace(",Q8_0", "") for word in UNMEASURED])
    for change in range(new.changes - 3, new.changes + 4):
        code = run(folder, *command, kill_at_change=change)["code"]
        assert code == (-9 if change <= new.changes else code)
        if (folder / "edge").exists():
            assert contents(folder / "edge") in (old.made, new.made)
    assert new.ends_the_same(folder)
