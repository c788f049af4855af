"""Files written from an artifact: read by gguf, loaded by llama.cpp, never half there."""

import errno
import os
import random
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest
from damage import damaged_copy, mixed
from stock_llama import logits

from edgekit import materialize as module
from edgekit.artifact import open_artifact
from edgekit.disk import write_at
from edgekit.errors import DiskFullError, DoesNotFitError, RefusedError, UsageError
from edgekit.materialize import materialize, preview
from edgekit.plan import plan_budget, plan_json, plan_tier, plan_weights
from edgekit.planner import uniform


def weights_bytes(path: Path) -> int:
    """Bytes of all tensors, by gguf's reader."""
    return sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors)


@pytest.fixture(params=["llama", "moe"])
def artifact(request: pytest.FixtureRequest) -> Path:
    return Path(request.getfixturevalue(f"{request.param}_artifact"))


@pytest.mark.parametrize("has_pwrite", [True, False])
def test_all_is_written_where_it_belongs_also_in_short_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_pwrite: bool
) -> None:
    write, pwrite = os.write, os.pwrite
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:7]))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:7], at))
    if not has_pwrite:
        monkeypatch.delattr(os, "pwrite")
    descriptor = os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT)
    write_at(descriptor, bytes(range(100, 150)), 50)
    write_at(descriptor, bytes(range(50)), 0)
    os.close(descriptor)
    found = (tmp_path / "file").read_bytes()
    assert found == bytes(range(50)) + bytes(range(100, 150))


def test_the_file_says_what_was_planned_and_gguf_reads_it(artifact: Path, tmp_path: Path) -> None:
    with open_artifact(artifact) as opened:
        depths = mixed(opened, seed=2)
        made = materialize(opened, depths, tmp_path / "model.gguf")
        expected = {s.name: s.type_at(depths.tier(s.name)) for s in opened.stacks}
        shapes = {s.name: s.shape for s in opened.stacks}
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    assert {t.name: t.tensor_type.name for t in reader.tensors} == expected
    assert {t.name: tuple(reversed([int(n) for n in t.shape])) for t in reader.tensors} == shapes
    assert weights_bytes(tmp_path / "model.gguf") == depths.weights_bytes
    assert made.bytes == (tmp_path / "model.gguf").stat().st_size
    assert {row["name"]: row["tier"] for row in made.tensors} == dict(depths.tiers)


def test_llama_cpp_runs_the_file_and_the_base(artifact: Path, tmp_path: Path) -> None:
    with open_artifact(artifact) as opened:
        materialize(opened, plan_tier(opened, opened.manifest.tiers[0]).depths, tmp_path / "m.gguf")
        base = artifact / opened.manifest.base.name
        assert (tmp_path / "m.gguf").read_bytes() == base.read_bytes()
        materialize(opened, plan_tier(opened, "source").depths, tmp_path / "source.gguf")
    lowest, source = (logits(p, [5, 6, 7, 8]) for p in (base, tmp_path / "source.gguf"))
    assert np.isfinite(lowest).all()
    assert not np.array_equal(lowest, source)


def test_n_threads_change_no_byte(artifact: Path, tmp_path: Path) -> None:
    with open_artifact(artifact) as opened:
        depths = mixed(opened, seed=3)
        for n_threads in (1, 3):
            materialize(opened, depths, tmp_path / f"{n_threads}.gguf", n_threads=n_threads)
    assert (tmp_path / "1.gguf").read_bytes() == (tmp_path / "3.gguf").read_bytes()


def test_a_target_size_is_never_passed_and_one_byte_less_buys_less(
    artifact: Path, tmp_path: Path
) -> None:
    with open_artifact(artifact) as opened:
        least = uniform(opened.stacks, lambda stack: stack.tiers[0]).weights_bytes
        most = uniform(opened.stacks, lambda stack: stack.tiers[-1]).weights_bytes
        rng = random.Random(4)
        for target in [least, most, *(rng.randrange(least, most) for _ in range(5))]:
            depths = plan_weights(opened, target).depths
            materialize(opened, depths, tmp_path / "m.gguf", force=True)
            size = weights_bytes(tmp_path / "m.gguf")
            assert size == depths.weights_bytes <= target
            if size > least:
                assert plan_weights(opened, size).depths.weights_bytes == size
                assert plan_weights(opened, size - 1).depths.weights_bytes < size
        assert plan_weights(opened, most).depths.weights_bytes == most
        with pytest.raises(DoesNotFitError):
            plan_weights(opened, least - 1)


