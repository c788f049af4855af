"""Artifacts of the codec `bitstack`: lossless on top, transcoded for llama.cpp, cut, resumed."""

import dataclasses
import hashlib
import json
import random
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from click.testing import CliRunner
from converted import tiny, unmeasured
from damage import damaged, files_of

from edgekit.arch import map_checkpoint
from edgekit.artifact import Artifact, open_artifact, verify
from edgekit.assembly import Assembly
from edgekit.checkpoint import Checkpoint
from edgekit.cli import main
from edgekit.codecs.bitstack import SHARE, best_exponent, chain_of, check_tiers
from edgekit.convert import convert
from edgekit.convert_preview import preview
from edgekit.errors import RefusedError, UsageError
from edgekit.exporters.gguf import read_header, tensor_offsets
from edgekit.kernels import ggml
from edgekit.kernels.bitstack_level import from_bytes
from edgekit.kernels.bitstack_rows import add_levels
from edgekit.kernels.decompose import Settings
from edgekit.manifest import self_hash
from edgekit.manifest_reader import loads
from edgekit.materialize import materialize
from edgekit.plan import plan_tier
from edgekit.planner import average_order, fill, packed_bytes, resident_step
from edgekit.progress import Silent

B = ("Q2_K", "B1", "B2", "B3", "source")
R = ("Q2_K", "R1", "R2", "source")
SCHEMA = json.loads(
    (Path(__file__).resolve().parent.parent / "edgekit/manifest.schema.json").read_text()
)


def bitstack(checkpoint: Path, artifact: Path, tiers: tuple[str, ...], **options) -> Path:
    chosen = unmeasured(tiers, statistics=False, codec="bitstack")
    convert(checkpoint, artifact, dataclasses.replace(chosen, **options), Silent())
    return artifact


@pytest.fixture(scope="module", params=["llama", "qwen3_moe"])
def checkpoint(request, tmp_path_factory) -> Path:
    """Rows of 256 and grouped-query attention; narrow rows and experts."""
    folder = tmp_path_factory.mktemp(request.param) / "checkpoint"
    wide = {"width": "wide"} if request.param == "llama" else {}
    return tiny(folder, request.param, dtype="bfloat16", num_hidden_layers=1, **wide)


@pytest.fixture(scope="module", params=[B, R], ids=["B", "R"])
def artifact(request, checkpoint) -> Path:
    return bitstack(checkpoint, checkpoint.with_name(request.param[1]), request.param)


def matrices(checkpoint: Path) -> dict[str, np.ndarray]:
    """Every tensor that has levels, float32 ``[experts, rows, cols]``."""
    found = {}
    for t in map_checkpoint(Checkpoint.open(checkpoint)).tensors:
        if t.quantizable:
            shape = (t.shape[0] if len(t.shape) == 3 else 1, -1, t.shape[-1])
            found[t.name] = ggml.dequantize(t.source_type, t.rows()).reshape(shape)
    return found


def tensors_of(artifact: Artifact, tier: str, folder: Path) -> dict[str, np.ndarray]:
    """Weights of the GGUF at a tier, through ggml."""
    path = folder / f"{tier}.gguf"
    materialize(artifact, plan_tier(artifact, tier).depths, path)
    header, data = read_header(path), path.read_bytes()
    found = {}
    for t, offset in zip(
        header.tensors, tensor_offsets(header.tensors, header.alignment), strict=True
    ):
        raw = np.frombuffer(data, np.uint8, t.n_bytes, header.data_offset + offset)
        found[t.name] = ggml.dequantize(t.type_name, raw)
    return found


def packed_values(artifact: Artifact, name: str, depth: int, expert: int) -> np.ndarray:
    """What the levels of a tensor add up to, read from their bytes."""
    stack = artifact.stack(name)
    rows = stack.n_rows
    values = np.zeros((rows, stack.cols), np.float32)
    if stack.tiers[1] == "R1":
        base = np.frombuffer(artifact.part(stack.levels[0], expert), np.uint8)
        values = ggml.dequantize(stack.tiers[0], base).reshape(rows, stack.cols)
    for level in stack.levels[1:depth]:
        add_levels([from_bytes(artifact.part(level, expert), rows, stack.cols)], values)
    return values


