"""``edgekit prune`` and ``convert --prune``: input, output, dry runs, the report."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from converted import tiny

from edgekit.catalog import read_manifest
from edgekit.checkpoint import Checkpoint
from edgekit.cli import main
from edgekit.provenance import PRUNING, pruning_of
from edgekit.prune_report import verdict
from edgekit.pruning import choose, compare
from edgekit.pruning.compare import ROWS, Comparison, Row
from edgekit.pruning.metrics import METRICS
from edgekit.pruning.prune import Options, prune


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("c") / "tiny", "llama", width="wide")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--ratio", "1"], 2, "Invalid value for '--ratio': 1"),
        (["--ratio", "-0.1"], 2, "Invalid value for '--ratio': -0.1"),
        (["--ratio", "0.2", "--calibration", "absent.txt"], 2, "'absent.txt' does not exist"),
        (["--ratio", "0.2", "--metric", "taylr"], 2, "'taylr' is not one of"),
        (["--ratio", "0.05"], 5, "a ratio of 0.05 cannot be reached in multiples of 256"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    arguments: list[str], code: int, message: str, checkpoint: Path, tmp_path: Path
) -> None:
    command = ["prune", str(checkpoint), "-o", str(tmp_path / "out"), *arguments]
    result = CliRunner().invoke(main, command)
    assert (result.exit_code, result.stdout) == (code, "")
    assert message in result.stderr and result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_short_text_and_an_existing_output_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("too short")
    command = ["prune", str(checkpoint), "-o", str(tmp_path / "out"), "--ratio", "0.2"]
    result = CliRunner().invoke(main, [*command, "--calibration", str(tmp_path / "short.txt")])
    assert result.exit_code == 2 and "at least 16 are needed" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]
    (tmp_path / "out").mkdir()
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 2 and "exists; choose another -o" in result.stderr


@pytest.mark.parametrize(
    ("model_type", "arguments", "message"),
    [
        ("smallthinker", ["--ratio", "0.2"], "has no SmallThinkerForCausalLM"),
        ("llama", ["--ratio", "0.3", "--layers", "1"], "give --layers 0"),
    ],
)
def test_a_model_that_cannot_be_pruned_so_leaves_nothing(
    model_type: str,
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = tiny(tmp_path / "source", model_type, width="wide")
    monkeypatch.setattr(choose, "is_allowed", lambda *_: False)  # as of a graph that counts layers
    command = ["prune", str(source), "-o", str(tmp_path / "out"), "--tokens", "2048", *arguments]
    result = CliRunner().invoke(main, command)
    assert result.exit_code in (1, 5) and message in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_ways_that_a_model_cannot_be_pruned_in_are_left_out_of_the_comparison(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose, "is_allowed", lambda *_: False)
    shares = {name: Row("magnitude", tunes=False, shares=name) for name in ("layers", "widths")}
    monkeypatch.setattr(compare, "ROWS", shares)
    comparison = Comparison(checkpoint, n_tokens=512)
    assert [row["name"] for row in comparison.rows(0.22)] == ["widths"]
    assert comparison.rows(0.01) == []


def test_a_dry_run_lists_combinations_and_writes_nothing(checkpoint: Path, tmp_path: Path) -> None:
    command = ["prune", str(checkpoint), "-o", str(tmp_path / "out"), "--ratio", "0.22"]
    result = CliRunner().invoke(main, [*command, "--dry-run", "--json"])
    rows = json.loads(result.stdout)["candidates"]
    assert {"layers": 2, "attention_heads": 8, "key_value_heads": 4, "neurons": 256} in [
        row["kept"] for row in rows
    ]
    assert list(tmp_path.iterdir()) == []


def test_convert_with_prune_equals_pruning_and_then_converting(
    checkpoint: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 200)
    more = ["--calibration", str(text)]
    tail = ["--tiers", "Q4_K,source", "--no-measure", "--jobs", "1"]

    def run(*command: object) -> None:
        result = CliRunner().invoke(main, [*map(str, command), *more], catch_exceptions=False)
        assert result.exit_code == 0, result.stderr

    run("convert", checkpoint, "-o", tmp_path / "both", "--prune", 0.22, *tail)
    run("prune", checkpoint, "-o", tmp_path / "tiny-pruned", "--ratio", 0.22)
    run("convert", tmp_path / "tiny-pruned", "-o", tmp_path / "one", *tail)
    for path in (tmp_path / "one").glob("*.[gl]*"):  # the GGUF and the levels
        assert path.read_bytes() == (tmp_path / "both" / path.name).read_bytes()
    assert not list(tmp_path.glob(".*"))
    told = json.loads((tmp_path / "tiny-pruned" / "pruning.json").read_text())
    for name in ("both", "one"):
        pruned = read_manifest(tmp_path / name).source["pruned"]
        assert pruned == {key: told[key] for key in ("ratio_asked", "ratio", "metric", "kl_mean")}
        assert (
            f"{told['ratio']:.1%} of the parameters" in (tmp_path / name / "README.md").read_text()
        )
    shown = CliRunner().invoke(main, ["inspect", str(tmp_path / "both")])
    assert "of the parameters before" in shown.stdout

    again = ["convert", str(checkpoint), "-o", str(tmp_path / "both"), *tail, *more, "--resume"]
    done = CliRunner().invoke(main, [*again, "--prune", "0.22"])
    assert done.exit_code == 0 and "is complete; nothing to resume" in done.stderr
    another = tmp_path / "another"
    shutil.copytree(checkpoint, another)
    refused = CliRunner().invoke(main, ["convert", str(another), *again[2:], "--prune", "0.22"])
    assert refused.exit_code == 2 and "was made from another checkpoint" in refused.stderr
    refused = CliRunner().invoke(main, [*again, "--prune", "0.3"])
    assert (
        refused.exit_code == 2
        and "was made from another checkpoint or with other" in refused.stderr
    )


def test_what_is_no_pruning_of_ours_is_not_told(checkpoint: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    whole = {"ratio_asked": 0.3, "ratio": 0.3, "metric": "b", "kl_mean": 0}
    for body in ([], {"ratio": 0.3}, whole | {"ratio": "a"}, whole | {"ratio": -7.0}):
        (other / PRUNING).write_text(json.dumps(body))
        assert pruning_of(Checkpoint.open(other)) is None
    for text in ("{", json.dumps(whole | {"kl_mean": "inf"}).replace('"inf"', "1e999")):
        (other / PRUNING).write_text(text)
        assert pruning_of(Checkpoint.open(other)) is None
    (other / PRUNING).write_text(json.dumps(whole))
    assert pruning_of(Checkpoint.open(other)) == whole


def test_the_verdict_says_when_quantization_alone_is_better() -> None:
    def row(
        model: str, n_bytes: int, kl: float, speed: float, spread: float = 0.05
    ) -> dict[str, Any]:
        figures = {"weights_bytes": n_bytes, "kl_mean": kl, "tokens_per_second": speed}
        budget = {"budget_bytes": n_bytes + 1} if model == "pruned" else {}
        return {"model": model, "at": "bytes of Q4_K", **figures, **budget, "speed_spread": spread}

    pruned = row("pruned", 100, 0.3, 50)
    (line,) = verdict([pruned, row("whole", 100, 0.2, 40), row("whole", 90, 0.4, 60)])
    assert "at equal bytes quantization alone is better (KL 0.2 whole, 0.3 pruned)" in line
    assert "at equal tokens/s pruning is better (KL 0.4 whole, 0.3 pruned)" in line
    assert "bytes quantization alone cannot get there" in verdict([pruned])[0]
    (fuller,) = verdict([pruned, row("whole", 101, 0.2, 40), row("whole", 102, 0.1, 40)])
    assert "at equal bytes quantization alone is better (KL 0.2 whole" in fuller
    (near,) = verdict([pruned, row("whole", 100, 0.2, 49)])  # as fast, within what timing can tell
    assert "at equal tokens/s quantization alone is better" in near
    (unsteady,) = verdict([pruned, row("whole", 100, 0.2, 49, spread=0.3)])
    assert "at equal bytes quantization alone is better" in unsteady
    assert "speeds cannot be compared, timings of one model differ by 30%" in unsteady


def test_the_command_offers_every_metric_of_the_table() -> None:
    from edgekit.cli.prune import METRICS as offered

    assert tuple(METRICS) == offered


def test_templates_go_along_and_links_out_of_the_checkpoint_do_not(tmp_path: Path) -> None:
    source = tiny(tmp_path / "source", "llama")
    templates = source / "additional_chat_templates"
    templates.mkdir()
    (templates / "tool.jinja").write_text("{{ messages }}")
    (tmp_path / "secret.bin").write_text("secret")
    (templates / "other.bin").symlink_to(tmp_path / "secret.bin")
    prune(source, tmp_path / "out", Options(ratio=0, tokens=2048))
    copied = list((tmp_path / "out" / "additional_chat_templates").iterdir())
    assert [path.name for path in copied] == ["tool.jinja"]
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (
        source / "tokenizer.json"
    ).read_bytes()


@pytest.mark.slow
def test_the_report_measures_every_way_and_quantization_alone(
    checkpoint: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 400)
    command = ["prune", str(checkpoint), "-o", str(tmp_path / "out"), "--ratio", "0.2", "--json"]
    more = ["--report", "--multiple", "32", "--tokens", "1024", "--calibration", str(text)]
    result = CliRunner().invoke(main, [*command, *more], catch_exceptions=False)
    body = json.loads(result.stdout)
    assert {row["name"] for row in body["ways"]} == set(ROWS)
    assert {row["ratio_asked"] for row in body["ways"]} == {0.1, 0.2, 0.3}
    pruned = [row for row in body["against_quantization"] if row["model"] == "pruned"]
    assert len(pruned) == len(body["verdict"]) == 6
    page = (tmp_path / "out" / "report.md").read_text()
    assert all(line in page for line in body["verdict"])
    assert body["peak_rss_bytes"] > 0
