"""The wheel holds every package, and what `make` installs is pinned."""

import re
import sys
from pathlib import Path

import check_types

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[^A-Za-z0-9-]", line)[0].lower() for line in requirements}


def test_every_folder_with_an_init_is_packaged():
    dirs = {"edgekit": "edgekit"} | PROJECT["tool"]["setuptools"]["package-dir"]
    found = {
        ".".join([package, *path.parent.relative_to(ROOT / folder).parts])
        for package, folder in dirs.items()
        for path in (ROOT / folder).rglob("__init__.py")
    }
    assert found == set(PROJECT["tool"]["setuptools"]["packages"])
    assert dirs == check_types.FOLDERS


def test_everything_that_make_installs_is_pinned():
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = PROJECT["project"]["dependencies"] + extras["convert"] + extras["dev"]
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert names(wanted) - names(pins) == set()
    assert [pin for pin in pins if not pin.startswith("#") and "==" not in pin] == []


def test_the_device_side_needs_no_torch():
    needed = {"numpy", "gguf", "llama-cpp-python", "zstandard", "psutil", "click", "rich"}
    assert names(PROJECT["project"]["dependencies"]) == needed