def test_source_gives_back_the_checkpoint(artifact, checkpoint, tmp_path):
    with open_artifact(artifact) as opened:
        got = tensors_of(opened, "source", tmp_path)
    for name, wanted in matrices(checkpoint).items():
        np.testing.assert_array_equal(got[name], wanted.reshape(-1), name)


def test_each_level_takes_error_off_and_llama_cpp_s_type_adds_little(
    artifact, checkpoint, tmp_path
):
    with open_artifact(artifact) as opened:
        wanted = matrices(checkpoint)
        steps = [tier for tier in opened.manifest.tiers if tier[0] in "BR"]
        before = dict.fromkeys(wanted, 1.0)
        for depth, tier in enumerate(steps, 2):
            transcoded = tensors_of(opened, tier, tmp_path)
            for name, w in wanted.items():
                values = np.stack([packed_values(opened, name, depth, e) for e in range(len(w))])
                error = float(((values - w) ** 2).sum() / (w**2).sum())
                theirs = float(((transcoded[name] - w.reshape(-1)) ** 2).sum() / (w**2).sum())
                assert error < 0.5 * before[name], (name, tier)
                assert theirs <= (1 + SHARE) * error * 1.001, (name, tier)
                before[name] = error


def test_a_cheaper_type_would_have_added_more(artifact, checkpoint):
    with open_artifact(artifact) as opened:
        for name, w in matrices(checkpoint).items():
            stack = opened.stack(name)
            values = packed_values(opened, name, 2, 0)
            error = ((values - w[0]) ** 2).sum()
            taken = ggml.row_bytes(stack.type_at(stack.tiers[1]), stack.cols)
            for kind in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0"):
                kind = ggml.type_for(kind, stack.cols)
                if ggml.row_bytes(kind, stack.cols) < taken and stack.n_experts == 1:
                    kept = ggml.dequantize(kind, ggml.quantize(kind, values)).reshape(w[0].shape)
                    assert ((kept - w[0]) ** 2).sum() > (1 + SHARE) * error


def test_it_verifies_and_its_manifest_has_the_schema(artifact):
    with open_artifact(artifact) as opened:
        found = verify(opened)
    assert found.ok and found.missing == 0
    jsonschema.validate(json.loads((artifact / "edgekit.json").read_text()), SCHEMA)


def test_commands_work_as_for_nested(artifact, tmp_path):
    """One budget: what is planned is what is run, written and measured."""

    def ask(*words: object) -> Any:
        done = CliRunner().invoke(main, [*map(str, words), "--json"])
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    made, text = tmp_path / "made.gguf", tmp_path / "text"
    text.write_text("a b c " * 60)
    whole = ask("plan", artifact, "--budget", "1GiB")
    budget = f"{whole['total_bytes'] - whole['weights_bytes'] // 3}B"
    planned = ask("plan", artifact, "--budget", budget)
    assert planned["fits"] and planned["weights_bytes"] < whole["weights_bytes"]
    tiers = {t["name"]: t["tier"] for t in planned["tensors"]}
    assert {"source"} < set(tiers.values())
    ran = ask("run", artifact, "--budget", budget, "-p", "a b", "-n", 4, "--ignore-eos")
    assert {t["name"]: t["tier"] for t in ran["plan"]["tensors"]} == tiers
    assert ran["n_gen"] == 4
    target = planned["weights_bytes"]
    written = ask("materialize", artifact, "--target-size", f"{target}B", "-o", made)
    assert {t["name"]: t["tier"] for t in written["tensors"]} == tiers
    words = ("--budget", budget, "--text", text, "--context", 32)
    assert ask("eval", artifact, *words, "--reference", made)["kl_mean"] < 1e-6
    assert ask("eval", artifact, *words)["kl_mean"] > 1e-5
    assert ask("verify", artifact)["ok"]
    assert ask("inspect", artifact)["codec"] == "bitstack"


def test_transcoding_is_the_same_every_time_and_without_the_compiled_code(
    artifact, tmp_path, monkeypatch
):
    with open_artifact(artifact) as opened:
        tier = opened.manifest.tiers[2]
        depths, made = plan_tier(opened, tier).depths, []
        for n_threads, plain in ((1, "0"), (3, "0"), (2, "1")):
            monkeypatch.setenv("EDGEKIT_NO_NATIVE", plain)
            path = tmp_path / f"{n_threads}.gguf"
            materialize(opened, depths, path, n_threads=n_threads)
            made.append(path.read_bytes())
    assert made[0] == made[1] == made[2]


