"""The Fisher diagonal against torch's autograd on transformers' own model, loaded as a whole."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from bench.checkpoints import Shape
from bench.checkpoints import make_checkpoint as make_random
from models import RUNNABLE, add_tokenizer, make_checkpoint, whole_model

from edgekit.arch import SourceTensor, map_checkpoint
from edgekit.checkpoint import Checkpoint
from edgekit.errors import DoesNotFitError, RefusedError, UsageError
from edgekit.fisher import SEED, FisherCollector, collect_fisher
from edgekit.float_model import FloatModel
from edgekit.sensitivity import Fisher

F64Array = npt.NDArray[np.float64]
IDS = np.random.default_rng(0).integers(3, 300, (3, 24))

Make = Callable[..., Checkpoint]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    made: dict[str, Checkpoint] = {}

    def checkpoint(model_type: str) -> Checkpoint:
        if model_type not in made:
            folder = make_checkpoint(model_type, tmp_path_factory.mktemp("c") / model_type)
            made[model_type] = Checkpoint.open(add_tokenizer(folder))
        return made[model_type]

    return checkpoint


def collect(checkpoint: Checkpoint, ids: np.ndarray = IDS, seed: int = SEED) -> Fisher:
    collector = FisherCollector(FloatModel(checkpoint, map_checkpoint(checkpoint)), seed)
    for row in ids:
        collector.run(row)
    return collector.fisher()


def autograd_squares(checkpoint: Checkpoint) -> dict[str, F64Array]:
    """Squared gradients by parameter, summed over sequences; a tied head is a parameter apart."""
    model, generator = whole_model(checkpoint.folder), torch.Generator().manual_seed(SEED)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    squares = dict[str, F64Array]()
    for ids in IDS:
        logits = model(torch.from_numpy(ids[None])).logits[0]
        sampled = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)
        likelihood = logits.log_softmax(-1).gather(1, sampled).sum()
        names, parameters = zip(*model.named_parameters(), strict=True)
        for name, grad in zip(names, torch.autograd.grad(likelihood, parameters), strict=True):
            squares[name] = squares.get(name, 0) + grad.double().numpy() ** 2
    return squares


def of_gguf(tensor: SourceTensor, squares: dict[str, F64Array]) -> F64Array:
    """The squares of a GGUF tensor ``[experts, rows, cols]``, from those of transformers' names."""
    if len(tensor.shape) == 3:
        prefix = f"model.layers.{tensor.name.split('.')[1]}.mlp.experts."
        if "down" in tensor.name:
            return squares[prefix + "down_proj"]
        gate, up = np.split(squares[prefix + "gate_up_proj"], 2, axis=1)
        return gate if "gate" in tensor.name else up
    (piece,) = tensor.pieces
    name = piece.tensor
    found = squares[name][piece.first : piece.first + piece.n_rows]
    if name == "model.embed_tokens.weight" and "lm_head.weight" not in tensor.checkpoint.tensors:
        found = found + squares["lm_head.weight"]
    if tensor.heads:  # as in llama.cpp's conversion of Llama
        paired = found.reshape(tensor.heads, 2, -1, found.shape[-1])
        found = paired.swapaxes(1, 2).reshape(found.shape)
    return found[None]


@pytest.mark.parametrize("model_type", RUNNABLE)
def test_sums_equal_those_of_autograd_on_the_whole_model(model_type: str, make: Make) -> None:
    checkpoint = make(model_type)
    ours, squares = collect(checkpoint), autograd_squares(checkpoint)
    for tensor in map_checkpoint(checkpoint).tensors:
        assert (tensor.name in ours.rows) == tensor.quantizable
        if tensor.quantizable:
            wanted = of_gguf(tensor, squares)
            for got, axis in ((ours.rows, 2), (ours.cols, 1)):
                sums = wanted.sum(axis)
                np.testing.assert_allclose(got[tensor.name], sums, 2e-3, 1e-6 * sums.max())
    assert (ours.n_sequences, ours.n_tokens) == (3, 24)


def test_that_of_the_head_is_the_covariance_of_a_softmax(make: Make) -> None:
    """Logits are W x, so in closed form F[i, j] = sum over tokens of p_i (1 - p_i) x_j^2."""
    checkpoint, n_draws = make("mistral"), 300
    ours = collect(checkpoint, np.repeat(IDS[:1], n_draws, axis=0), seed=1)
    model = FloatModel(checkpoint, map_checkpoint(checkpoint))
    hidden = model.hidden(IDS[:1])[0].double().numpy()
    logits = torch.from_numpy(model.logits(IDS[:1])[0]).double()
    chances = logits.softmax(-1).numpy()
    wanted = (chances * (1 - chances)).T @ hidden**2
    # a square of a Gaussian has a relative deviation of sqrt(2), columns are means over all rows
    np.testing.assert_allclose(ours.cols["output.weight"][0] / n_draws, wanted.sum(0), rtol=0.1)
    by_size = np.argsort(wanted.sum(1))  # a token that is rarely drawn is known badly alone
    got = ours.rows["output.weight"][0][by_size].reshape(10, -1).sum(1) / n_draws
    np.testing.assert_allclose(got, wanted.sum(1)[by_size].reshape(10, -1).sum(1), rtol=0.15)


