"""Imports point one way, and importing the package is light.

cli -> convert, loader, report -> planner, artifact, calibration, pruning
    -> codecs, exporters, devices -> kernels, stack -> errors
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("edgekit", "devices", "exporters", "kernels")

# From the bottom up: a name may import those of earlier rows, none of its own row or a later one.
# A package is one name: its modules may import each other.
LAYERS = (
    {"errors"},
    {"kernels", "progress", "safetensors_header", "samples", "sizes", "spool", "stack"},
    {"checkpoint", "disk"},
    {"cache", "checked", "devices", "exporters", "sensitivity"},
    {"codecs", "governor", "onnx_part", "receipts", "routing", "shortage", "sink"},
    {"arch", "decode", "imatrix", "llama", "manifest"},
    {
        "convert_options",
        "encode",
        "float_model",
        "manifest_reader",
        "prompt",
        "provenance",
        "remote",
        "saved",
        "text",
    },
    {"calibration", "catalog", "fisher", "footprint", "workers"},
    {"artifact"},
    {"planner"},
    {
        "assembly",
        "expert_budget",
        "model_card",
        "probe_model",
        "publish",
    },
    {"evaluate", "plan", "tokenizer_archive"},
    {"convert_report", "probe_timing", "speed", "torch_runtime"},
    {"probe"},
    {"onnx_runtime"},
    {"expert_plan"},
    {"measure", "pruning", "reserve", "tracing"},
    {"onnx"},
    {
        "convert",
        "inspect",
        "materialize",
        "pull",
        "report",
        "surrender",
        "verify",
        "wish",
    },
    {"convert_preview", "paging", "prune_report"},
    {"engine"},
    {"session"},
    {"onnx_session"},
    {"loader"},
    {"isolated", "profile", "server", "trial"},
    {"trials"},
    {"cli"},
    {"__main__"},
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def unit_of(path: Path) -> str:
    """The name in LAYERS that the file at ``path``, relative to the root, belongs to."""
    parts = path.with_suffix("").parts
    return parts[1] if parts[0] == "edgekit" else parts[0]


def imported_units(source: str, package: str) -> Iterator[tuple[int, str]]:
    """Line and unit of each import of ours in ``source``, a module that lies in ``package``."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            told = "." * node.level + (node.module or "")
            base = resolve_name(told, package)
            names = [f"{base}.{a.name}" for a in node.names] if base == "edgekit" else [base]
        for name in names:
            first, _, rest = name.partition(".")
            if first == "edgekit" and rest and not rest.startswith("__"):
                yield node.lineno, rest.split(".")[0]


def package_of(path: Path) -> str:
    parts = path.parent.parts
    return ".".join(parts if parts[0] == "edgekit" else ("edgekit", *parts))


def complaints(path: Path, source: str) -> list[str]:
    """What is wrong with the imports of the file at ``path``, relative to the root."""
    unit, found = unit_of(path), []
    for line, target in imported_units(source, package_of(path)):
        if target not in RANK:
            found.append(f"{path}:{line}: {target} has no row in LAYERS")
        elif target != unit and RANK[target] >= RANK[unit]:
            found.append(f"{path}:{line}: {unit} must not import {target}")
    return found


def modules() -> list[Path]:
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    relative = [path.relative_to(ROOT) for path in paths]
    return [path for path in relative if path != Path("edgekit/__init__.py")]


def test_every_module_has_a_row():
    assert {unit_of(path) for path in modules()} - set(RANK) == set()


@pytest.mark.parametrize("path", modules(), ids=str)
def test_imports_point_one_way(path):
    assert complaints(path, (ROOT / path).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "line",
    [
        "import edgekit.planner",
        "import edgekit.planner as p",
        "from edgekit import planner",
        "from edgekit.planner import plan",
        "from .. import planner",
        "from ..planner import plan",
        "def f():\n    from edgekit.planner import plan",
    ],
)
def test_each_form_of_an_upward_import_is_seen(line):
    for path in ("edgekit/codecs/x.py", "kernels/x.py"):
        assert len(complaints(Path(path), line)) == 1


@pytest.mark.parametrize(
    "line",
    [
        "import numpy",
        "from edgekit import __version__",
        "from .chunks import cut",
        "from . import chunks",
    ],
)
def test_other_imports_are_left_alone(line):
    assert complaints(Path("edgekit/codecs/x.py"), line) == []


@pytest.mark.parametrize("module", ["edgekit", "edgekit.cli"])
def test_importing_loads_no_heavy_library(module):
    heavy = {"torch", "transformers", "llama_cpp", "onnx", "onnxruntime", "triton", "ray"}
    code = f"import sys, {module}; print(*sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")
