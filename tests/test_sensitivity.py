"""What errors cost: sums written out, limits with known answers, the file, a conversion."""

import json
import sys
from io import BytesIO
from pathlib import Path

import gguf
import numpy as np
import pytest
from converted import tiny
from jsonschema import Draft202012Validator

from edgekit.arch import map_checkpoint
from edgekit.checkpoint import Checkpoint
from edgekit.codecs import CODECS
from edgekit.codecs.job import Job, one_by_one
from edgekit.convert import convert
from edgekit.convert_options import Options
from edgekit.devices.memory import FreeMemory
from edgekit.errors import RefusedError
from edgekit.progress import Silent
from edgekit.sensitivity import (
    NO_FISHER,
    OTHER_PRIOR,
    PRIOR,
    Fisher,
    Sensitivity,
    prior_sensitivity,
    read_fisher,
    write_fisher,
)

ROOT = Path(__file__).resolve().parents[1]
NAME = "blk.0.ffn_up_exps.weight"


def random_fisher(experts: int = 2, rows: int = 5, cols: int = 7) -> tuple[Fisher, np.ndarray]:
    """A factored diagonal and the same in full, each ``[experts, rows, cols]``; 4 x 8 tokens."""
    random = np.random.default_rng(0)
    row, col = random.random((experts, rows, 1)), random.random((experts, 1, cols))
    full = row * col
    sums = {NAME: full.sum(2).astype(np.float32)}, {NAME: full.sum(1).astype(np.float32)}
    return Fisher(*sums, n_sequences=4, n_tokens=8), full


def loss_of(sensitivity: Sensitivity, error: np.ndarray) -> float:
    rows = error.shape[1]
    weighted = sum(
        sensitivity.weighing(expert, expert * rows, (expert + 1) * rows, slice(None))(part)
        for expert, part in enumerate(error.astype(np.float32))
    )
    return float(sensitivity.losses(np.array([weighted]), 1.0)[0])


def test_a_loss_is_half_the_weighted_sum_of_squares_per_token() -> None:
    fisher, full = random_fisher()
    sensitivity, error = fisher.of(NAME), np.random.default_rng(1).normal(size=full.shape)
    assert sensitivity is not None
    # each row and column as if a fifth sequence had had the mean
    row = 0.8 * full.sum(2, keepdims=True) + 0.2 * full.sum(2).mean()
    col = 0.8 * full.sum(1, keepdims=True) + 0.2 * full.sum(1).mean()
    smooth = row * col / row.sum(1, keepdims=True)
    assert loss_of(sensitivity, error) == pytest.approx(0.5 * (smooth * error**2).sum() / 32)


def test_rows_that_no_token_touched_are_not_free_and_the_total_stays() -> None:
    sums = np.array([[9.0, 0.0, 3.0]], np.float32)
    sensitivity = Fisher({NAME: sums}, {NAME: np.array([[12.0]], np.float32)}, 3, 1).of(NAME)
    assert sensitivity is not None
    found = sensitivity.rows[:, None] * sensitivity.cols[0] * 3  # of three tokens
    assert found[:, 0] == pytest.approx([7.75, 1.0, 3.25])
    assert found.sum() == pytest.approx(sums.sum())


def test_an_expert_that_no_token_chose_has_a_share_of_the_mean() -> None:
    fisher, full = random_fisher()
    full[1] = 0
    for sums, axis in ((fisher.rows, 2), (fisher.cols, 1)):
        sums[NAME][:] = full.sum(axis)
    sensitivity = fisher.of(NAME)
    assert sensitivity is not None
    costs = [sensitivity.cols[expert].sum() * 32 for expert in range(2)]
    total = full.sum()
    assert costs == pytest.approx([0.8 * total + 0.1 * total, 0.1 * total], rel=1e-5)


def test_a_tensor_that_does_nothing_costs_nothing() -> None:
    zeros = Fisher({NAME: np.zeros((1, 3), np.float32)}, {NAME: np.zeros((1, 2), np.float32)}, 2, 4)
    sensitivity = zeros.of(NAME)
    assert sensitivity is not None and loss_of(sensitivity, np.ones((1, 3, 2))) == 0
    assert zeros.of("other") is None and NO_FISHER.of(NAME) is None


def test_all_rows_are_estimated_from_a_sample_by_their_weights() -> None:
    rows = np.array([1, 5, 2, 9, 3], np.float32)
    sensitivity = Sensitivity(rows, np.array([[2.0, 0.5]], np.float32))
    error = np.tile(np.array([[1.0, 3.0]], np.float32), (5, 1))  # alike in all rows: exact
    exact = 20 * (2 * 1 + 0.5 * 9)
    for sample in (slice(None), slice(None, None, 2), slice(None, None, 4)):
        weighted = sensitivity.weighing(0, 0, 5, sample)
        assert weighted(error[sample]) == pytest.approx(exact)


