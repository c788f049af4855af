"""The sample models and texts: what they are, and the code that made them."""

import json
import math
import platform
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from edgekit.samples import FOLDER, calibration_text, corpus, heldout_text, models, texts, train
from edgekit.samples.bits import model_bits, order0_bits, xz_bits
from edgekit.samples.muon import Muon, orthogonalize
from edgekit.samples.packing import BLOCK, batch
from edgekit.samples.vocabulary import train_tokenizer

NAMES = sorted(models.SAMPLES)
# Of the first 6000 bytes of heldout.txt; measured 1.484 and 1.378.
BITS_PER_BYTE = {"tiny-llama": 1.5, "tiny-moe": 1.4}
PROMPT = "def read(path):\n"

seeded = torch.Generator().manual_seed


@pytest.fixture(scope="module", params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def loaded(name: str) -> tuple[Any, Any]:
    folder = FOLDER / name
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def trained() -> list[corpus.Document]:
    return corpus.training_documents()


def shingles(text: str, n_lines: int = 5) -> set[str]:
    """Every run of ``n_lines`` lines that is not mostly blank."""
    lines = text.splitlines()
    runs = ("\n".join(lines[i : i + n_lines]) for i in range(len(lines) - n_lines + 1))
    return {run for run in runs if len(run) > 60}


# The corpus


def test_held_out_modules_are_not_trained_on(trained: list[corpus.Document]):
    names = {document.name for document in trained}
    held = {document.name for document in corpus.heldout_documents()}
    wanted = {"os", "argparse", "json", "json.decoder", "textwrap", "statistics", "asyncio.queues"}
    assert wanted <= held
    assert not names & held
    assert {"asyncio.events", "posixpath", "topic:assert"} <= names


def test_a_name_holds_out_what_is_below_it_and_no_namesake():
    assert corpus.is_held_out("json.tool")
    assert not corpus.is_held_out("json5")
    assert not corpus.is_held_out("asyncio")


def test_tables_tests_and_other_packages_are_skipped():
    paths = ("test/test_os.py", "encodings/cp437.py", "site-packages/a/b.py", "html/entities.py")
    assert all(corpus.is_skipped(Path(path)) for path in paths)
    assert not corpus.is_skipped(Path("html/parser.py"))


def test_a_text_that_is_there_twice_is_taken_once(tmp_path: Path):
    for file in ("a.txt", "b.txt"):
        (tmp_path / file).write_text("once upon a time\n")
    documents = corpus.training_documents([tmp_path / "a.txt", tmp_path / "b.txt"])
    assert [d.name for d in documents if d.name.startswith("file:")] == ["file:a.txt"]


# The texts


def test_calibration_and_heldout_text_share_no_passage():
    calibration, heldout = shingles(calibration_text()), shingles(heldout_text())
    assert len(calibration) > 7000 and len(heldout) > 3000
    assert not calibration & heldout


def test_heldout_text_comes_from_heldout_modules_only(trained: list[corpus.Document]):
    if platform.python_version_tuple()[:2] != ("3", "11"):
        pytest.skip("the excerpts are from Python 3.11")
    heldout = shingles(heldout_text(), 8)
    assert not [d.name for d in trained if shingles(d.text, 8) & heldout]


@pytest.mark.skipif(platform.python_version() != "3.11.7", reason="excerpts are from 3.11.7")
def test_the_texts_are_what_the_script_writes(trained: list[corpus.Document]):
    assert texts.calibration(trained) == calibration_text()
    assert texts.heldout(corpus.heldout_documents()) == heldout_text()


def test_an_excerpt_is_whole_lines_from_a_top_level_block():
    text = "import a\n\n\ndef f():\n    return 1\n\n\ndef g():\n    return 2\n"
    got = {texts.excerpt(corpus.Document(str(i), text), 22) for i in range(20)}
    assert got == {
        "import a\n\n\ndef f():\n\n",
        "def f():\n    return 1\n\n",
        "def g():\n    return 2\n\n",
    }


# The checkpoints


def test_config_is_that_of_a_published_checkpoint(name: str):
    config = json.loads((FOLDER / name / "config.json").read_text())
    shared = {"hidden_size": 256, "vocab_size": 4096, "head_dim": 64, "num_key_value_heads": 2}
    moe = {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "mlp_only_layers": [],
    }
    own = {
        "tiny-llama": {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True},
        "tiny-moe": {"architectures": ["Qwen3MoeForCausalLM"], "tie_word_embeddings": False, **moe},
    }
    wanted = {**shared, **own[name], "rope_theta": 10000.0}
    assert {key: config.get(key) for key in wanted} == wanted


def test_weights_are_bfloat16_rows_of_whole_super_blocks(name: str):
    with safe_open(FOLDER / name / "model.safetensors", "pt") as weights:
        tensors = {key: weights.get_tensor(key) for key in weights.keys()}  # noqa: SIM118
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert all(tensor.shape[-1] % 256 == 0 for tensor in tensors.values() if tensor.ndim > 1)
    assert not any(key.endswith(("gate_up_proj", "experts.down_proj")) for key in tensors)
    assert ("model.layers.3.mlp.experts.7.gate_proj.weight" in tensors) == (name == "tiny-moe")


def test_both_checkpoints_fit_in_32_megabytes():
    sizes = [(FOLDER / name / "model.safetensors").stat().st_size for name in NAMES]
    assert 24e6 < sum(sizes) <= 32e6


def test_tokenizer_gives_every_byte_back(name: str, loaded: tuple[Any, Any]):
    tokenizer, text = loaded[1], heldout_text()[:20_000] + "naïve 漢字 🙂\t\r\n 1234567"
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    assert len(tokenizer) == 4096
    assert tokenizer.decode(ids) == text
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("1234567")
    wanted = {"tiny-llama": ["123", "456", "7"], "tiny-moe": list("1234567")}
    assert [piece for piece, _ in pieces] == wanted[name]


def test_only_the_llama_starts_with_a_token(name: str, loaded: tuple[Any, Any]):
    first = loaded[1].convert_ids_to_tokens(loaded[1]("def")["input_ids"])[0]
    assert first == {"tiny-llama": "<|begin_of_text|>", "tiny-moe": "def"}[name]
    assert loaded[1].eos_token_id == loaded[0].generation_config.eos_token_id == 4095


def test_model_predicts_heldout_text_far_better_than_its_bytes(name: str, loaded: tuple[Any, Any]):
    text = heldout_text()[:6000]
    assert model_bits(*loaded, text) < BITS_PER_BYTE[name] < order0_bits(text) / 2


def test_greedy_generation_repeats_itself_and_writes_python(loaded: tuple[Any, Any]):
    model, tokenizer = loaded
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 16, "do_sample": False}
    runs = [model.generate(ids, pad_token_id=4095, **options)[0].tolist() for _ in range(2)]
    assert runs[0] == runs[1]
    assert tokenizer.decode(runs[0][ids.shape[1] :]).startswith("    ")


