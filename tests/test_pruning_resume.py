"""A pruning that was stopped goes on with ``--resume`` and ends as if nothing had been."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from converted import tiny

import edgekit.pruning.prune as module
from edgekit.errors import UsageError
from edgekit.pruning.prune import Options, prune

N_KILLS = 3
ASKED: dict[str, Any] = {"ratio": 0.22, "tokens": 2048, "n_removed": 0}
COMMAND = ["prune", "../tiny", "-o", "out", "--ratio", "0.22", "--tokens", "2048", "--layers", "0"]
TIMES = ("seconds", "layer_seconds")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("c") / "tiny", "llama", width="wide")


@pytest.fixture(scope="module")
def whole(checkpoint: Path) -> Path:
    """What an undisturbed pruning makes."""
    output = checkpoint.parent / "whole"
    prune(checkpoint, output, Options(**ASKED))
    return output


def contents(folder: Path) -> dict[str, object]:
    """Every file; what tells times or the command without them."""
    found: dict[str, object] = {p.name: p.read_bytes() for p in folder.iterdir()}
    body = json.loads((folder / "pruning.json").read_text())
    told = {k: v for k, v in body.items() if k not in (*TIMES, "path", "command")}
    return found | {"pruning.json": told, "README.md": None}


def test_a_stopped_pruning_does_no_layer_again(
    checkpoint: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries, seen = module.layer_entries, list[int]()

    def dies(layer: Any, mapping: Any, source: int, target: int) -> Any:
        seen.append(target)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return entries(layer, mapping, source, target)

    monkeypatch.setattr(module, "layer_entries", dies)
    with pytest.raises(KeyboardInterrupt):
        prune(checkpoint, tmp_path / "out", Options(**ASKED))
    assert not (tmp_path / "out").exists()
    prune(checkpoint, tmp_path / "out", Options(**ASKED, resume=True))
    assert seen == [0, 1, 1]
    assert contents(tmp_path / "out") == contents(whole)
    assert not list(tmp_path.glob(".*"))


def test_another_pruning_is_not_resumed_where_one_is_complete(
    checkpoint: Path, whole: Path
) -> None:
    assert prune(checkpoint, whole, Options(**ASKED, resume=True)).path
    for other in ({"ratio": 0.4}, {"metric": "flap"}, {"tunes": False}):
        with pytest.raises(UsageError, match="other options"):
            prune(checkpoint, whole, Options(**(ASKED | other), resume=True))


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_bytes(
    run: Callable[..., dict[str, Any]], checkpoint: Path, whole: Path
) -> None:
    folders = [checkpoint.parent / name for name in ("first", *map(str, range(N_KILLS)))]
    for folder in folders:
        folder.mkdir()
    undisturbed = run(folders[0], *COMMAND)
    assert undisturbed["code"] == 0, undisturbed["stderr"]
    assert contents(folders[0] / "out") == contents(whole)
    killed = 0
    for moment, folder in enumerate(folders[1:]):
        share = (moment + random.Random(moment).random()) / N_KILLS
        code = run(folder, *COMMAND, kill_after=share * undisturbed["seconds"])["code"]
        assert code == -9 or contents(folder / "out") == contents(whole)
        killed += code == -9
        assert run(folder, *COMMAND, "--resume")["code"] == 0
        assert contents(folder / "out") == contents(whole)
        assert [path.name for path in folder.iterdir()] == ["out"]
    assert killed >= N_KILLS // 2
