"""The command line: examples that run, JSON that tools rely on, one line per error."""

import errno
import json
import os
import pty
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bench.checkpoints import SHAPES
from click.testing import CliRunner, Result
from tiny_artifact import UNMEASURED, make_artifact
from tokenizers import Tokenizer

from edgekit.cli import main
from edgekit.cli.console import print_table
from edgekit.spool import replacing

COMMANDS = sorted(main.commands)
TEXT = "".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(99))
SIZE, COUNT, NUMBER, MAYBE = int, int, (int, float), (int, float, type(None))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with what the examples speak of: a checkpoint, an artifact, files, a text."""
    folder = tmp_path_factory.mktemp("made")
    make_artifact(folder, SHAPES["tiny"], UNMEASURED)
    (folder / "checkpoint").rename(folder / "Llama-3.2-1B")
    (folder / "artifact").rename(folder / "llama-edge")
    (folder / "heldout.txt").write_text(TEXT)
    done = run(folder, "export", "llama-edge", "--format", "onnx")
    assert done.returncode == 0, done.stderr
    run(folder, "materialize", "llama-edge", "--tier", "source", "-o", "source.gguf")
    run(folder, "materialize", "llama-edge", "--tier", "Q4_K", "-o", "phone.gguf")
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, to work in."""
    folder = Path(shutil.copytree(made, tmp_path / "here"))
    monkeypatch.chdir(folder)
    return folder


def run(folder: Path, *args: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run ``edgekit`` as a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "edgekit", *args],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        **{"capture_output": True, "text": True} | options,
    )


def invoke(*args: str, **options: Any) -> Result:
    """Run ``edgekit`` in this process."""
    return CliRunner().invoke(main, list(args), **options)


def json_of(*args: str) -> Any:
    result = invoke(*args, "--json")
    assert result.exit_code == 0, (result.stderr, result.exception)
    assert result.stdout.count("\n") == 1
    return json.loads(result.stdout)


def examples() -> Iterator[tuple[str, str]]:
    """Command and line of every example in a help text."""
    for command in COMMANDS:
        help_text = invoke(command, "--help").stdout
        for line in re.findall(r"^ +(edgekit .*)$", help_text, re.M):
            yield command, line


def test_the_help_names_every_command_and_the_exit_codes():
    text = invoke("--help").stdout
    for command in COMMANDS:
        assert re.search(rf"^  {command} +\S", text, re.M), command
    for code in range(6):
        assert re.search(rf"\b{code} [a-z]", text), code


def test_every_command_has_an_example():
    assert {command for command, _ in examples()} == set(COMMANDS)


@pytest.mark.parametrize("line", [line for _, line in examples()])
def test_every_example_in_a_help_text_runs(here, line, moe_artifact):
    words = shlex.split(line)[1:]
    if words[0] == "trace":
        words[1:4] = [str(moe_artifact), "--text", "heldout.txt"]
    if words[0] == "convert":
        shutil.rmtree("llama-edge")
        if "--no-calibration" not in words:
            words += ["--calibration", "heldout.txt", "--jobs", "1"]  # the rest of it takes minutes
            words += ["--no-measure"]
    if words[0] == "materialize":
        Path("phone.gguf").unlink()
    if words[0] == "export":
        shutil.rmtree("llama-edge/onnx")
    if words[0] == "pull":
        words[1] = Path("llama-edge").resolve().as_uri()
    if words[0] == "serve":
        check_serves(here, words)
        return
    if words[0] in ("run", "plan", "pull"):
        words += ["--context", "64"] if "--context" not in words else []
    if "--no-calibration" in words:
        words += ["--no-measure"]
    result = invoke(*words)
    assert result.exit_code == 0, (result.stderr, result.exception)


def check_serves(folder: Path, words: list[str]) -> None:
    """It gets ready, and a termination ends it well."""
    words[words.index("--port") + 1] = "0"
    command = [sys.executable, "-m", "edgekit", *words]
    with subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        while "serving " not in (line := process.stderr.readline()):
            assert line
        process.terminate()
        assert process.wait(timeout=60) == 0