@pytest.mark.parametrize("name", ["self_attn.v_proj", "mlp.down_proj", "mlp.up_proj"])
def test_a_loss_is_the_kl_divergence_that_a_small_error_makes(name: str, make: Make) -> None:
    checkpoint = make("qwen2")
    gguf = {"v_proj": "attn_v", "down_proj": "ffn_down", "up_proj": "ffn_up"}[name.split(".")[1]]
    sensitivity = collect(checkpoint, np.tile(IDS, (8, 1))).of(f"blk.1.{gguf}.weight")
    assert sensitivity is not None
    model, random = whole_model(checkpoint.folder), torch.Generator().manual_seed(2)
    weight, kls, losses = model.model.layers[1].get_submodule(name).weight.detach(), [], []
    with torch.no_grad():
        log_p = model(torch.from_numpy(IDS)).logits.log_softmax(-1)
        for _ in range(12):
            error = 1e-2 * torch.randn(weight.shape, generator=random)
            weight += error
            log_q = model(torch.from_numpy(IDS)).logits.log_softmax(-1)
            weight -= error
            kls.append(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()))
            weighted = sensitivity.weighing(0, 0, len(weight), slice(None))(error.numpy())
            losses.append(float(sensitivity.losses(np.array([weighted]), 1.0)[0]))
    assert np.mean(losses) == pytest.approx(np.mean(kls), rel=0.2)


def test_the_same_seed_draws_the_same_another_one_does_not(make: Make) -> None:
    first, again, other = (collect(make("llama"), seed=seed) for seed in (0, 0, 1))
    name = "blk.0.ffn_up.weight"
    assert np.array_equal(first.rows[name], again.rows[name])
    assert not np.allclose(first.rows[name], other.rows[name], rtol=1e-3)


def test_layers_leave_no_weights_behind(make: Make) -> None:
    model = FloatModel(make("mixtral"), map_checkpoint(make("mixtral")))
    FisherCollector(model).run(IDS[0])
    assert all(parameter.is_meta for parameter in list(model.model.parameters())[1:])


def test_a_text_becomes_sums_and_progress_counts_sequences(make: Make, tmp_path: Path) -> None:
    steps: list[object] = []

    class Listener:
        def start(self, stage: str, total: int) -> None:
            steps.append((stage, total))

        def advance(self, amount: int) -> None:
            steps.append(amount)

        def note(self, text: str) -> None:
            raise AssertionError(text)

    text = tmp_path / "some.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 40, encoding="utf-8")
    made = collect_fisher(
        make("llama"), text, sequence_tokens=64, max_sequences=3, progress=Listener()
    )
    assert (made.n_sequences, made.n_tokens) == (3, 64)
    assert steps == [("sensitivity", 3), 1, 1, 1]
    text.write_text("too short", encoding="utf-8")
    with pytest.raises(UsageError, match="at least 16 are needed"):
        collect_fisher(make("llama"), text)


def test_a_layer_that_does_not_fit_with_its_gradients_is_told(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgekit.devices.memory import FreeMemory

    monkeypatch.setattr("edgekit.float_model.free_memory", lambda: FreeMemory(1 << 20, "a test"))
    with pytest.raises(DoesNotFitError, match=r"forward and back needs .* free \(a test\); close"):
        collect_fisher(make("llama"))


def test_what_is_not_finite_is_refused(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = add_tokenizer(make_checkpoint("llama", tmp_path / "nan"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][5, 5] = np.inf
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RefusedError, match="its logits are not finite; the weights are broken"):
        collect(Checkpoint.open(folder))
    tensors["model.layers.0.mlp.up_proj.weight"][5, 5] = 0
    tensors["model.layers.0.self_attn.v_proj.weight"] *= 1e22
    tensors["model.layers.0.self_attn.o_proj.weight"] *= 1e-22  # the same function
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RefusedError, match=r"the gradient of '.*' is not finite"):
        collect(Checkpoint.open(folder))


SHAPE = Shape(
    num_hidden_layers=2,
    hidden_size=512,
    intermediate_size=2048,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
    vocab_size=512,
)
LAYER_BYTES = 4 * (512 * (2 * 512 + 2 * 128) + 3 * 512 * 2048)
MEASURED = """
import sys, threading, time
from pathlib import Path
from edgekit.checkpoint import Checkpoint
from edgekit.fisher import collect_fisher
peak = 0  # without pages of the checkpoint's file, which the system takes back when it likes
def watch():
    global peak
    while True:
        status = Path("/proc/self/status").read_text()
        peak = max(peak, int(status.split("RssAnon:")[1].split()[0]))
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
collect_fisher(Checkpoint.open(Path(sys.argv[1])), max_sequences=2, sequence_tokens=256)
print(peak)
"""


def peak_bytes(folder: Path, shape: Shape) -> int:
    checkpoint = make_random(folder / "checkpoint", shape)
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",  # what is freed goes back: heaps of small tensors do not
    }
    result = subprocess.run(
        [sys.executable, "-c", MEASURED, checkpoint],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert result.returncode == 0, result.stderr
    return 1024 * json.loads(result.stdout)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_number_of_layers(tmp_path: Path) -> None:
    few = peak_bytes(tmp_path / "few", SHAPE)
    many = peak_bytes(tmp_path / "many", replace(SHAPE, num_hidden_layers=8))
    assert many - few < LAYER_BYTES / 2  # six layers more, and half a MiB of input for each
