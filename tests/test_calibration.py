"""Statistics of the float model against hooks on transformers' own model, loaded by itself."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from models import RUNNABLE, add_tokenizer, make_checkpoint, whole_model

from edgekit.arch import ARCHS, map_checkpoint
from edgekit.calibration import Collector, calibrate
from edgekit.checkpoint import Checkpoint
from edgekit.errors import DoesNotFitError, RefusedError, UsageError
from edgekit.float_model import FloatModel, build
from edgekit.imatrix import Imatrix, read_imatrix, write_imatrix

IDS = np.random.default_rng(0).integers(3, 300, (2, 24))
MOE = [name for name in RUNNABLE if ARCHS[name].expert_ff]

Make = Callable[..., Checkpoint]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    made: dict[str, Checkpoint] = {}

    def checkpoint(model_type: str, dtype: str = "float32") -> Checkpoint:
        key = f"{model_type}-{dtype}"
        if key not in made:
            folder = make_checkpoint(model_type, tmp_path_factory.mktemp("c") / key, dtype)
            made[key] = Checkpoint.open(add_tokenizer(folder))
        return made[key]

    return checkpoint


def collect(checkpoint: Checkpoint, *batches: np.ndarray) -> Imatrix:
    collector = Collector(FloatModel(checkpoint, map_checkpoint(checkpoint)))
    for ids in batches:
        collector.run(ids)
    return Imatrix(collector.entries())


@pytest.mark.parametrize("model_type", RUNNABLE)
def test_one_layer_at_a_time_computes_what_transformers_does(model_type: str, make: Make) -> None:
    checkpoint = make(model_type, "bfloat16" if model_type in ("llama", "qwen3_moe") else "float32")
    model = FloatModel(checkpoint, map_checkpoint(checkpoint))
    with torch.no_grad():
        want = whole_model(checkpoint.folder)(torch.from_numpy(IDS)).logits.numpy()
    np.testing.assert_allclose(model.logits(IDS), want, rtol=0, atol=1e-5)
    assert all(parameter.is_meta for parameter in list(model.model.parameters())[1:])


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "phi3", "gemma3_text", "qwen2_moe"])
def test_dense_statistics_equal_hooks_on_every_linear_module(model_type: str, make: Make) -> None:
    checkpoint = make(model_type)
    model, sums = whole_model(checkpoint.folder), dict[str, np.ndarray]()

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: object, inputs: tuple[torch.Tensor]) -> None:
            flat = inputs[0].reshape(-1, inputs[0].shape[-1]).double()
            sums[name] = (flat**2).sum(0).numpy()

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(keep(f"{name}.weight"))
    with torch.no_grad():
        model(torch.from_numpy(IDS))
    ours = collect(checkpoint, IDS).entries
    n_compared = 0
    sums["model.embed_tokens.weight"] = sums["lm_head.weight"]  # where the embedding is the head
    for tensor in map_checkpoint(checkpoint).tensors:
        if tensor.name in ours and len(tensor.shape) == 2:
            entry = ours[tensor.name]
            assert entry.counts.tolist() == [IDS.size]
            np.testing.assert_allclose(entry.sums[0], sums[tensor.pieces[0].tensor], rtol=2e-5)
            n_compared += 1
    assert ("token_embd.weight" in ours) == (model_type == "gemma3_text")
    n_linear = len(sums) - 1
    # a gate of one row, as that of a shared expert, is 1-D for llama.cpp: not quantized
    assert n_compared == n_linear - sum("shared_expert_gate" in name for name in sums)


@pytest.mark.parametrize("model_type", MOE)
def test_expert_statistics_equal_a_loop_over_tokens(model_type: str, make: Make) -> None:
    checkpoint = make(model_type)
    model, seen = whole_model(checkpoint.folder), list[tuple[torch.Tensor, torch.Tensor]]()
    experts = model.model.layers[1].mlp.experts
    experts.register_forward_pre_hook(lambda _, args: seen.append(args[:2]))
    with torch.no_grad():
        model(torch.from_numpy(IDS))
    (hidden, chosen) = seen[0]
    n_experts, width, _ = experts.gate_up_proj.shape
    gate_up = np.zeros((n_experts, hidden.shape[-1]))
    down, counts = np.zeros((n_experts, width // 2)), np.zeros(n_experts)
    for x, used in zip(hidden, chosen.tolist(), strict=True):
        for expert in used:
            both = experts.gate_up_proj[expert].detach() @ x
            product = torch.nn.functional.silu(both[: width // 2]) * both[width // 2 :]
            gate_up[expert] += x.double().numpy() ** 2
            down[expert] += product.double().numpy() ** 2
            counts[expert] += 1
    ours = collect(checkpoint, IDS).entries
    for role, sums in (("gate", gate_up), ("up", gate_up), ("down", down)):
        entry = ours[f"blk.1.ffn_{role}_exps.weight"]
        np.testing.assert_allclose(entry.sums, sums, rtol=1e-4, atol=1e-6)
        assert entry.counts.tolist() == counts.tolist()
    assert counts.sum() == IDS.size * chosen.shape[1]


def test_statistics_of_batches_add_up(make: Make) -> None:
    whole = collect(make("mixtral"), IDS).entries
    parts = collect(make("mixtral"), IDS[:1], IDS[1:]).entries
    for name, entry in whole.items():
        np.testing.assert_allclose(parts[name].sums, entry.sums, rtol=1e-5)
        assert parts[name].counts.tolist() == entry.counts.tolist()


def test_a_text_becomes_an_imatrix_file(make: Make, tmp_path: Path) -> None:
    checkpoint = make("qwen3_moe")
    text = tmp_path / "some.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 40, encoding="utf-8")
    ours = calibrate(checkpoint, text, chunk_tokens=64, max_chunks=5)
    assert (ours.datasets, ours.chunk_count, ours.chunk_size) == (("some.txt",), 5, 64)
    names = {tensor.name for tensor in map_checkpoint(checkpoint).tensors if tensor.quantizable}
    assert set(ours.entries) == names - {"token_embd.weight"}
    assert ours.entries["blk.0.attn_q.weight"].counts.tolist() == [5 * 64]
    write_imatrix(ours, tmp_path / "imatrix.gguf")
    back = read_imatrix(tmp_path / "imatrix.gguf").entries
    assert all(np.array_equal(back[name].sums, entry.sums) for name, entry in ours.entries.items())


def test_the_default_text_comes_with_edgekit_and_progress_counts_chunks(make: Make) -> None:
    steps: list[object] = []

    class Listener:
        def start(self, stage: str, total: int) -> None:
            steps.append((stage, total))

        def advance(self, amount: int) -> None:
            steps.append(amount)

        def note(self, text: str) -> None:
            raise AssertionError(text)

    ours = calibrate(make("llama"), chunk_tokens=32, max_chunks=3, progress=Listener())
    assert ours.chunk_count == 3
    assert steps[0] == ("calibrate", 3) and sum(steps[1:]) == 3


def test_a_text_that_is_short_or_no_text_is_told(make: Make, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("too short", encoding="utf-8")
    with pytest.raises(UsageError, match=r"short\.txt has \d+ tokens, at least 16 are needed"):
        calibrate(make("llama"), text)
    text.write_text("one chunk that is shorter than 512 tokens " * 3, encoding="utf-8")
    assert calibrate(make("llama"), text).chunk_count == 1
    text.write_bytes(b"\xff\xfe" * 100)
    with pytest.raises(RefusedError, match="is not UTF-8"):
        calibrate(make("llama"), text)
    with pytest.raises(UsageError, match="is no file"):
        calibrate(make("llama"), tmp_path / "absent.txt")


def test_a_layer_that_does_not_fit_is_told_before_anything_runs(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgekit.devices.memory import FreeMemory

    monkeypatch.setattr("edgekit.float_model.free_memory", lambda: FreeMemory(1 << 20, "a test"))
    with pytest.raises(DoesNotFitError, match=r"1\.00 MiB are free \(a test\); give --imatrix"):
        calibrate(make("llama"))


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = add_tokenizer(make_checkpoint("llama", tmp_path / "nan"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][5, 5] = np.inf
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RefusedError, match=r"the input of 'blk\.0\.ffn_down\.weight' is not fin"):
        collect(Checkpoint.open(folder), IDS)


def test_a_config_that_names_code_runs_none(tmp_path: Path) -> None:
    import json

    folder = add_tokenizer(make_checkpoint("llama", tmp_path / "evil"))
    canary = tmp_path / "canary"
    (folder / "modeling_evil.py").write_text(f"open({str(canary)!r}, 'w').close()")
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "modeling_evil.E"},
        "_attn_implementation_internal": "someone/kernel",
        "_attn_implementation": "someone/kernel",
        "attn_implementation": "someone/kernel",
        "experts_implementation": "someone/kernel",
    }
    (folder / "config.json").write_text(json.dumps(config))
    collect(Checkpoint.open(folder), IDS)
    assert not canary.exists()


def test_transformers_does_not_write_into_the_config() -> None:
    config = {"rope_theta": 5e5, "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32,
              "num_hidden_layers": 1, "num_attention_heads": 2, "rope_scaling": {
                  "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                  "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}  # fmt: skip
    before = deepcopy(config)
    build("LlamaForCausalLM", config)
    assert config == before