def check(body: Any, **fields: Any) -> None:
    """Each field is there and of its type; a truth is no number."""
    for name, kind in fields.items():
        assert isinstance(body[name], kind), (name, body[name])
        assert kind is bool or not isinstance(body[name], bool), name


def test_convert_json(here):
    command = ("convert", "Llama-3.2-1B", "-o", "new", "--no-calibration", "--no-measure")
    planned, body = json_of(*command, "--dry-run"), None
    assert not Path("new").exists()
    body = json_of(*command)
    for each in (planned, body):
        check(each, artifact=str, source_bytes=SIZE, base_bytes=SIZE, levels_bytes=SIZE)
        check(each, artifact_bytes=SIZE, tiers=dict, n_tensors=COUNT, seconds=NUMBER)
        assert list(each["tiers"]) == ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "source"]
        for row in each["tiers"].values():
            check(row, bytes=SIZE, bits_per_weight=NUMBER)
    assert planned["tiers"] == body["tiers"]
    assert body["artifact_bytes"] == sum(p.stat().st_size for p in Path("new").iterdir())
    assert body["base_bytes"] + body["levels_bytes"] < body["artifact_bytes"]
    assert body["source_bytes"] == Path("Llama-3.2-1B/model.safetensors").stat().st_size
    assert planned["artifact_bytes"] == pytest.approx(body["artifact_bytes"], rel=0.2)


def test_plan_json(here):
    body = json_of("plan", "llama-edge", "--budget", "200MB", "--context", "128")
    check(body, fits=bool, budget_bytes=SIZE, context=COUNT, weights_bytes=SIZE, kv_bytes=SIZE)
    check(body, compute_bytes=SIZE, overhead_bytes=SIZE, total_bytes=SIZE)
    check(body, bits_per_weight=NUMBER, expected_kl=MAYBE, tensors=list)
    assert (body["budget_bytes"], body["context"], body["fits"]) == (200_000_000, 128, True)
    parts = ("weights_bytes", "kv_bytes", "compute_bytes", "overhead_bytes")
    assert body["total_bytes"] == sum(body[part] for part in parts) <= 200_000_000
    for row in body["tensors"]:
        check(row, name=str, tier=str, bytes=SIZE)
    assert sum(row["bytes"] for row in body["tensors"]) == body["weights_bytes"]


def test_materialize_json(here):
    Path("phone.gguf").unlink()
    command = ("materialize", "llama-edge", "--target-size", "1MB", "-o", "phone.gguf")
    planned = json_of(*command, "--dry-run")
    assert not Path("phone.gguf").exists()
    body = json_of(*command)
    check(body, path=str, bytes=SIZE, seconds=NUMBER, tensors=list)
    for row in body["tensors"]:
        check(row, name=str, tier=str)
    assert body["bytes"] == planned["bytes"] == Path(body["path"]).stat().st_size
    assert body["tensors"] == planned["tensors"]


def test_run_json(here):
    command = ("run", "llama-edge", "-p", "a b", "-n", "3", "--budget", "1GiB", "--context", "64")
    body = json_of(*command, "--temperature", "0")
    check(body, text=str, n_prompt=COUNT, n_gen=COUNT, prompt_tokens_per_second=NUMBER)
    check(body, gen_tokens_per_second=NUMBER, load_seconds=NUMBER, peak_rss_bytes=SIZE, plan=dict)
    check(body["plan"], fits=bool, total_bytes=SIZE, tensors=list)
    tokenizer = Tokenizer.from_file("Llama-3.2-1B/tokenizer.json")
    assert (body["n_gen"], body["n_prompt"]) == (3, len(tokenizer.encode("a b").ids))
    plain = invoke(*command, "--temperature", "0")
    assert plain.stdout == body["text"] + "\n"


