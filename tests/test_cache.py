"""The cache of materialized models: whole files only, the oldest goes, the stale is made anew."""

import os
import sys
from pathlib import Path

import pytest

from edgekit import cache
from edgekit.disk import temporary_folder, try_to_lock
from edgekit.errors import EdgekitError, UsageError

HERE = Path(__file__).parent  # on disk


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


def put(n_bytes: int, *key: str) -> Path:
    path = cache.model_path(key, {"t": "Q4_K"})
    cache.make_room(n_bytes)
    path.write_bytes(bytes(n_bytes))
    cache.stamp(path)
    return path


def test_a_model_is_found_under_its_artifact_and_tiers_only() -> None:
    path = put(100, "a", "b")
    assert cache.has_model(path)
    others = [
        cache.model_path(("a", "c"), {"t": "Q4_K"}),
        cache.model_path(("a", "b"), {"t": "Q6_K"}),
        cache.model_path(("a", "b"), {"u": "Q4_K"}),
    ]
    assert len({path, *others}) == 4
    assert not any(cache.has_model(other) for other in others)
    assert cache.model_path(("a", "b"), {"t": "Q4_K"}) == path


@pytest.mark.parametrize("damage", ["bytes", "size", "stamp", "replaced"])
def test_a_file_that_is_not_as_it_was_written_is_thrown_away(damage: str) -> None:
    path = put(100, "a")
    if damage == "bytes":
        path.write_bytes(b"x" * 100)
    elif damage == "size":
        os.truncate(path, 50)
    elif damage == "stamp":
        path.with_suffix(".stamp").write_bytes(b"{")
    else:
        other = path.with_suffix(".other")
        other.write_bytes(bytes(100))
        other.replace(path)
    assert not cache.has_model(path)
    assert not path.exists() and not path.with_suffix(".stamp").exists()


def test_a_model_that_nobody_vouches_for_yet_is_left_to_the_process_that_wrote_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("EDGEKIT_CACHE_LIMIT", "700")
    old, path = put(300, "old"), cache.model_path(("a",), {"t": "Q4_K"})
    os.utime(old.with_suffix(".stamp"), (1000, 1000))
    path.write_bytes(bytes(300))
    assert not cache.has_model(path)
    cache.make_room(300)
    assert path.exists() and not old.exists()
    cache.stamp(path)
    assert cache.has_model(path)


def test_a_model_that_another_process_removed_is_not_vouched_for() -> None:
    path = put(100, "a")
    path.unlink()
    with pytest.raises(EdgekitError, match="removed from the cache by another process; load again"):
        cache.stamp(path)


def test_the_one_used_longest_ago_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEKIT_CACHE_LIMIT", "1000")
    paths = [put(300, name) for name in "abc"]
    for age, path in enumerate(paths):
        os.utime(path.with_suffix(".stamp"), (1000 + age, 1000 + age))
    assert cache.has_model(paths[0])  # used now
    put(300, "d")
    assert [path.exists() for path in paths] == [True, False, True]


def test_a_limit_in_words_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEKIT_CACHE_LIMIT", "lots")
    with pytest.raises(UsageError, match="'lots' is no size"):
        cache.make_room(1)


def test_what_a_killed_process_left_is_swept_away(folder: Path) -> None:
    folder.mkdir(parents=True)
    dead, alive = folder / "x.gguf.partial-1", folder / "x.gguf.partial-2"
    for path in (dead, alive):
        path.write_bytes(b"half")
    with alive.open("rb") as file:
        assert try_to_lock(file.fileno())
        cache.make_room(1)
        assert not dead.exists() and alive.exists()
    cache.make_room(1)
    assert not alive.exists()


def test_a_folder_that_cannot_be_made_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEKIT_CACHE", "/proc/nowhere")
    with pytest.raises(EdgekitError, match=r"cache /proc/nowhere/models cannot be used .*anon$"):
        cache.make_room(1)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells of file systems in memory")
def test_temporary_files_are_not_kept_in_memory_but_where_the_user_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TMPDIR", raising=False)
    for usual, want in ((HERE, HERE), (Path("/dev/shm"), Path("/var/tmp"))):
        monkeypatch.setattr("edgekit.disk.tempfile.gettempdir", lambda usual=usual: str(usual))
        assert temporary_folder() == want
    monkeypatch.setenv("TMPDIR", "/dev/shm")
    assert temporary_folder() == Path("/dev/shm")