@pytest.mark.parametrize(
    ("name", "is_tied", "whole"),
    [
        ("output.weight", False, PRIOR["output"]),
        ("token_embd.weight", False, PRIOR["token_embd"]),
        ("token_embd.weight", True, PRIOR["output"]),
        ("blk.3.attn_v.weight", True, PRIOR["attn_v"]),
        ("blk.3.ffn_gate.weight", True, OTHER_PRIOR),
    ],
)
def test_without_a_fisher_a_whole_error_costs_what_the_role_says(
    name: str, is_tied: bool, whole: float
) -> None:
    importance = np.array([[1.0, 4.0, 0.0]], np.float32)
    sensitivity = prior_sensitivity(name, (2, 3), importance, is_tied=is_tied)
    for scale in (1.0, 100.0):  # of the weights
        values = scale * np.array([[1, 2, 3], [4, 5, 6]], np.float32)
        weighted = sensitivity.weighing(0, 0, 2, slice(None))
        errors, energy = np.array([weighted(values), weighted(values / 10)]), weighted(values)
        assert sensitivity.losses(errors, energy) == pytest.approx([whole, whole / 100], rel=1e-4)


def test_what_is_written_reads_back(tmp_path: Path) -> None:
    fisher, _ = random_fisher()
    write_fisher(fisher, tmp_path / "fisher.npz")
    back = read_fisher(tmp_path / "fisher.npz")
    assert (back.n_sequences, back.n_tokens) == (4, 8)
    assert np.array_equal(back.rows[NAME], fisher.rows[NAME])
    assert np.array_equal(back.cols[NAME], fisher.cols[NAME])
    write_fisher(NO_FISHER, tmp_path / "none.npz")
    assert read_fisher(tmp_path / "none.npz").n_sequences == 0


@pytest.mark.parametrize("data", [b"", b"no array", b"PK\x03\x04 cut short"])
def test_what_is_no_fisher_diagonal_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "fisher.npz").write_bytes(data)
    with pytest.raises(RefusedError, match="is no Fisher diagonal"):
        read_fisher(tmp_path / "fisher.npz")


def test_losses_of_a_tensor_are_those_of_ggufs_own_values(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny(tmp_path / "c", width="wide"))
    tensor = next(
        t for t in map_checkpoint(checkpoint).tensors if t.name == "blk.0.ffn_down.weight"
    )
    random, (rows, cols) = np.random.default_rng(2), tensor.shape
    sensitivity = Sensitivity(random.random(rows, np.float32), random.random((1, cols), np.float32))
    job = Job(("Q5_0", "Q8_0", "source"), 64 * cols, None, sensitivity)
    record = CODECS["nested"].encode(tensor, job, BytesIO(), one_by_one)
    source = tensor.rows().view(np.float32)
    for tier, loss in zip(record.tiers, record.losses, strict=True):
        kept = source
        if tier != "source":
            kind = gguf.GGMLQuantizationType[tier]
            kept = gguf.dequantize(gguf.quantize(source, kind), kind)
        error = sensitivity.rows[:, None] * sensitivity.cols * (kept - source) ** 2
        # ggml's own quantizer rounds a code here and there otherwise than gguf's
        assert loss == pytest.approx(0.5 * error.sum(), rel=1e-3)


def manifest_of(checkpoint: Path, artifact: Path, progress: object = None, **options: object):
    chosen = Options(tiers=("Q4_0", "Q8_0", "source"), measure=False, jobs=1, **options)
    convert(checkpoint, artifact, chosen, progress or Silent())
    return json.loads((artifact / "edgekit.json").read_text(encoding="utf-8"))


def statistics_are_valid(statistics: dict) -> bool:
    schema = json.loads((ROOT / "edgekit" / "manifest.schema.json").read_text(encoding="utf-8"))
    part = schema["properties"]["statistics"] | {"$defs": schema["$defs"]}
    return Draft202012Validator(part).is_valid(statistics)


def test_the_manifest_says_what_losses_are_from(tmp_path: Path, monkeypatch) -> None:
    notes: list[str] = []

    class Listener(Silent):
        def note(self, text: str) -> None:
            notes.append(text)

    checkpoint = tiny(tmp_path / "c")
    (tmp_path / "text").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    text = tmp_path / "text"
    fisher = manifest_of(checkpoint, tmp_path / "a", calibration=text)["statistics"]
    assert (fisher["sensitivity"], fisher["fisher_sequences"]) == ("fisher", 1)
    none = manifest_of(checkpoint, tmp_path / "b", statistics=False)["statistics"]
    assert (none["kind"], none["sensitivity"]) == ("none", "role")
    save = tmp_path / "imatrix.gguf"
    manifest_of(checkpoint, tmp_path / "d", calibration=text, save_imatrix=save)
    given = manifest_of(checkpoint, tmp_path / "e", imatrix=save)["statistics"]
    assert (given["kind"], given["sensitivity"]) == ("imatrix", "fisher")
    monkeypatch.setattr("edgekit.float_model.free_memory", lambda: FreeMemory(1 << 20, "a test"))
    small = manifest_of(checkpoint, tmp_path / "f", Listener(), imatrix=save)["statistics"]
    assert small["sensitivity"] == "role"
    assert "by role" in notes[-1] and "1.00 MiB are free (a test)" in notes[-1]
    assert all(map(statistics_are_valid, (fisher, none, given, small)))


def test_an_imatrix_needs_no_torch(tmp_path: Path, monkeypatch) -> None:
    checkpoint = tiny(tmp_path / "c")
    (tmp_path / "text").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    save = tmp_path / "imatrix.gguf"
    manifest_of(checkpoint, tmp_path / "a", calibration=tmp_path / "text", save_imatrix=save)
    monkeypatch.setitem(sys.modules, "edgekit.fisher", None)  # as where torch is not installed
    made = manifest_of(checkpoint, tmp_path / "b", imatrix=save)
    assert made["statistics"]["sensitivity"] == "role"
