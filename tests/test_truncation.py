"""A ``.levels`` file that ends early is no damage: what is whole in it works."""

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from converted import tiny, unmeasured
from damage import assembled, files_of, top

from edgekit.artifact import open_artifact, verify
from edgekit.convert import convert
from edgekit.llama import Sampling
from edgekit.loader import load
from edgekit.progress import Silent

BUDGET = 1 << 30
BITSTACK = {
    "B": ("llama", {"width": "wide"}, ("Q2_K", "B1", "B2", "B3", "source")),
    "R of experts": ("qwen3_moe", {}, ("Q2_K", "R1", "R2", "source")),
}


@pytest.fixture(scope="module", params=["nested", *BITSTACK])
def whole(request, tmp_path_factory, sound) -> Path:
    """An artifact of each codec; to be read only."""
    if request.param == "nested":
        return sound
    model_type, width, tiers = BITSTACK[request.param]
    folder = tmp_path_factory.mktemp("bitstack")
    options = {"dtype": "bfloat16", "num_hidden_layers": 1, **width}
    checkpoint = tiny(folder / "checkpoint", model_type, **options)
    chosen = unmeasured(tiers, statistics=False, codec="bitstack")
    convert(checkpoint, folder / "artifact", chosen, Silent())
    return folder / "artifact"


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy to cut."""
    return Path(shutil.copytree(whole, tmp_path / "artifact"))


def cuts(folder: Path) -> Iterator[int]:
    """Begin and end of the file, both sides of every end of a level, and some places between."""
    manifest = json.loads((folder / "edgekit.json").read_bytes())
    size = files_of(folder)["levels"].stat().st_size
    ends = [row["offset"] + row["bytes"] for row in manifest["levels"] if row["parent"]]
    rng = random.Random(0)
    places = {0, 1, size - 1, *ends, *(end - 1 for end in ends)}
    yield from sorted(places | {rng.randrange(size) for _ in range(10)})


def test_levels_cut_at_any_offset_give_what_is_whole_bit_for_bit(whole, folder):
    path = files_of(folder)["levels"]
    data = path.read_bytes()
    rows = json.loads((folder / "edgekit.json").read_bytes())["levels"]
    for cut in cuts(whole):
        path.write_bytes(data[:cut])
        with open_artifact(folder) as artifact:
            here = sum(len(stack.levels) for stack in artifact.stacks)
            depths = top(artifact)
            assert verify(artifact).ok, cut
        fits = sum(not row["parent"] or row["offset"] + row["bytes"] <= cut for row in rows)
        assert here == fits, cut  # in load order no level that is whole lacks its parent
        assert assembled(folder, depths) == assembled(whole, depths), cut


@pytest.mark.parametrize("share", [0, 0.001, 0.4, 0.9])
def test_levels_cut_at_any_offset_still_run(folder, share):
    path = files_of(folder)["levels"]
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with load(folder, BUDGET, context=64) as session:
        assert len(list(session.generate("a b", 4, Sampling(0, 0)))) <= 4


def test_a_levels_file_that_is_gone_leaves_the_base(folder):
    files_of(folder)["levels"].unlink()
    with open_artifact(folder) as artifact:
        assert verify(artifact).ok
        assert {len(stack.levels) for stack in artifact.stacks} == {1}
