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
    cache.make_room(path, n_bytes)
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
def test_a_file_that_is_not_as_it_was_written_is_thrown_away(
    damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, other = put(100, "a"), put(100, "b")
    if damage == "bytes":
        path.write_bytes(b"x" * 100)
    elif damage == "size":
        os.truncate(path, 50)
    elif damage == "stamp":
        path.with_suffix(".stamp").write_bytes(b"{")
    else:
        new = path.with_suffix(".other")
        new.write_bytes(bytes(100))
        new.replace(path)
    assert not cache.has_model(path)
    cache.make_room(other, 100)
    assert path.exists()  # another process may have written it a moment ago
    monkeypatch.setattr(cache, "SETTLED_SECONDS", -1.0)
    cache.make_room(other, 100)
    assert not path.exists() and not path.with_suffix(".stamp").exists()
    assert cache.has_model(other)


@pytest.mark.parametrize("has_old_stamp", [False, True])
def test_a_model_that_nobody_vouches_for_yet_is_left_to_the_process_that_wrote_it(
    has_old_stamp: bool,
) -> None:
    path = cache.model_path(("a",), {"t": "Q4_K"})
    if has_old_stamp:
        put(300, "a")
    cache.make_room(path, 300)
    new = path.with_suffix(".new")
    new.write_bytes(bytes(300))
    new.replace(path)
    assert not cache.has_model(path)  # as a second process sees it
    cache.make_room(path, 300)
    cache.stamp(path)
    assert cache.has_model(path)


def test_a_model_that_is_replaced_takes_no_room_from_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("EDGEKIT_CACHE_LIMIT", "2000")
    other, orphan = put(700, "other"), cache.model_path(("orphan",), {"t": "Q4_K"})
    orphan.write_bytes(bytes(1200))
    cache.make_room(orphan, 1200)
    assert cache.has_model(other)


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
        cache.make_room(cache.model_path("x", {}), 1)


def test_what_a_killed_process_left_is_swept_away(folder: Path) -> None:
    folder.mkdir(parents=True)
    dead, alive = folder / "x.gguf.partial-1", folder / "x.gguf.partial-2"
    for path in (dead, alive):
        path.write_bytes(b"half")
    with alive.open("rb") as file:
        assert try_to_lock(file.fileno())
        cache.make_room(cache.model_path("x", {}), 1)
        assert not dead.exists() and alive.exists()
    cache.make_room(cache.model_path("x", {}), 1)
    assert not alive.exists()


def test_a_folder_that_cannot_be_made_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEKIT_CACHE", "/proc/nowhere")
    with pytest.raises(EdgekitError, match=r"cache /proc/nowhere/models cannot be used .*anon$"):
        cache.make_room(cache.model_path("x", {}), 1)


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
