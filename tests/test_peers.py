"""The comparison's page says who wins, whoever it is; its divergence is the one of others."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent / "bench" / "peers"))
from commands import Failed, timed
from compare import kl_divergence
from table import page, winner


def row(kl: float, decode: float = 100.0, ours: float = 0.02, error: float = 1e-4):
    mine = {"weights_bytes": 90, "kl_mean": ours, "kl_error": error, "load_seconds": 0.2}
    mine |= {"prompt_tokens_per_s": 500.0, "decode_tokens_per_s": 100.0, "peak_bytes": 5 << 20}
    theirs = mine | {"kl_mean": kl, "decode_tokens_per_s": decode, "weights_bytes": 100}
    theirs |= {"tool": "peer", "name": "file", "convert_seconds": 3.0, "convert_peak_bytes": 7}
    return theirs | {"edgekit": mine}


def body(*rows, **failures: str):
    return {
        "sample": "tiny-llama", "n_tokens": 1020, "date": "2026-01-01", "machine": "a machine",
        "edgekit": {"seconds": 40.0, "peak_bytes": 1 << 20, "artifact_bytes": 1234},
        "versions": {"peer": ["peer==1.0"]}, "models": list(rows), "failures": failures,
    }  # fmt: skip


def test_the_lower_divergence_wins_unless_errors_overlap():
    assert winner(row(0.03)) == "edgekit"
    assert winner(row(0.01)) == "**peer**"
    assert winner(row(0.0201, error=1e-3)) == "neither, within two errors"
    assert winner(row(0.5) | {"edgekit": None}) == "**peer**: edgekit's least is larger"


def test_where_a_peer_wins_the_page_says_so():
    text = page(body(row(0.01, decode=150.0)))
    assert "- peer file: better quality at its bytes." in text
    assert "- peer file decodes faster: 150 against 100 tokens/s." in text
    assert "made faster than an artifact for all sizes: 3.0 s by peer, against 40.0 s." in text
    assert "memory to make than an artifact for all sizes: 0 MiB by peer, against 1 MiB." in text
    assert "smaller than an artifact for all sizes: 100 bytes by peer, against 1,234 bytes." in text
    assert "reads prompts faster" not in text
    behind = page(body(row(0.03, decode=90.0)))
    assert "better quality" not in behind and "decodes faster" not in behind
    costly = row(0.03) | {"convert_seconds": 50.0, "convert_peak_bytes": 2 << 20}
    assert "all sizes: 100 bytes" in page(body(costly))
    assert "to make than" not in page(body(costly)) and "made faster" not in page(body(costly))


def test_a_peer_that_did_not_run_is_listed_with_its_words():
    assert "- other did not run to its end here: `no such GPU`" in page(
        body(row(0.03), other="no such GPU")
    )


def test_the_page_is_made_of_the_data_beside_it():
    docs = Path(__file__).resolve().parent.parent / "docs"
    data = json.loads((docs / "compare.json").read_text())
    assert (docs / "compare.md").read_text() == page(data)


def test_a_commands_peak_is_its_own(tmp_path):
    held = np.ones(100 << 20, np.uint8)  # what this process holds must not count
    hold = "x = bytearray(60 << 20); x[::4096] = b'x' * len(x[::4096])"
    _, little = timed([sys.executable, "-I", "-c", "pass"], tmp_path / "little.log")
    _, more = timed([sys.executable, "-I", "-c", hold], tmp_path / "more.log")
    assert little < held.nbytes // 2 < 60 << 20 < more


def test_a_command_that_fails_is_told_by_its_last_words(tmp_path):
    words = [sys.executable, "-c", "print('working'); raise SystemExit('no such wheel')"]
    with pytest.raises(Failed, match=r"^no such wheel$"):
        timed(words, tmp_path / "log")


def test_divergence_is_torchs():
    random = np.random.default_rng(0)
    p, q = random.standard_normal((2, 50, 30)).astype(np.float32) * 3
    logs = [torch.log_softmax(torch.tensor(x, dtype=torch.float64), 1) for x in (p, q)]
    theirs = torch.nn.functional.kl_div(logs[1], logs[0], log_target=True, reduction="none").sum(1)
    mean, error = kl_divergence(p, q)
    np.testing.assert_allclose(mean, theirs.mean().item())
    np.testing.assert_allclose(error, theirs.std(correction=0).item() / 50**0.5)
    padded = np.concatenate([q, np.full((50, 2), 9.0, np.float32)], axis=1)  # of a vocabulary
    assert kl_divergence(p, padded) == (mean, error)
