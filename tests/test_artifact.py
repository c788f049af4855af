"""An artifact on disk: cut, missing, damaged or mixed up."""

import hashlib
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from edgekit.artifact import align, open_artifact, verify
from edgekit.assembly import Assembly
from edgekit.errors import RefusedError, UsageError
from edgekit.materialize import materialize
from edgekit.plan import plan_budget, plan_tier, plan_weights
from edgekit.planner import uniform


@pytest.fixture(params=["llama", "moe"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy to damage."""
    sound: Path = request.getfixturevalue(f"{request.param}_artifact")
    return Path(shutil.copytree(sound, tmp_path / "artifact"))


def base_of(folder: Path) -> Path:
    (base,) = folder.glob("checkpoint-*.gguf")
    return base


def levels_of(folder: Path) -> Path:
    (levels,) = folder.glob("*.levels")
    return levels


def ends_of_levels(folder: Path) -> list[tuple[int, str, str]]:
    """(end, tensor, tier) of every level above 0, straight from the JSON."""
    body = json.loads((folder / "edgekit.json").read_bytes())
    rows = [row for row in body["levels"] if row["parent"] is not None]
    return [(row["offset"] + row["bytes"], row["tensor"], row["tier"]) for row in rows]


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


def test_parts_are_aligned_hashed_and_back_to_back_in_stored_order(folder: Path) -> None:
    body = json.loads((folder / "edgekit.json").read_bytes())
    data, at = levels_of(folder).read_bytes(), 0
    order = body["load_order"]["stored"]
    assert order == sorted(order)
    for index in order:
        row = body["levels"][index]
        whole = [[row["offset"], row["bytes"], row.get("sha256")]]
        for offset, n_bytes, sha256 in row.get("experts", whole):
            assert offset == -(-at // 64) * 64 == align(at)
            assert not any(data[at:offset])
            assert hashlib.sha256(data[offset : offset + n_bytes]).hexdigest() == sha256
            at = offset + n_bytes
    assert at == len(data) == body["levels_file"]["bytes"]


def test_cut_at_every_level_what_is_whole_works(folder: Path, tmp_path: Path) -> None:
    path, ends = levels_of(folder), ends_of_levels(folder)
    data = path.read_bytes()
    with open_artifact(folder) as opened:
        top = {t.name: t for t in opened.header.tensors}
        whole = Assembly(opened, uniform(opened.stacks, lambda s: s.tiers[-1]))
        reference = whole.read(0, whole.size)
        at_top = dict(zip(whole.gguf.tensors, tensor_bytes(whole, reference), strict=True))
    rng = random.Random(5)
    cuts = {end + d for end, _, _ in ends for d in (-1, 0, 1)} | {0, 1, len(data) - 1}
    cuts |= {rng.randrange(len(data)) for _ in range(20)}
    for n, cut in enumerate(sorted(c for c in cuts if c <= len(data))):
        path.write_bytes(data[:cut])
        here = {(tensor, tier) for end, tensor, tier in ends if end <= cut}
        with open_artifact(folder) as opened:
            found = {(lv.tensor, lv.tier) for s in opened.stacks for lv in s.levels[1:]}
            assert found == here, cut
            plan = plan_budget(opened, 1 << 40, 64)
            assert all(plan.depths.tier(s.name) == s.tiers[-1] for s in opened.stacks)
            if n % 12:
                continue
            assembly = Assembly(opened, plan.depths)
            made = tensor_bytes(assembly, assembly.read(0, assembly.size))
            for info, blocks in zip(assembly.gguf.tensors, made, strict=True):
                if info in at_top and info.name in top:
                    assert blocks == at_top[info], info.name


def tensor_bytes(assembly: Assembly, data: bytes) -> list[bytes]:
    found, at = [], assembly.gguf.data_offset
    for tensor in assembly.gguf.tensors:
        found.append(data[at : at + tensor.n_bytes])
        at += -(-tensor.n_bytes // 32) * 32
    return found


def test_every_prefix_buys_at_least_what_a_shorter_one_did(folder: Path) -> None:
    path = levels_of(folder)
    data, bytes_before = path.read_bytes(), 0
    for share in np.linspace(0, 1, 12):
        path.write_bytes(data[: int(share * len(data))])
        with open_artifact(folder) as opened:
            weights = plan_weights(opened, 1 << 40).depths.weights_bytes
        assert weights >= bytes_before
        bytes_before = weights


def test_without_its_levels_file_an_artifact_is_its_base(folder: Path, tmp_path: Path) -> None:
    for cut in (lambda path: path.write_bytes(b""), lambda path: path.unlink()):
        cut(levels_of(folder))
        with open_artifact(folder) as opened:
            assert opened.levels_bytes == 0
            materialize(opened, plan_weights(opened, 1 << 40).depths, tmp_path / "m", force=True)
            found = verify(opened)
            assert found.ok
            assert found.missing == len(ends_of_levels(folder))
            with pytest.raises(UsageError, match="has no tier Q8_0; choose one it has: "):
                plan_tier(opened, "Q8_0")
        assert (tmp_path / "m").read_bytes() == base_of(folder).read_bytes()


def test_a_sound_artifact_verifies(folder: Path) -> None:
    with open_artifact(folder) as opened:
        found = verify(opened)
    n_levels = len(json.loads((folder / "edgekit.json").read_bytes())["levels"])
    assert (found.ok, found.checked, found.missing) == (True, n_levels, 0)


def test_verify_finds_a_flip_anywhere_and_names_the_level(folder: Path) -> None:
    body = json.loads((folder / "edgekit.json").read_bytes())
    for file, rows in (
        (base_of(folder), [r for r in body["levels"] if r["parent"] is None]),
        (levels_of(folder), [r for r in body["levels"] if r["parent"] is not None]),
    ):
        for row in (rows[0], rows[-1]):
            for offset in (row["offset"], row["offset"] + row["bytes"] - 1):
                flip(file, offset)
                with open_artifact(folder) as opened:
                    found = verify(opened)
                assert not found.ok
                assert (
                    f"level {row['tier']} of {row['tensor']} in {file.name}" in found.problems[-1]
                )
                flip(file, offset)


def test_verify_finds_a_flip_in_padding_and_bytes_at_the_end(folder: Path) -> None:
    ends = sorted(end for end, _, _ in ends_of_levels(folder) if end % 64)
    flip(levels_of(folder), ends[0])
    with open_artifact(folder) as opened:
        assert [levels_of(folder).name in p for p in verify(opened).problems] == [True]
    flip(levels_of(folder), ends[0])
    with levels_of(folder).open("ab") as file:
        file.write(b"more")
    with open_artifact(folder) as opened:
        assert [levels_of(folder).name in p for p in verify(opened).problems] == [True]


def test_a_flipped_level_is_refused_when_it_is_used_and_others_work(folder: Path) -> None:
    end, tensor, tier = ends_of_levels(folder)[-1]
    flip(levels_of(folder), end - 1)
    with open_artifact(folder) as opened:
        lowest = uniform(opened.stacks, lambda stack: stack.tiers[0])
        base = Assembly(opened, lowest)
        assert base.read(0, base.size) == base_of(folder).read_bytes()
        top = Assembly(opened, uniform(opened.stacks, lambda stack: stack.tiers[-1]))
        with pytest.raises(RefusedError, match=f"level {tier} of {tensor} in .* is corrupt"):
            top.read(0, top.size)


def test_the_base_of_another_model_is_refused(
    folder: Path, llama_artifact: Path, moe_artifact: Path
) -> None:
    own = base_of(folder).read_bytes()
    (other,) = (
        base for base in map(base_of, (llama_artifact, moe_artifact)) if base.read_bytes() != own
    )
    shutil.copy(other, base_of(folder))
    with pytest.raises(RefusedError, match=base_of(folder).name):
        open_artifact(folder)


def test_a_base_of_the_same_size_but_another_header_is_refused(folder: Path) -> None:
    flip(base_of(folder), 200)
    with pytest.raises(RefusedError, match=r"header of .* is corrupt"):
        open_artifact(folder)


def test_a_base_that_is_cut_or_gone_is_refused(folder: Path) -> None:
    data = base_of(folder).read_bytes()
    base_of(folder).write_bytes(data[:-1])
    with pytest.raises(RefusedError, match=f"{len(data) - 1} bytes, .* {len(data)}"):
        open_artifact(folder)
    base_of(folder).unlink()
    with pytest.raises(RefusedError, match="0 bytes"):
        open_artifact(folder)


def test_a_folder_without_a_manifest_is_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no edgekit\.json"):
        open_artifact(tmp_path)
