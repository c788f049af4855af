"""What each budget buys: the data against the planner, and the command that gives it."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from profiles import CURVES, EXPERTS, MORE, full_body, with_facts, with_quality

from edgekit.catalog import open_catalog, read_manifest
from edgekit.cli import main
from edgekit.devices.profile import device_names
from edgekit.errors import RefusedError
from edgekit.footprint import kv_bytes
from edgekit.plan import plan_budget, plan_tier, shape_in
from edgekit.profile import profile, read_peers
from edgekit.report import render


@pytest.fixture(scope="module")
def artifact(llama_artifact, tmp_path_factory) -> Path:
    return with_quality(llama_artifact, tmp_path_factory.mktemp("profile") / "edge")


@pytest.fixture(scope="module")
def body(artifact) -> Any:
    return full_body(artifact)


def test_budgets_are_plans_from_the_smallest_to_everything(artifact):
    catalog, found = open_catalog(artifact), profile(artifact, [], context=512)
    assert found.budgets[0].budget_bytes == found.least_bytes
    assert found.budgets[-1].weights_bytes == plan_tier(catalog, "source").depths.weights_bytes
    for row in found.budgets:
        plan = plan_budget(catalog, row.budget_bytes, 512)
        assert row.total_bytes == plan.total_bytes <= row.budget_bytes
        assert sum(row.by_tier.values()) == row.weights_bytes == plan.depths.weights_bytes
        assert row.expected_kl == plan.expected_kl
    weights = [row.weights_bytes for row in found.budgets]
    assert weights == sorted(set(weights)) and len(weights) > 8


def test_one_byte_below_the_smallest_budget_fits_nothing(artifact):
    least = profile(artifact, [], context=512).least_bytes
    result = CliRunner().invoke(
        main, ["plan", str(artifact), "--budget", str(least - 1), "--context", "512"]
    )
    assert result.exit_code == 3


def test_a_tier_is_what_a_dedicated_file_holds(artifact):
    catalog, found = open_catalog(artifact), profile(artifact, [])
    for row in found.tiers:
        assert row.weights_bytes == plan_tier(catalog, row.tier).depths.weights_bytes
    assert found.artifact.separate_bytes == sum(row.weights_bytes for row in found.tiers)


def test_the_staircase_has_a_step_for_every_level(artifact):
    manifest, found = read_manifest(artifact), profile(artifact, [])
    assert len(found.stairs) == 1 + len(manifest.resident_order)
    assert found.stairs[0].weights_bytes == found.tiers[0].weights_bytes
    assert found.stairs[-1].weights_bytes == found.tiers[-1].weights_bytes
    kls = [stair.expected_kl for stair in found.stairs]
    assert kls == sorted(kls, reverse=True) and kls[0] == manifest.quality[0]["kl_mean"]


def test_bits_weighted_by_size_are_those_of_the_plan(artifact):
    catalog, found = open_catalog(artifact), profile(artifact, [])
    sizes = {s.name.removesuffix(".weight"): s.n_weights for s in catalog.stacks}
    names = [[f"blk.{c}.{r}" if c != "once" else r for c in found.columns] for r in found.roles]
    for bit_map in found.maps:
        total = sum(
            bits * sizes[name]
            for row, of_row in zip(bit_map.bits, names, strict=True)
            for bits, name in zip(row, of_row, strict=True)
            if bits is not None
        )
        norms = sum(32 * s.n_weights for s in catalog.stacks if len(s.shape) == 1)
        n_bits = bit_map.bits_per_weight * catalog.manifest.n_parameters
        assert total + norms == pytest.approx(n_bits)


def test_the_cache_grows_as_the_formula_says(artifact):
    shape, found = shape_in(open_catalog(artifact)), profile(artifact, [])
    assert found.cache[-1].context == shape.context
    for row in found.cache:
        assert row.by_type["f16"] == kv_bytes(shape, row.context, "f16")


def test_a_device_gets_the_plan_of_its_budget_or_is_told_why_not(body):
    *fitting, watch = body["devices"]
    for row in fitting:
        assert row["plan"]["total_bytes"] <= row["budget_bytes"]
        assert row["predicted"]["decode_tokens_per_s"] > 0
    assert watch["plan"] is watch["predicted"] is None
    assert "the lowest depth needs" in watch["needs"]


def test_without_measurements_there_is_no_quality(llama_artifact):
    found = profile(llama_artifact, [])
    assert (found.quality, found.stairs, found.reference_ppl) == ((), (), None)
    text = render(found.as_json())
    assert 'id="quality"' not in text and 'id="memory"' in text


def test_peers_are_rows_of_others(tmp_path):
    path = tmp_path / "compare.json"
    rows = [
        {"tool": "x", "name": "b", "weights_bytes": 9, "kl_mean": 0.5, "load_seconds": 1},
        {"tool": "x", "name": "a", "weights_bytes": 3, "kl_mean": 1.5},
    ]
    path.write_text(json.dumps({"models": rows}))
    assert [(row["name"], row["kl_mean"]) for row in read_peers(path)] == [("a", 1.5), ("b", 0.5)]
    lies = [{"kl_mean": 1}, 1, *(rows[0] | {"kl_mean": x} for x in (-1.0, math.inf, math.nan))]
    lies += [rows[0] | {"weights_bytes": n} for n in (0, math.inf)]
    texts = [json.dumps({"models": [lie]}) for lie in lies]
    for text in ("[]", "{", "[" * 100_000, '{"models": 3}', *texts):
        path.write_text(text)
        with pytest.raises(RefusedError, match="holds no list of models"):
            read_peers(path)


@pytest.mark.parametrize(
    "told",
    [
        {"hit_curves": [{"policy": "lru"}]},
        {"hit_curves": [CURVES[0] | {"hit_rate": [1.0]}]},
        {"hit_curves": [CURVES[0], CURVES[1] | {"experts_per_layer": [1, 2, 3]}]},
        {"hit_curves": 3},
        {"verdict": 3},
    ],
)
def test_experts_told_in_another_form_are_refused(llama_artifact, tmp_path, told):
    folder = with_facts(llama_artifact, tmp_path / "edge", experts=EXPERTS | MORE | told)
    with pytest.raises(RefusedError, match=r"hit_?\s?curves?|verdict"):
        profile(folder, [])


def test_experts_are_drawn_where_the_manifest_tells_of_them(llama_artifact, tmp_path):
    folder = with_facts(llama_artifact, tmp_path / "edge", experts=EXPERTS | MORE)
    assert profile(folder, []).experts == EXPERTS
    assert profile(llama_artifact, []).experts == {}


# The command


def cli(*args: Any) -> Any:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def test_the_command_writes_the_page_and_prints_the_data(artifact, tmp_path):
    output = tmp_path / "report.html"
    result = cli("profile", artifact, "-o", output, "--device", "pixel-8", "--json")
    printed = json.loads(result.stdout)
    assert [row["device"]["id"] for row in printed["devices"]] == ["pixel-8"]
    assert output.read_text() == render(printed)
    again = cli("profile", artifact, "-o", output)
    assert again.exit_code == 2 and "--force" in again.stderr
    every = json.loads(cli("profile", artifact, "--json").stdout)
    assert [row["device"]["id"] for row in every["devices"]] == list(device_names())


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("profile", "{a}"), 2, "give -o FILE"),
        (("profile", "{a}", "-o", "no/r.html"), 2, "no is no folder; make it first"),
        (("profile", "{a}", "--json", "--device", "pixel"), 2, "did you mean 'pixel-"),
        (("profile", "{t}", "--json"), 2, "edgekit convert"),
        (("profile", "{a}", "--json", "--context", "99999999"), 2, "out of range"),
    ],
)
def test_errors_are_one_line(artifact, tmp_path, words, code, told):
    result = cli(*(word.format(a=artifact, t=tmp_path) for word in words))
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (code, "", 1)
    assert told in result.stderr


def test_without_matplotlib_the_page_says_what_to_install(artifact, tmp_path):
    code = "import sys; sys.modules['matplotlib'] = None; from edgekit.cli import main; main()"
    words = [sys.executable, "-c", code, "profile", artifact, "-o", tmp_path / "r.html"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.endswith("needs matplotlib; pip install edgekit[report], or take --json\n")
    assert not (tmp_path / "r.html").exists()
    done = subprocess.run([*words, "--measure"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "needs matplotlib" in done.stderr  # before minutes of trials
    assert subprocess.run([*words[:5], "--json"], capture_output=True).returncode == 0