def test_eval_json(here):
    body = json_of("eval", "llama-edge", "--tier", "Q4_K", "--text", "heldout.txt")
    check(body, n_tokens=COUNT, ppl=NUMBER, ref_ppl=NUMBER, kl_mean=NUMBER, kl_p99=NUMBER)
    check(body, top1_agreement=NUMBER, weights_bytes=SIZE)
    assert body["kl_mean"] > 0 and body["n_tokens"] > 500


def test_inspect_json(here):
    body = json_of("inspect", "llama-edge")
    check(body, name=str, architecture=str, format_version=int, n_parameters=COUNT, codec=str)
    check(body, tiers=list, levels=list)
    assert (body["architecture"], body["format_version"], body["codec"]) == ("llama", 1, "nested")
    assert json_of("inspect", "phone.gguf")["architecture"] == "llama"
    assert json_of("inspect", "Llama-3.2-1B")["architecture"] == "llama"


def test_verify_json_tells_the_problems_and_still_ends_with_exit_code_5(here):
    body = json_of("verify", "llama-edge")
    check(body, ok=bool, checked=COUNT, problems=list)
    assert body["ok"] and body["problems"] == []
    (levels,) = Path("llama-edge").glob("*.levels")
    levels.write_bytes(b"\0" * levels.stat().st_size)
    result = invoke("verify", "llama-edge", "--json")
    body = json.loads(result.stdout)
    assert result.exit_code == 5
    assert body["ok"] is False and all(isinstance(text, str) for text in body["problems"])


FAILURES = {
    1: ["convert", "Llama-3.2-1B", "-o", "heldout.txt/new", "--no-calibration", "--no-measure"],
    2: ["plan", "llama-edge", "--budget", "a lot"],
    3: ["plan", "llama-edge", "--budget", "10MB"],
    4: ["materialize", "huge", "--tier", "source", "-o", "out.gguf"],
    5: ["verify", "corrupt"],
}


@pytest.mark.parametrize("code", [0, *FAILURES])
def test_each_exit_code_comes_with_one_line_on_stderr_and_nothing_on_stdout(here, code):
    if code == 5:
        shutil.copytree("llama-edge", "corrupt")
        (base,) = Path("corrupt").glob("*.gguf")
        base.write_bytes(base.read_bytes()[:-1])
    if code == 4:  # no file may grow beyond 100 kB
        limited = "import resource, runpy, sys\n"
        limited += "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        limited += "runpy.run_module('edgekit', run_name='__main__')\n"
        words = ["llama-edge" if word == "huge" else word for word in FAILURES[code]]
        result = subprocess.run(
            [sys.executable, "-c", limited, *words], capture_output=True, text=True
        )
    else:
        result = run(here, *(FAILURES[code] if code else ["verify", "llama-edge"]))
    assert (result.returncode, result.stdout) == (code, "")
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("Error: ") == (code != 0)
    assert "Traceback" not in result.stderr and "bug" not in result.stderr


def test_verbose_shows_the_traceback_above_the_line(here):
    (base,) = Path("llama-edge").glob("*.gguf")
    base.write_bytes(base.read_bytes()[:-1])
    result = run(here, "verify", "llama-edge", "-v")
    assert result.returncode == 5
    assert result.stderr.startswith("Traceback")
    assert result.stderr.splitlines()[-1].startswith("Error: ")


