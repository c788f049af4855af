"""Every command of the pages that a newcomer follows, run in order on a small random model."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from bench.checkpoints import SHAPES, make_checkpoint
from click.testing import CliRunner

from edgekit.cli import main

DOCS = Path(__file__).resolve().parent.parent / "docs"
TEXT = "".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(60))
CHEAP = {  # what a random model needs less of
    "convert": ["--no-calibration", "--no-measure", "--jobs", "1"],
    "eval": ["--context", "64"],
}


def commands(page: str) -> list[list[str]]:
    """Words of every edgekit command in the fences of a page."""
    text = (DOCS / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    lines = re.findall(r"^edgekit (.+)$", "\n".join(blocks), re.M)
    return [shlex.split(line, comments=True) for line in lines]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the pages' names are: samples/tiny-llama, llama-edge, my.txt."""
    here = tmp_path_factory.mktemp("tutorial")
    make_checkpoint(here / "samples" / "tiny-llama", SHAPES["tiny"])
    for name in ("my.txt", "samples/text/heldout.txt"):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text(TEXT)
    return here


def run_all(page: str) -> None:
    for words in commands(page):
        if words[:2] == ["devices", "probe"]:  # a minute; tests/test_probe.py has it
            continue
        if words[0] == "run":  # its budget counts what the process holds already
            done = subprocess.run([sys.executable, "-m", "edgekit", *words], capture_output=True)
            assert done.returncode == 0, (words, done.stderr)
            continue
        result = CliRunner().invoke(main, [*words, *CHEAP.get(words[0], [])])
        assert result.exit_code == 0, (words, result.stderr, result.exception)


def test_the_tutorial_runs_from_its_first_command_to_its_last(folder, monkeypatch):
    monkeypatch.chdir(folder)
    run_all("tutorial.md")
    assert {p.name for p in folder.iterdir()} >= {
        "tiny-edge", "report.html", "tiny-Q4_K.gguf", "tiny-3MB.gguf"
    }  # fmt: skip
    shutil.copytree("tiny-edge", "llama-edge")
    Path("report.html").unlink()
    run_all("choosing.md")