def test_a_plan_counts_the_bytes_that_llama_cpp_holds(artifact):
    with open_artifact(artifact) as opened:
        for tier in opened.manifest.tiers:
            plan = plan_tier(opened, tier)
            with Assembly(opened, plan.depths) as gguf:
                held = sum(t.n_bytes for t in gguf.gguf.tensors)
            assert plan.depths.weights_bytes == held


@pytest.mark.parametrize(
    "lie", [{"type": "IQ1_S"}, {"type": "Q9_K"}, {"type": ""}, {"tier": "B2"}, {"tier": "R2"}]
)
def test_a_level_that_the_codec_cannot_have_written_is_refused(artifact, lie):
    """The manifest has the hash it should have; IQ1_S needs an importance matrix."""
    body = json.loads((artifact / "edgekit.json").read_text())
    level = next(lv for lv in body["levels"] if lv["tier"] in ("B1", "R1"))
    level |= lie
    for child in body["levels"]:
        if child["tensor"] == level["tensor"] and child["parent"] in ("B1", "R1"):
            child["parent"] = level["tier"]
    body["sha256"] = self_hash(body)
    with pytest.raises(RefusedError, match=r"gives no level|cannot be|tier twice"):
        loads(json.dumps(body).encode())


def test_a_hostile_level_with_the_right_hash_is_refused_or_gives_bytes_of_the_right_size(
    artifact, tmp_path
):
    """Random damage, and scales and factors that are infinite or no numbers."""
    folder, rng, refused = Path(shutil.copytree(artifact, tmp_path / "bad")), random.Random(0), 0
    paths = files_of(folder)
    data, body = paths["levels"].read_bytes(), json.loads(paths["manifest"].read_bytes())
    row = next(lv for lv in body["levels"] if lv["tier"] in ("B1", "R1") and "experts" not in lv)
    start, stop = row["offset"], row["offset"] + row["bytes"]
    payload = data[start:stop]
    infinite, none = (payload[:16] + bits * 64 + payload[144:] for bits in (b"\0\x7c", b"\1\x7c"))
    for bad in (infinite, none, *(damaged(rng, payload, may_cut=False) for _ in range(25))):
        bad = bad[: len(payload)].ljust(len(payload), b"\0")
        row["sha256"] = hashlib.sha256(bad).hexdigest()
        paths["levels"].write_bytes(data[:start] + bad + data[stop:])
        paths["manifest"].write_text(json.dumps(body | {"sha256": self_hash(body)}))
        with open_artifact(folder) as opened:
            try:
                gguf = Assembly(opened, plan_tier(opened, body["tiers"][2]).depths)
                assert len(gguf.read(0, gguf.size)) == gguf.size
            except RefusedError:
                refused += 1
    assert 2 <= refused < 25


def test_a_flipped_bit_is_found_before_it_is_used(artifact, tmp_path):
    bad = tmp_path / "bad"
    shutil.copytree(artifact, bad)
    [levels] = bad.glob("*.levels")
    data = bytearray(levels.read_bytes())
    data[100] ^= 1
    levels.write_bytes(data)
    with open_artifact(bad) as opened:
        depths = plan_tier(opened, "source").depths
        with Assembly(opened, depths) as gguf, pytest.raises(RefusedError, match="corrupt"):
            gguf.read(0, gguf.size)


def test_no_plan_takes_a_depth_that_is_worse_than_one_below(artifact):
    """Steps B1 and B2 are worse than the base they replace: no plan has them."""
    with open_artifact(artifact) as opened:
        order = opened.manifest.resident_order
        least, most = (plan_tier(opened, t).depths.weights_bytes for t in (B[0], B[-1]))
        for n_bytes in np.linspace(least, most, 40):
            depths = fill(opened.stacks, order, int(n_bytes))
            for stack in opened.stacks:
                depth = stack.depth_of(depths.tier(stack.name)) - 1
                assert stack.levels[depth].loss <= min(lv.loss for lv in stack.levels[: depth + 1])