@pytest.mark.parametrize(
    ("command", "code", "words"),
    [
        # object, what it has, what it needs, the next step
        ("plan llama-edge --budget 10MB", 3, ["lowest depth needs", "9.54 MiB", "give --budget 7"]),
        ("plan llama-edge --budget 95MiB --context 100000", 3, ["KV cache", "--context "]),
        ("plan llama-edge --budget big", 2, ["'big'", "900MiB"]),
        ("plan Llama-3.2-1B", 2, ["Llama-3.2-1B", "edgekit.json", "edgekit convert"]),
        ("materialize llama-edge --tier Q4_0 -o x", 2, ["llama-edge", "Q4_0", "Q4_K, Q5_K"]),
        ("materialize llama-edge -o x", 2, ["--tier, --budget or --target-size"]),
        ("materialize llama-edge --tier Q4_K --context 64 -o x", 2, ["--context", "--budget"]),
        ("materialize llama-edge --tier Q4_K --dry-run -o phone.gguf", 2, ["--force"]),
        ("materialize llama-edge --format onnx --depth 4 --kv-type q8_0 -o x", 2, ["--kv-type"]),
        (
            "materialize llama-edge --format onnx --depth 4 --dry-run -o phone.gguf",
            2,
            ["not a folder"],
        ),
        ("materialize llama-edge --target-size 1kB -o x", 3, ["lowest depth", "raise"]),
        ("materialize llama-edge --tier Q4_K -o phone.gguf", 2, ["phone.gguf", "--force"]),
        ("materialize llama-edge --tier Q4_K -o no/x", 2, ["no is no folder", "-o"]),
        ("materialize llama-edge --tier Q4_K -o llama-edge", 2, ["folder", "-o"]),
        ("devices probe -o no/x.toml", 2, ["no is no folder", "-o"]),
        ("devices probe -o x", 2, ["does not end in .toml"]),
        ("convert Llama-3.2-1B -o llama-edge", 2, ["llama-edge exists", "--force"]),
        ("convert Llama-3.2-1B -o x --tiers Q4K,source", 2, ["'Q4K'", "'Q4_K'"]),
        ("convert Llama-3.2-1B -o x --tiers Q6_K,Q4_K", 2, ["Q6_K,Q4_K", "few bits"]),
        ("convert Llama-3.2-1B -o x --tiers Q4_K,IQ4_XS", 2, ["IQ4_XS", "first"]),
        ("convert Llama-3.2-1B -o x --error-feedback 4", 2, ["not for gguf", "--format onnx"]),
        (
            "convert Llama-3.2-1B -o x --format onnx --error-feedback 4 --no-calibration",
            2,
            ["--error-feedback needs a text", "leave --no-calibration out"],
        ),
        ("convert Llama-3.2-1B -o phone.gguf --force", 2, ["phone.gguf is a file", "-o"]),
        ("convert Llama-3.2-1B -o .", 2, [". is no name", "-o"]),
        ("convert Llama-3.2-1B -o x --save-imatrix y --no-calibration", 2, ["--save-imatrix"]),
        ("convert Llama-3.2-1B -o x --save-imatrix phone.gguf", 2, ["phone.gguf", "--force"]),
        ("convert Llama-3.2-1B -o x --address auto", 2, ["--engine ray"]),
        ("convert Llama-3.2-1B -o x --block-size 32", 2, ["--block-size", "--format"]),
        ("convert Llama-3.2-1B -o x --format onnx --tiers Q4_K", 2, ["--tiers", "--format"]),
        ("convert Llama-3.2-1B -o llama-edge --tiers Q4_K --resume", 2, ["other options", "-o"]),
        ("prune Llama-3.2-1B -o x --ratio 0.2 --repair-tier Q3_K", 2, ["--repair-rank"]),
        ("prune Llama-3.2-1B -o x --ratio 0.2 --seed 1", 2, ["--search"]),
        ("prune Llama-3.2-1B -o llama-edge --ratio 0.2 --resume", 2, ["other options", "-o"]),
        ("devices --json probe", 2, ["--json", "behind"]),
        ("eval phone.gguf --device cuda --text heldout.txt", 2, ["phone.gguf", "--device"]),
        ("run llama-edge -p x --budget 1GiB --prefetch gate --no-pager", 2, ["prefetched"]),
        ("run llama-edge -p x --state no/x", 2, ["no is no folder", "--state"]),
        ("convert llama-edge -o x", 5, ["llama-edge", "config.json"]),
        ("convert nowhere -o x", 2, ["nowhere", "does not exist", "convert --help"]),
        ("convert Llama-3.2-1B -o x --teirs Q4_K", 2, ["--teirs", "--tiers"]),
        ("materialise llama-edge", 2, ["materialise", "materialize"]),
        ("eval phone.gguf --tier Q4_K --text heldout.txt", 2, ["phone.gguf"]),
        ("inspect heldout.txt", 5, ["heldout.txt", "GGUF"]),
        ("run llama-edge -p x --budget 10MB", 3, ["needs", "budget"]),
    ],
)
def test_an_error_names_the_object_what_it_has_what_it_needs_and_the_next_step(
    here, command, code, words
):
    result = invoke(*command.split())
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (code, "", 1), result
    for word in words:
        assert word in result.stderr
    assert "Traceback" not in result.stderr and "bug" not in result.stderr