def test_every_expert_is_used(loaded: tuple[Any, Any]):
    model, tokenizer = loaded
    if model.config.model_type != "qwen3_moe":
        pytest.skip("no experts")
    ids = tokenizer(heldout_text()[:30_000], return_tensors="pt", verbose=False)["input_ids"]
    rows = ids[:, : ids.shape[1] // 512 * 512].view(-1, 512)
    with torch.inference_mode():
        routers = model(input_ids=rows, output_router_logits=True).router_logits
    for logits in routers:
        counts = torch.bincount(logits.topk(2).indices.flatten(), minlength=8)
        assert counts.min() > 0.005 * counts.sum()  # an even share is 0.125


# Measuring


def test_bits_of_a_model_that_knows_nothing_are_those_of_a_uniform_choice(loaded: tuple[Any, Any]):
    class Uniform(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, input_ids: torch.Tensor) -> Any:
            logits = torch.zeros(*input_ids.shape, 4096)
            return type("Output", (), {"logits": logits})

    text = heldout_text()[:9000]  # three windows
    n_tokens = len(loaded[1](text, add_special_tokens=False, verbose=False)["input_ids"])
    want = n_tokens * 12 / len(text.encode())
    assert n_tokens > 2 * 1024
    assert model_bits(Uniform(), loaded[1], text) == pytest.approx(want, rel=1e-6)


def test_bits_of_bytes():
    assert order0_bits("abcd" * 8) == 2.0
    text = heldout_text()[:5000]
    assert xz_bits(text, [corpus.Document("itself", text)]) < 0.1 < xz_bits(text)


# The optimizer and the loop


def test_muon_steps_like_the_one_of_torch():
    start = torch.randn(48, 32, generator=seeded(0))
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    optimizers = [
        Muon([ours], lr=0.1),
        torch.optim.Muon([theirs], lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    ]
    for step in range(3):
        grad = torch.randn(48, 32, generator=seeded(1 + step))
        for param, optimizer in zip((ours, theirs), optimizers, strict=True):
            param.grad = grad.clone()
            optimizer.step()
    # torch iterates in bfloat16, 2**-9 per operation; five steps of three products each
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 15 * 2**-9 * moved


def test_orthogonalize_takes_each_matrix_of_a_stack_on_its_own():
    stack = (
        torch.randn(3, 8, 16, generator=seeded(0)) * torch.tensor([1e-3, 1.0, 1e3])[:, None, None]
    )
    together = orthogonalize(stack)
    for matrix, got in zip(stack, together, strict=True):
        torch.testing.assert_close(got, orthogonalize(matrix))
        assert 0.5 < torch.linalg.svdvals(got).min() <= torch.linalg.svdvals(got).max() < 1.5


def test_an_even_router_has_balance_one_and_a_stuck_one_more():
    even = 10 * torch.eye(4).repeat(4, 1) + 9 * torch.eye(4).roll(1, 1).repeat(4, 1)
    stuck = torch.tensor([50.0, 49.0, 0.0, 0.0]).repeat(16, 1)
    assert train.balance_loss((even,), 2).item() == pytest.approx(1.0)
    assert train.balance_loss((stuck,), 2).item() == pytest.approx(2.0)


def test_learning_rate_warms_up_stays_and_ends_at_zero():
    rates = [train.learning_rate(p) for p in (0.0, 0.01, 0.3, 0.5, 0.75, 1.0)]
    assert rates == pytest.approx([0.05, 0.55, 1.0, 1.0, 0.5, 0.0])


def test_an_epoch_sees_every_token_once_and_no_two_are_alike():
    stream = np.arange(9 * BLOCK + 1, dtype=np.uint16)
    epochs = [
        [batch(stream, step, 2 * BLOCK, 0, None) for step in at] for at in (range(4), range(4, 8))
    ]
    for rows in epochs:
        inputs = np.concatenate([row[:, :-1].flatten() for row in rows])
        assert len(set(inputs.tolist())) == len(inputs) == 8 * BLOCK
    assert not torch.equal(epochs[0][0], epochs[1][0])
    assert all(torch.equal(row[:, 1:], row[:, :-1] + 1) for row in epochs[0])


def test_with_a_start_token_every_row_begins_with_it():
    rows = batch(np.arange(5 * BLOCK, dtype=np.uint16), 3, BLOCK, 0, bos=7)
    assert rows.shape == (1, BLOCK + 1)
    assert rows[0, 0] == 7 and torch.equal(rows[0, 2:], rows[0, 1:-1] + 1)


def tiny_run(folder: Path, steps: int) -> train.Run:
    """A run over 40 kB of text, of a model with one layer of 32 channels."""
    config = LlamaConfig(
        vocab_size=4096, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, bos_token_id=4094, eos_token_id=4095,
    )  # fmt: skip
    llama = models.tiny_llama()
    sample = models.Sample("tiny", config, llama.split, llama.bos, llama.eos, nfc=False)
    documents = [corpus.Document("text", calibration_text()[:40_000])]
    tokenizer = train_tokenizer(sample, documents)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    stream = train.pack(tokenizer, documents)
    settings = train.Settings(steps=steps, batch_tokens=BLOCK)
    return train.Run(sample, settings, model, tokenizer, documents, stream, folder / "run.pt")


def test_a_resumed_run_ends_where_an_undisturbed_one_does(tmp_path: Path):
    whole = tiny_run(tmp_path, steps=4)
    want = [line["loss"] for line in train.train(whole)]
    first, second = tiny_run(tmp_path, steps=4), tiny_run(tmp_path, steps=4)
    got = [next(lines)["loss"] for lines in [train.train(first)] for _ in range(2)]
    first.save()
    second.load()
    got += [line["loss"] for line in train.train(second)]
    assert got == want
    assert want[-1] < want[0] < 1.1 * math.log(4096)


def test_help_has_an_example_and_a_wrong_name_is_refused():
    shown = CliRunner().invoke(train.main, ["--help"])
    assert "python -m samples.train tiny-llama --state runs" in shown.output
    refused = CliRunner().invoke(train.main, ["tiny-lama", "--state", "a", "--output", "b"])
    assert refused.exit_code == 2 and "tiny-lama" in refused.output
