"""How a session holds weights: mapped, decoded, repacked; and that nothing of it is left."""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from sessions import MIB, ROOMY, text

import edgekit
from edgekit import cache
from edgekit.errors import EdgekitError, UnknownNameError, UsageError


@pytest.fixture
def artifact(layered_artifact: Path) -> Path:
    return layered_artifact


@pytest.mark.parametrize("residency", ["mapped", "anon"])
def test_mapped_and_decoded_weights_answer_alike(artifact: Path, residency: str) -> None:
    with edgekit.load(artifact, ROOMY, 512, residency="anon", follow=False) as session:
        expected = text(session)
    with edgekit.load(artifact, ROOMY, 512, residency=residency, follow=False) as session:
        assert text(session) == expected
        files = [Path(m.path) for m in psutil.Process().memory_maps()]
        assert any(cache.cache_folder() in f.parents for f in files) == (residency == "mapped")


def test_auto_maps_what_the_cache_has_and_writes_nothing(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path))
    for made, residency in ((0, "auto"), (1, "mapped"), (1, "auto")):
        with edgekit.load(artifact, ROOMY, 512, residency=residency, follow=False) as session:
            text(session, 2)
            maps = [m.path for m in psutil.Process().memory_maps() if str(tmp_path) in m.path]
        assert len(list(tmp_path.glob("models/*.gguf"))) == made == len(maps)
    (model,) = tmp_path.glob("models/*.gguf")
    model.write_bytes(model.read_bytes()[:-1] + b"x")  # damaged: made anew
    with edgekit.load(artifact, ROOMY, 512, residency="mapped", follow=False):
        assert model.read_bytes()[-1:] != b"x"
    model.unlink()

    def made_meanwhile(_path: Path, n_bytes: int) -> None:  # by another process
        model.write_bytes(bytes(n_bytes))

    monkeypatch.setattr(cache, "make_room", made_meanwhile)
    with edgekit.load(artifact, ROOMY, 512, residency="mapped", follow=False) as session:
        assert len(text(session, 2)) > 0


def test_repacking_is_counted_and_only_done_where_it_fits(artifact: Path) -> None:
    with edgekit.load(artifact, ROOMY, 512, follow=False) as session:
        plain = session.plan
    with edgekit.load(artifact, ROOMY, 512, follow=False, repack=True) as session:
        assert session.plan.repack and session.plan.total_bytes >= plain.total_bytes
        assert len(text(session, 5)) > 0
        session.resize(plain.total_bytes)  # nothing to spare, and depth is never paid for it
        assert session.plan.depths == plain.depths
        assert session.plan.repack == (plain.total_bytes >= session.plan.total_bytes)
    with (
        pytest.raises(UsageError, match="mapped weights cannot be repacked"),
        edgekit.load(artifact, ROOMY, residency="mapped", repack=True),
    ):
        pass


def test_unknown_words_are_refused(artifact: Path) -> None:
    with (
        pytest.raises(UnknownNameError, match="unknown residency 'maped'; did you mean 'mapped'"),
        edgekit.load(artifact, ROOMY, residency="maped"),
    ):
        pass


def test_a_closed_session_says_so(artifact: Path) -> None:
    with edgekit.load(artifact, ROOMY, 512) as session:
        pass
    with pytest.raises(EdgekitError, match=r"no depth of .* is loaded"):
        session.generate("x", 1)


CYCLES = """
import gc, json, sys
import psutil
import edgekit
process, rows = psutil.Process(), []
for cycle in range(100):
    with edgekit.load(sys.argv[1], budget=1 << 30, context=256, follow=False) as session:
        "".join(session.generate("The quick brown", 2))
        session.resize(82 << 20)
        session.resize(1 << 30)
        "".join(session.generate("The quick brown fox", 2))
    if cycle % 20 == 19:
        gc.collect()
        rows.append((process.memory_info().rss, process.num_fds(), process.num_threads()))
print(json.dumps([rows, len(session.changes), session.changes[0].after_bytes]))
"""


def test_a_hundred_cycles_leave_nothing(artifact: Path, tmp_path: Path) -> None:
    """Load, resize down and up, close: neither memory nor descriptors nor files grow."""
    command = [sys.executable, "-c", CYCLES, str(artifact)]
    env = os.environ | {"TMPDIR": str(tmp_path)}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env)
    rows, n_changes, after_bytes = json.loads(done.stdout)
    assert n_changes == 2 and after_bytes <= 82 * MIB
    memory, descriptors, threads = zip(*rows, strict=True)
    assert len(set(descriptors)) == 1 and len(set(threads)) == 1
    assert memory[-1] - memory[0] <= 4 * MIB  # 80 cycles: a leak of 64 KiB each would show
    assert os.listdir(tmp_path) == []