def test_a_prompt_can_come_from_stdin(here):
    command = ["run", "llama-edge", "-n", "2", "--temperature", "0", "--json"]
    command += ["--budget", "1GiB", "--context", "64"]
    piped = json.loads(invoke(*command, "-p", "-", input="a b").stdout)
    assert piped["text"] == json.loads(invoke(*command, "-p", "a b").stdout)["text"]


def test_the_seed_repeats_a_text(here):
    command = ["run", "llama-edge", "-n", "8", "-p", "a", "--budget", "1GiB", "--context", "64"]
    texts = [invoke(*command, "--seed", seed).stdout for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]


def test_a_reader_that_goes_away_ends_it_without_a_traceback(here):
    read, write = os.pipe()
    os.close(read)
    try:
        result = run(
            here,
            *("inspect", "llama-edge", "--json"),
            capture_output=False,
            stdout=write,
            stderr=subprocess.PIPE,
        )
    finally:
        os.close(write)
    assert result.returncode == 1
    assert result.stderr == ""


CONVERT = ["convert", "Llama-3.2-1B", "-o", "new", "--no-calibration", "--no-measure"]


def test_no_progress_bar_without_a_terminal_and_one_with_it(here):
    quiet = run(here, *CONVERT)
    assert quiet.returncode == 0
    assert "\r" not in quiet.stderr and "%" not in quiet.stderr and "\x1b" not in quiet.stderr
    assert quiet.stderr.count("\n") == 1  # what it made
    ours, theirs = pty.openpty()
    shown = run(here, *CONVERT, "--force", capture_output=False, stdout=theirs, stderr=theirs)
    os.close(theirs)
    assert shown.returncode == 0
    seen = b""
    while chunk := _read(ours):
        seen += chunk
    assert b"encode" in seen and b"%" in seen


def _read(descriptor: int) -> bytes:
    """What the terminal was sent; nothing once its other end is closed."""
    try:
        return os.read(descriptor, 1 << 16)
    except OSError:
        return b""


def test_it_says_its_version():
    assert re.fullmatch(r"edgekit, version \d+\.\d+\.\d+.*\n", invoke("--version").stdout)


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (MemoryError(), 3, "no memory is left"),
        (OSError(errno.ENOSPC, "No space left on device"), 4, "the disk is full (No space"),
        (OSError(errno.EACCES, "Permission denied", "x"), 1, "x: Permission denied; check"),
    ],
)
def test_what_no_command_foresees_has_its_exit_code(monkeypatch, error, code, words):
    def fails():
        raise error

    monkeypatch.setattr("edgekit.devices.profile.device_names", fails)
    result = invoke("devices")
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (code, "", 1)
    assert words in result.stderr


def test_names_in_tables_are_no_markup(capsys):
    print_table("model [/x]", ("a", "b"), [("Foo [/INST]", "model[q4].gguf")])
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("model [/x]", "Foo [/INST]", "model[q4].gguf"))


def test_a_file_that_cannot_be_written_whole_leaves_nothing(tmp_path):
    with pytest.raises(OSError, match="full"), replacing(tmp_path / "x") as file:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "full")
    assert list(tmp_path.iterdir()) == []
