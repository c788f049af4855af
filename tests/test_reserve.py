"""What llama.cpp tells of its buffers, and what becomes of a log or a child that tells nothing."""

import subprocess
from pathlib import Path
from typing import Any

import pytest

from edgekit import reserve
from edgekit.artifact import open_artifact
from edgekit.catalog import open_catalog
from edgekit.errors import EdgekitError
from edgekit.footprint import BATCHES, compute_bytes, kv_bytes
from edgekit.llama import Context, capture_log, open_model
from edgekit.plan import shape_in
from edgekit.reserve import measure_memory, reserved, tell


class Notes:
    """Keeps what a user would read."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def start(self, stage: str, total: int) -> None:
        pass

    def advance(self, amount: int) -> None:
        pass

    def note(self, text: str) -> None:
        self.lines.append(text)


def test_without_weights_llama_cpp_reserves_what_it_reserves_with_them(
    llama_artifact: Path,
) -> None:
    base = llama_artifact / open_catalog(llama_artifact).manifest.base.name
    with open_model(base, no_alloc=True) as model:
        told = reserved(model, 512, "f16", 256)
    with open_model(base) as model, capture_log() as lines, Context(model, 512, n_batch=256):
        real = [line for line in lines if "buffer size" in line]
    sizes = [float(line.rpartition("=")[2].split()[0]) for line in real]  # output, KV, compute
    assert len(sizes) == 3
    assert told.kv_bytes + told.compute_bytes == pytest.approx(sum(sizes) * 2**20, abs=20_000)


def test_the_manifest_of_a_conversion_has_every_batch_and_cache_type(llama_artifact: Path) -> None:
    memory = open_catalog(llama_artifact).manifest.memory
    rows = {(row["kv_type"], row["batch"]) for row in memory["compute"]}
    assert rows == {(kv_type, batch) for kv_type in ("f16", "q8_0", "q4_0") for batch in BATCHES}


def test_what_is_told_twice_is_the_same(llama_artifact: Path) -> None:
    """A conversion that is resumed ends byte for byte like another."""
    with open_artifact(llama_artifact) as artifact:
        stored = artifact.manifest.memory
    assert {key: value for key, value in tell(llama_artifact).items() if key != "notes"} == stored


def test_between_measured_contexts_the_line_is_an_upper_bound(llama_artifact: Path) -> None:
    catalog = open_catalog(llama_artifact)
    shape = shape_in(catalog)
    with open_model(llama_artifact / catalog.manifest.base.name, no_alloc=True) as model:
        for context in (768, 1280, 4096):  # between two, and beyond the last
            told = reserved(model, context, "f16", 256)
            assert told.compute_bytes <= compute_bytes(shape, context, "f16", 256) + 20_000
            assert told.kv_bytes == pytest.approx(kv_bytes(shape, context, "f16"), abs=20_000)


def test_a_formula_that_is_off_is_told(llama_artifact: Path, monkeypatch) -> None:
    monkeypatch.setattr(reserve, "kv_bytes", lambda *_: 1)
    (note, *_) = tell(llama_artifact)["notes"]
    assert "the formula says 1; please report this" in note


def test_a_log_in_another_form_is_an_error(llama_artifact: Path, monkeypatch) -> None:
    base = llama_artifact / open_catalog(llama_artifact).manifest.base.name
    monkeypatch.setattr(reserve, "_KV", reserve.re.compile("cache of (\\d+) bytes"))
    with (
        open_model(base, no_alloc=True) as model,
        pytest.raises(EdgekitError, match=r"log does not tell the size of its KV cache"),
    ):
        reserved(model, 512, "f16", 256)


@pytest.mark.parametrize("code", ["import os; os.abort()", "print('no json')"])
def test_a_child_that_dies_costs_only_the_figures(llama_artifact, monkeypatch, code) -> None:
    run, notes = subprocess.run, Notes()

    def dying(command: list[str], **options: Any) -> Any:
        return run([command[0], "-c", code], **options)

    monkeypatch.setattr("edgekit.reserve.subprocess.run", dying)
    assert measure_memory(llama_artifact, notes) == {}
    assert len(notes.lines) == 1 and "plans take upper bounds" in notes.lines[0]
