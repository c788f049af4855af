"""What the documentation names exists: pages, links, commands, exit codes, architectures."""

import re
import shlex
import sys
from pathlib import Path

import click
import pytest
from gguf import MODEL_ARCH_NAMES

from edgekit import errors
from edgekit.arch import ARCHS
from edgekit.cli import main
from edgekit.exporters.pretokenizers import TABLE

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
LINK = re.compile(r"\]\(([^)#\s]+)?(#[^)\s]+)?\)")

sys.path.insert(0, str(ROOT / "docs"))
import generate_cli  # noqa: E402


def fenced(page: Path) -> str:
    """The lines of ``page`` inside ``` fences, continued lines joined."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    return "\n".join(blocks).replace("\\\n", " ")


def anchors(page: Path) -> set[str]:
    """Anchors of the headings of ``page``, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def commands() -> list[str]:
    found = []
    for page in PAGES:
        if page.name == "cli.md":
            continue
        found += re.findall(r"^\s*(?:\$ )?(edgekit .+)$", fenced(page), re.M)
    return found


def test_cli_page_is_what_help_prints():
    page = (ROOT / "docs/cli.md").read_text(encoding="utf-8")
    assert page == generate_cli.render(), "docs/cli.md is out of date; run: make docs"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for path, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" in path:
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links to {path}"
        if anchor and target.suffix == ".md":
            assert anchor[1:] in anchors(target), f"{page.name} links to {path}{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_source_files_that_are_named_exist(page):
    for path in re.findall(r"`([\w/]+/[\w]+\.\w+)`", page.read_text(encoding="utf-8")):
        if path.endswith((".py", ".c", ".json", ".html", ".js")) and "src/models" not in path:
            assert (ROOT / path).exists(), f"{page.name} names {path}"


@pytest.mark.parametrize("line", commands())
def test_commands_in_the_documentation_exist(line):
    words = shlex.split(line, comments=True)[1:]
    command, context = main.get_command(click.Context(main), words[0]), click.Context(main)
    assert command is not None, f"no command {words[0]}"
    if isinstance(command, click.Group) and len(words) > 1 and not words[1].startswith("-"):
        command = command.get_command(context, words[1])
        assert command is not None, f"no command {words[:2]}"
    known = {name for p in command.params for name in (*p.opts, *p.secondary_opts)} | {"--help"}
    assert {word.split("=")[0] for word in words if re.match("--?[a-z]", word)} - known == set()


def test_readme_lists_the_exit_codes():
    rows = re.findall(r"^\| (\d) \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    kinds = [
        k for k in vars(errors).values() if isinstance(k, type) and k.__module__ == errors.__name__
    ]
    assert {int(row) for row in rows} == {0, *(kind.exit_code for kind in kinds)}


def test_architectures_page_lists_all_of_them():
    page = (ROOT / "docs/architectures.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)` \| `(\w+)` \| `([\w-]+)` \| ([\w, ]+) \|", page, re.M)
    rows = [
        (a.model_type, a.class_name, MODEL_ARCH_NAMES[a.gguf], ", ".join(sorted(a.rope_scaling)))
        for a in ARCHS.values()
    ]
    assert listed == rows


def test_tokenizers_page_lists_every_pre_tokenizer():
    page = (ROOT / "docs/tokenizers.md").read_text(encoding="utf-8")
    paragraph = re.search(r"^`gpt-2`.*?\n\n", page, re.M | re.S)
    assert paragraph
    known = dict.fromkeys(pre.name for row in TABLE.values() for pre in row)
    assert re.findall(r"`([^`]+)`", paragraph[0]) == list(known)


def test_every_command_has_a_runnable_example():
    for name in main.list_commands(click.Context(main)):
        text = main.get_command(click.Context(main), name).help or ""
        assert re.search(rf"^\s*edgekit {name} ", text, re.M), f"edgekit {name} --help"