def test_average_order_raises_all_tensors_level_by_level(artifact):
    with open_artifact(artifact) as opened:
        order = average_order(opened.stacks, resident_step)
        depth_of = {(lv.tensor, lv.tier): d for s in opened.stacks for d, lv in enumerate(s.levels)}
        depths = [depth_of[key] for key in order]
        assert depths == sorted(depths) and len(set(order)) == len(order)
        assert len(order) == sum(len(s.levels) - 1 for s in opened.stacks)


def test_packed_bytes_are_those_of_the_levels(artifact):
    with open_artifact(artifact) as opened:
        for stack in opened.stacks:
            if len(stack.levels) > 1:
                first = 0 if stack.tiers[1] == "R1" else 1
                levels = stack.levels[first:3]
                assert packed_bytes(stack, stack.tiers[2]) == sum(lv.n_bytes for lv in levels)


def test_the_number_of_jobs_changes_nothing(checkpoint, tmp_path):
    def contents(folder: Path) -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in folder.iterdir()}

    one = bitstack(checkpoint, tmp_path / "edge", B, jobs=1)
    wanted = contents(one)
    shutil.rmtree(one)
    three = bitstack(checkpoint, tmp_path / "edge", B, jobs=3)
    assert contents(three) == wanted


def test_column_groups_convert_and_come_back(checkpoint, tmp_path):
    made = bitstack(checkpoint, tmp_path / "edge", B, column_group=32)
    with open_artifact(made) as opened:
        got = tensors_of(opened, "source", tmp_path)
        stack = next(s for s in opened.stacks if len(s.levels) > 1)
        level = from_bytes(opened.part(stack.levels[1], 0), stack.n_rows, stack.cols)
    assert (level.group, level.rank) == (32, 1)
    for name, wanted in matrices(checkpoint).items():
        np.testing.assert_array_equal(got[name], wanted.reshape(-1), name)


def test_the_preview_has_the_tiers_of_the_conversion(artifact, checkpoint, tmp_path):
    with open_artifact(artifact) as opened:
        tiers = opened.manifest.tiers
    options = dataclasses.replace(unmeasured(tiers), codec="bitstack")
    assert tuple(preview(checkpoint, tmp_path / "new", options).tiers) == tiers


def test_the_exponent_is_one_where_nothing_is_to_weigh_and_searched_where_there_is():
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((64, 96)).astype(np.float32)
    even = np.ones(64, np.float32), np.ones(96, np.float32)
    assert best_exponent(weights, *even, Settings()) == 1.0
    skewed = np.exp(rng.standard_normal(96)).astype(np.float32)
    assert best_exponent(weights, even[0], skewed, Settings()) > 0


@pytest.mark.parametrize(
    ("tiers", "told"),
    [
        (("B1", "B2"), "takes a base of a stock type"),
        (("Q2_K", "B2", "B1"), "takes a base of a stock type"),
        (("Q2_K", "B1", "R2"), "takes a base of a stock type"),
        (("Q2_K", "source"), "takes a base of a stock type"),
        (("Q2_K",), "takes a base of a stock type"),
        (("Q2_K", "B1", "source", "B2"), "takes a base of a stock type"),
        (("Q2_K", *(f"B{i}" for i in range(1, 18))), "unknown tier 'B17'"),
        (("IQ2_S", "R1"), "R1 and on can stand on"),
        (("Q9_K", "B1"), "unknown tier 'Q9_K'"),
    ],
)
def test_tiers_that_are_no_ladder_are_told(tiers, told):
    with pytest.raises(UsageError, match=told):
        check_tiers(tiers)


def test_narrow_rows_stand_on_what_llama_quantize_falls_back_to(checkpoint):
    for tensor in map_checkpoint(Checkpoint.open(checkpoint)).tensors:
        chain = chain_of(tensor, B)
        if tensor.quantizable:
            assert chain == (ggml.type_for("Q2_K", tensor.shape[-1]), *B[1:])
        else:
            assert chain == ("source",)


def test_column_groups_belong_to_bitstack(checkpoint, tmp_path):
    with pytest.raises(UsageError, match="--column-group is for --codec bitstack"):
        convert(checkpoint, tmp_path / "x", unmeasured(column_group=128), Silent())