def test_a_budget_holds_weights_and_all_else(artifact: Path, tmp_path: Path) -> None:
    with open_artifact(artifact) as opened:
        overhead = plan_budget(opened, 1 << 40, 128).memory.total
        least = uniform(opened.stacks, lambda stack: stack.tiers[0]).weights_bytes
        for budget in (overhead + least, overhead + least + 40_000, 1 << 40):
            plan = plan_budget(opened, budget, 128)
            body = plan_json(opened, plan)
            materialize(opened, plan.depths, tmp_path / "m.gguf", force=True)
            assert weights_bytes(tmp_path / "m.gguf") == body["weights_bytes"]
            assert body["weights_bytes"] == sum(row["bytes"] for row in body["tensors"])
            parts = ("weights_bytes", "kv_bytes", "compute_bytes", "overhead_bytes")
            assert sum(body[part] for part in parts) == body["total_bytes"] <= budget
            assert body["fits"]


def test_an_existing_file_stays_without_force(llama_artifact: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"mine")
    with open_artifact(llama_artifact) as opened:
        depths = plan_tier(opened, "Q2_K").depths
        with pytest.raises(UsageError, match=r"model.gguf exists; .*--force"):
            materialize(opened, depths, path)
        assert path.read_bytes() == b"mine"
        materialize(opened, depths, path, force=True)
    assert path.read_bytes()[:4] == b"GGUF"
    assert [p.name for p in tmp_path.iterdir()] == ["model.gguf"]


def test_a_link_a_folder_and_a_missing_folder_are_refused(
    llama_artifact: Path, tmp_path: Path
) -> None:
    (tmp_path / "target").write_bytes(b"mine")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with open_artifact(llama_artifact) as opened:
        depths = plan_tier(opened, "Q2_K").depths
        for name in ("link", ".", "nowhere/model.gguf"):
            with pytest.raises(UsageError):
                materialize(opened, depths, tmp_path / name, force=True)
    assert (tmp_path / "target").read_bytes() == b"mine"


def test_a_refused_level_leaves_no_file_and_the_old_one_whole(
    moe_artifact: Path, tmp_path: Path
) -> None:
    folder, out = damaged_copy(moe_artifact, tmp_path), tmp_path / "out"
    out.mkdir()
    (out / "old.gguf").write_bytes(b"mine")
    with open_artifact(folder) as opened:
        depths = plan_tier(opened, "source").depths
        for name in ("new.gguf", "old.gguf"):
            with pytest.raises(RefusedError):
                materialize(opened, depths, out / name, force=True)
    assert [p.name for p in out.iterdir()] == ["old.gguf"]
    assert (out / "old.gguf").read_bytes() == b"mine"


def test_a_full_disk_is_exit_code_4_and_leaves_no_file(
    llama_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with open_artifact(llama_artifact) as opened:
        depths = plan_tier(opened, "Q2_K").depths
        monkeypatch.setattr(module.os, "fsync", full)
        with pytest.raises(DiskFullError, match="No space left on device") as error:
            materialize(opened, depths, tmp_path / "m.gguf")
    assert error.value.exit_code == 4
    assert list(tmp_path.iterdir()) == []


def test_a_preview_is_right_to_the_byte_and_writes_nothing(
    llama_artifact: Path, tmp_path: Path
) -> None:
    with open_artifact(llama_artifact) as opened:
        depths = mixed(opened)
        told = preview(opened, depths, tmp_path / "m.gguf")
        assert list(tmp_path.iterdir()) == []
        assert told.bytes == materialize(opened, depths, tmp_path / "m.gguf").bytes


def test_the_file_type_is_the_one_llama_cpp_names(llama_artifact: Path, tmp_path: Path) -> None:
    wanted = {"Q2_K": "Q2_K", "Q4_K": "Q4_K_M", "Q8_0": "Q8_0", "source": "BF16"}
    with open_artifact(llama_artifact) as opened:
        for tier, name in wanted.items():
            materialize(opened, plan_tier(opened, tier).depths, tmp_path / tier)
            field = gguf.GGUFReader(tmp_path / tier).fields["general.file_type"].contents()
            assert field == getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}")
