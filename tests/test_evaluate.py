"""Perplexity and KL divergence against torch's own losses on llama-cpp-python's own logits."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
import torch
from models import add_tokenizer, make_checkpoint
from stock import quantize
from tiny_gguf import write_tiny_llama

from edgekit.arch import map_checkpoint
from edgekit.checkpoint import Checkpoint
from edgekit.cli.evaluate import evaluate as evaluate_command
from edgekit.errors import DiskFullError, UsageError
from edgekit.evaluate import Quality, Reference, evaluate, kl_divergence, perplexity
from edgekit.exporters.gguf import TensorInfo, write_gguf
from edgekit.exporters.tokenizer import tokenizer_metadata
from edgekit.llama import MemoryFile
from edgekit.measure import RUNTIMES

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
TEXT = "".join(chr(97 + n) for n in np.random.default_rng(0).integers(0, 26, 900))
CONTEXT = 64


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("gguf") / "f32.gguf", hidden=64, scale=0.12)


@pytest.fixture(scope="module")
def tiers(path: Path) -> dict[str, Path]:
    names = ("Q8_0", "Q5_0", "Q4_0")
    return {name: quantize(path, path.with_name(f"{name}.gguf"), name) for name in names}


@pytest.fixture(autouse=True)
def no_file_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    yield
    assert not list((tmp_path / "temporary").glob("edgekit*"))


def stock_logits(path: Path, text: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and targets of the second half of every chunk, by llama-cpp-python's class."""
    llama = llama_cpp.Llama(
        str(path), n_ctx=CONTEXT, n_threads=1, logits_all=True, verbose=False, type_k=0, type_v=0
    )
    ids, logits, targets = llama.tokenize(text.encode()), [], []
    for start in range(0, len(ids) - CONTEXT + 1, CONTEXT):
        chunk = [1, *ids[start + 1 : start + CONTEXT]]
        llama.reset()
        llama.eval(chunk)
        logits.append(llama.scores[CONTEXT // 2 : CONTEXT - 1].copy())
        targets += chunk[CONTEXT // 2 + 1 :]
    llama.close()
    return torch.from_numpy(np.concatenate(logits)).double(), torch.tensor(targets)


def compare(path: Path, reference: Path, text: str | list[str] = TEXT) -> Quality:
    with Reference.open(reference, text, context=CONTEXT, n_threads=1) as opened:
        return evaluate(path, opened, n_threads=1)


def test_figures_equal_torchs_losses(path: Path, tiers: dict[str, Path]) -> None:
    theirs, targets = stock_logits(path, TEXT)
    ours, _ = stock_logits(tiers["Q4_0"], TEXT)
    kl = torch.nn.functional.kl_div(
        ours.log_softmax(1), theirs.log_softmax(1), reduction="none", log_target=True
    ).sum(1)
    quality = compare(tiers["Q4_0"], path)
    cross_entropy = torch.nn.functional.cross_entropy
    assert quality.n_tokens == len(targets) == 31 * (len(TEXT) // CONTEXT)
    assert quality.ppl == pytest.approx(float(cross_entropy(ours, targets).exp()), rel=1e-4)
    assert quality.ref_ppl == pytest.approx(float(cross_entropy(theirs, targets).exp()), rel=1e-4)
    assert quality.kl_mean == pytest.approx(float(kl.mean()), rel=1e-3)
    assert quality.kl_p99 == pytest.approx(float(kl.quantile(0.99)), rel=1e-2)
    agreement = (ours.argmax(1) == theirs.argmax(1)).double().mean()
    assert quality.top1_agreement == pytest.approx(float(agreement))
    assert quality.kl_error == pytest.approx(float(kl.std(correction=0) / len(kl) ** 0.5), rel=1e-2)


def test_a_model_is_at_no_distance_from_itself(path: Path) -> None:
    quality = compare(path, path)
    assert (quality.kl_mean, quality.kl_p99, quality.top1_agreement) == (0, 0, 1)
    assert quality.ppl == quality.ref_ppl


def test_fewer_bits_are_farther_away(path: Path, tiers: dict[str, Path]) -> None:
    with Reference.open(path, TEXT, context=CONTEXT, n_threads=1) as reference:
        found = [evaluate(tiers[name], reference, n_threads=1) for name in ("Q8_0", "Q5_0", "Q4_0")]
        again = evaluate(tiers["Q5_0"], reference, n_threads=1)
    kls = [quality.kl_mean or 0 for quality in found]
    assert 0 < kls[0] < kls[1] / 10 and kls[1] < kls[2] / 2
    assert found[0].weights_bytes > found[1].weights_bytes > found[2].weights_bytes
    assert again == found[1]


def test_a_virtual_file_is_evaluated_like_its_file(path: Path, tiers: dict[str, Path]) -> None:
    data = MemoryFile(tiers["Q4_0"].read_bytes())
    source = MemoryFile(path.read_bytes())
    with Reference.open(source, TEXT, context=CONTEXT, n_threads=1) as reference:
        assert evaluate(data, reference, n_threads=1) == compare(tiers["Q4_0"], path)


def test_a_checkpoint_is_the_same_reference_as_its_source_tier(tmp_path: Path) -> None:
    folder = add_tokenizer(make_checkpoint("llama", tmp_path / "llama"))
    source = write_source(folder, tmp_path / "source.gguf")
    text = "def add(a, b): return a + b, the lazy dog. " * 20
    quality = compare(source, folder, text)
    assert quality.kl_mean is not None and abs(quality.kl_mean) < 1e-6
    assert quality.ppl == pytest.approx(quality.ref_ppl, rel=1e-4)
    assert quality.top1_agreement == 1


def test_single_texts_are_scored_whole_behind_their_own_bos(path: Path) -> None:
    texts = ["abcdefg", "x" * 100, "", "onceupon"]
    quality = perplexity(path, texts, context=CONTEXT, n_threads=1)
    llama = llama_cpp.Llama(
        str(path), n_ctx=256, n_threads=1, logits_all=True, verbose=False, type_k=0, type_v=0
    )
    losses = []
    for text in filter(None, texts):
        ids = llama.tokenize(text.encode())[:CONTEXT]
        llama.reset()
        llama.eval(ids)
        scores = torch.from_numpy(llama.scores[: len(ids) - 1].copy()).double()
        losses.append(
            torch.nn.functional.cross_entropy(scores, torch.tensor(ids[1:]), reduction="none")
        )
    llama.close()
    want = torch.cat(losses)
    assert quality.n_tokens == len(want) == 7 + 63 + 8
    assert quality.ppl == pytest.approx(float(want.mean().exp()), rel=1e-4)
    assert (quality.ref_ppl, quality.kl_mean) == (None, None)


def test_a_limit_of_tokens_takes_chunks_evenly_from_the_whole_text(path: Path) -> None:
    with Reference.open(path, TEXT, context=CONTEXT, n_tokens=200, n_threads=1) as reference:
        firsts = [bytes((ids[1:] - 3).tolist()) for ids in reference.sequences.ids]
    assert len(firsts) == 3
    places = [TEXT.encode().index(first) // CONTEXT for first in firsts]
    n_chunks = len(TEXT) // CONTEXT
    assert places == [0, round((n_chunks - 1) / 2), n_chunks - 1]


def test_kl_is_that_of_the_definition() -> None:
    p, q = np.array([[0.5, 0.25, 0.25]]), np.array([[0.25, 0.5, 0.25]])
    got = kl_divergence(np.log(p).astype(np.float32) + 5, np.log(q).astype(np.float32) - 3)
    assert got == pytest.approx([0.25 * np.log(2)], rel=1e-6)


def test_what_cannot_be_compared_is_told(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = write_tiny_llama(tmp_path / "words.gguf", words=("ab", "cd"))
    other = write_tiny_llama(tmp_path / "other.gguf", words=("ab", "zz"))
    with pytest.raises(UsageError, match="has 261 tokens, its reference 259"):
        compare(words, path)
    with pytest.raises(UsageError, match="cuts the text into other tokens"):
        compare(other, words, "cdzzab" * 40)
    with pytest.raises(UsageError, match="at least 16 are needed"):
        perplexity(path, "short")
    with pytest.raises(UsageError, match="hold nothing to score"):
        perplexity(path, ["", ""])
    with pytest.raises(UsageError, match="a context of 1 scores nothing"):
        perplexity(path, TEXT, context=1)
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(DiskFullError, match="comparing with the reference's logits needs"):
        compare(path, path)


def write_source(folder: Path, path: Path) -> Path:
    checkpoint = Checkpoint.open(folder)
    mapping = map_checkpoint(checkpoint)
    vocab = tokenizer_metadata(folder, checkpoint.config, mapping.vocab_size)
    infos = [TensorInfo(t.name, t.source_type, t.shape) for t in mapping.tensors]
    with path.open("wb") as file:
        write_gguf(
            file, {**mapping.metadata, **vocab}, infos, ([t.rows()] for t in mapping.tensors)
        )
    return path


@pytest.mark.slow
@pytest.mark.skipif(not DATA.exists(), reason="the shared data is not there")
def test_stories260k_has_its_published_perplexity(tmp_path: Path) -> None:
    source = write_source(DATA / "models" / "stories260K", tmp_path / "stories.gguf")
    text = (DATA / "text" / "tinystories.txt").read_text(encoding="utf-8")
    stories = [story.strip() for story in text.split("<|endoftext|>")[2000:2300]]
    quality = perplexity(source, stories, n_threads=1)
    assert quality.ppl == pytest.approx(4.2009, rel=0.005)


def test_the_command_offers_every_runtime():
    [option] = [p for p in evaluate_command.params if p.name == "runtime"]
    assert set(option.type.choices) == {*RUNTIMES, "onnx"}  # which has artifacts of its own
