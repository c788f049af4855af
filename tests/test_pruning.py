"""Pruned checkpoints load in transformers and llama.cpp; cases whose answer is known beforehand."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from converted import tiny
from models import VOCAB, make_checkpoint
from safetensors.torch import load_file, save_file
from test_parity import check

from edgekit.arch import map_checkpoint
from edgekit.checkpoint import Checkpoint
from edgekit.errors import UnsupportedError
from edgekit.pruning.cut import Cut, candidates, cut_config, n_parameters, ratio_of, whole
from edgekit.pruning.layers import Layers
from edgekit.pruning.metrics import METRICS
from edgekit.pruning.prune import Options, Report, prune
from edgekit.pruning.search import Probe, best_cut, evolve, removal_order
from edgekit.pruning.stages import EXPERT_DOWN, OUT, Recipe
from edgekit.pruning.taylor import effects
from edgekit.pruning.walk import Walk
from edgekit.pruning.weights import read_layer

IDS = np.random.default_rng(0).integers(3, VOCAB, (16, 64))


def opened(folder: Path) -> tuple[Checkpoint, Layers]:
    checkpoint = Checkpoint.open(folder)
    return checkpoint, Layers(map_checkpoint(checkpoint), checkpoint.config)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {
        k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()
    }


def theirs(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def options(ratio: float, **more: Any) -> Options:
    return Options(**{"ratio": ratio, "tokens": 2048, **more})


# per architecture: what is asked for, and the fields of the config that must change
CUTS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, int]]] = {
    "llama": ({}, {"ratio": 0.22, "n_removed": 0}, {"intermediate_size": 256}),
    "qwen3": (
        {"num_hidden_layers": 3, "head_dim": 64},
        {"ratio": 0.5, "n_removed": 1},
        {"num_hidden_layers": 2, "num_key_value_heads": 2},
    ),
    "gemma2": (
        {"num_hidden_layers": 4},
        {"ratio": 0.2, "n_removed": 1},
        {"num_hidden_layers": 3, "intermediate_size": 512},
    ),
    "mixtral": ({}, {"ratio": 0.25, "n_removed": 0}, {"num_local_experts": 3}),
    "qwen3_moe": (
        {"num_hidden_layers": 3},
        {"ratio": 0.45, "n_removed": 1},
        {"num_hidden_layers": 2, "num_local_experts": 6, "moe_intermediate_size": 256},
    ),
}


@pytest.mark.parametrize("model_type", CUTS)
def test_a_pruned_checkpoint_computes_the_same_in_transformers_and_llama_cpp(
    model_type: str, tmp_path: Path
) -> None:
    fields, asked, changed = CUTS[model_type]
    source = tiny(tmp_path / "source", model_type, width="wide", **fields)
    report = prune(source, tmp_path / "out", options(**asked))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: config[key] for key in changed} == changed
    model = theirs(tmp_path / "out")
    assert sum(p.numel() for p in model.parameters()) == report.n_parameters
    check(tmp_path / "out")


def test_query_groups_stay_whole_and_narrow_heads_keep_their_width(tmp_path: Path) -> None:
    source = tiny(tmp_path / "source", "llama", width="wide", head_dim=64)
    mapping = map_checkpoint(Checkpoint.open(source))
    cut = Cut((0, 1), 2, 512)  # of four groups of two query heads
    report = prune(source, tmp_path / "out", options(ratio_of(mapping, cut), n_removed=0))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert report.kept["key_value_heads"] == config["num_key_value_heads"] == 2
    assert (config["num_attention_heads"], config["head_dim"]) == (4, 64)
    before, after = tensors(source), tensors(tmp_path / "out")
    name = "model.layers.0.self_attn.{}_proj.weight"
    rows = [torch.where((before[name.format("k")] == row).all(1))[0].item()
            for row in after[name.format("k")]]  # fmt: skip
    groups = sorted({row // 64 for row in rows})
    queries = torch.cat([before[name.format("q")][g * 128 : g * 128 + 128] for g in groups])
    assert len(groups) == 2 and torch.equal(after[name.format("q")], queries)
    check(tmp_path / "out")


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_ratio_0_is_the_identity_bit_for_bit(model_type: str, tmp_path: Path) -> None:
    source = tiny(tmp_path / "source", model_type, dtype="bfloat16", tie_word_embeddings=True)
    report = prune(source, tmp_path / "out", options(0.0))
    before, after = tensors(source), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(
        torch.equal(before[k], after[k]) and before[k].dtype == after[k].dtype for k in before
    )
    read = [
        json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "out")
    ]
    assert read[0] == read[1]
    assert (report.ratio, report.kl_mean) == (0.0, 0.0)


def with_identity(folder: Path, index: int) -> Path:
    """Make layer ``index`` add nothing to the stream."""
    weights = tensors(folder)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        weights[f"model.layers.{index}.{name}.weight"].zero_()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_layer_that_is_the_identity_goes_first(tmp_path: Path) -> None:
    folder = with_identity(make_checkpoint("llama", tmp_path, num_hidden_layers=4), 2)
    checkpoint, layers = opened(folder)
    probe = Probe.of(checkpoint, layers, IDS)
    assert removal_order(probe, 2)[0] == 2
    assert probe.without([2]) == pytest.approx(0, abs=1e-9)
    assert evolve(probe, [0], generations=3, seed=0) == (2,)


def test_skipping_a_layer_is_what_transformers_computes_without_it(tmp_path: Path) -> None:
    """KL of the probe against logits of a model whose layer list is shortened by hand."""
    checkpoint, layers = opened(make_checkpoint("gemma2", tmp_path, num_hidden_layers=4))
    model, half = theirs(tmp_path), IDS.shape[1] // 2
    with torch.no_grad():
        dense = (
            model(torch.from_numpy(IDS), use_cache=False).logits[:, half:].log_softmax(-1).double()
        )
        del model.model.layers[1]
        model.config.num_hidden_layers, kinds = 3, model.config.layer_types
        model.config.layer_types = [kinds[0], kinds[2], kinds[3]]
        short = (
            model(torch.from_numpy(IDS), use_cache=False).logits[:, half:].log_softmax(-1).double()
        )
    want = (dense.exp() * (dense - short)).sum(-1).mean().item()
    assert Probe.of(checkpoint, layers, IDS).without([1]) == pytest.approx(want, rel=1e-4)


def walked(checkpoint: Checkpoint, layers: Layers, cut: Cut, recipe: Recipe) -> float:
    """KL of a cut on the tokens that it is calibrated on."""
    probe = Probe.of(checkpoint, layers, IDS)
    walk = Walk(checkpoint, layers, cut, recipe)
    state = walk.start([IDS[i : i + 1] for i in range(len(IDS))], [IDS])
    for _, _, after in walk.run(state):
        state = after
    return probe.divergence(state.others[0])


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
def test_duplicated_neurons_are_removed_without_error(model_type: str, tmp_path: Path) -> None:
    folder = make_checkpoint(model_type, tmp_path, width="wide")
    weights = tensors(folder)
    for name, value in weights.items():
        if "mlp" in name and name.endswith(("gate_proj.weight", "up_proj.weight")):
            value[1::2] = value[::2]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    checkpoint, layers = opened(folder)
    full = whole(layers.mapping)
    half = Cut(full.layers, full.kv_heads, full.ff // 2, full.experts, full.ffe // 2)
    tuned = walked(checkpoint, layers, half, Recipe(METRICS["condition"]))
    cut_only = walked(checkpoint, layers, half, Recipe(METRICS["condition"], tunes=False))
    assert tuned < 2e-3 and tuned < cut_only / 50


@pytest.mark.parametrize(
    ("model_type", "metric"),
    [("llama", "condition"), pytest.param("mixtral", "taylor", marks=pytest.mark.slow)],
)
def test_tuning_lowers_the_divergence(model_type: str, metric: str, tmp_path: Path) -> None:
    folder = tiny(tmp_path / "source", model_type, width="wide")
    asked = {"ratio": 0.22, "n_removed": 0, "metric": metric, "tokens": 4096}
    found: list[Report] = [
        prune(folder, tmp_path / str(tunes), options(**asked, tunes=tunes))
        for tunes in (True, False)
    ]
    assert found[0].kl_mean < found[1].kl_mean


def test_first_order_effects_are_those_of_autograd_on_the_weights(tmp_path: Path) -> None:
    """``sum of x * dL/dx`` of a neuron is ``sum of w * dL/dw`` of its column in down_proj."""
    checkpoint, layers = opened(make_checkpoint("qwen3_moe", tmp_path))
    found = effects(checkpoint, layers, [IDS])
    model, ids = theirs(tmp_path), torch.from_numpy(IDS)
    model(ids, labels=ids, use_cache=False).loss.backward()
    for index, layer in enumerate(model.model.layers):
        weight = layer.self_attn.o_proj.weight
        want = (weight * weight.grad).sum(0)
        torch.testing.assert_close(found[index][OUT].float(), want, rtol=1e-3, atol=1e-5)
        down = layer.mlp.experts.down_proj
        want = (down * down.grad).sum(1)
        got = torch.stack(found[index][EXPERT_DOWN]).float()
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)


def test_the_mean_of_removed_neurons_is_what_flap_adds(tmp_path: Path) -> None:
    """Neurons that are constant lose nothing: the bias gives all of them back."""
    fields = {"num_hidden_layers": 1, "mlp_bias": True}  # biases alone make the neurons
    folder = make_checkpoint("llama", tmp_path, width="wide", **fields)
    weights = tensors(folder)
    weights["model.layers.0.post_attention_layernorm.weight"].zero_()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    checkpoint, layers = opened(folder)
    flap, half = METRICS["flap"], Cut((0,), 4, 256)
    assert walked(checkpoint, layers, half, Recipe(flap, tunes=False)) > 1e-4
    shifted = walked(checkpoint, layers, half, Recipe(flap, tunes=False, shifts=True))
    assert shifted == pytest.approx(0, abs=1e-9)


def test_layers_behind_a_removed_one_are_those_of_the_source(tmp_path: Path) -> None:
    source = tiny(tmp_path / "source", "llama", num_hidden_layers=4)
    asked = options(0.2, n_removed=1, tunes=False)
    report = prune(source, tmp_path / "out", asked)
    (gone,) = report.removed_layers
    before, after = tensors(source), tensors(tmp_path / "out")
    for new, old in enumerate(i for i in range(4) if i != gone):
        for name in (n for n in after if n.startswith(f"model.layers.{new}.")):
            own = name.replace(f"layers.{new}.", f"layers.{old}.")
            assert torch.equal(after[name], before[own])


@pytest.mark.parametrize("model_type", ["llama", "phi3", "mixtral", "qwen2_moe", "gemma3_text"])
def test_parameters_of_a_cut_are_those_that_transformers_counts(
    model_type: str, tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(model_type, tmp_path, width="wide"))
    model, mapping = theirs(tmp_path), map_checkpoint(checkpoint)
    assert n_parameters(mapping, whole(mapping)) == sum(p.numel() for p in model.parameters())


def test_one_layer_runs_as_transformers_runs_it(tmp_path: Path) -> None:
    checkpoint, layers = opened(make_checkpoint("qwen2_moe", tmp_path))
    hidden = layers.start(checkpoint, IDS)
    flow = layers.run(0, read_layer(layers.mapping, 0), hidden, wants=True)
    with torch.no_grad():
        states = theirs(tmp_path)(torch.from_numpy(IDS), output_hidden_states=True).hidden_states
    torch.testing.assert_close(flow.out, states[1], rtol=0, atol=1e-5)
    assert flow.inputs["attn_output.weight"].shape == (IDS.size, 96)


def test_the_climb_finds_the_least_loss_and_measures_each_cut_once() -> None:
    cuts = [Cut(tuple(range(8 - d)), g, 256 * (d + g)) for d in range(4) for g in (1, 2, 4)]
    seen: list[Cut] = []

    def loss(cut: Cut) -> float:
        seen.append(cut)
        return abs(len(cut.layers) - 6) + abs(cut.kv_heads - 2)

    best, losses = best_cut(cuts, loss)
    assert (len(best.layers), best.kv_heads) == (6, 2)
    assert len(seen) == len(set(seen)) == len(losses)


def test_widths_are_multiples_and_a_model_without_one_is_refused(tmp_path: Path) -> None:
    wide = map_checkpoint(Checkpoint.open(make_checkpoint("llama", tmp_path / "w", width="wide")))
    assert {cut.ff for cut in candidates(wide, 0.2)} == {256}
    assert all(cut.ff % 64 == 0 for cut in candidates(wide, 0.3, 64))
    narrow = map_checkpoint(Checkpoint.open(make_checkpoint("llama", tmp_path / "n")))
    with pytest.raises(UnsupportedError, match="multiples of 256: the feed-forward width is 176"):
        candidates(narrow, 0.2)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen3", "gemma3_text", "mixtral"])
def test_transformers_accepts_every_combination(model_type: str, tmp_path: Path) -> None:
    """Llama's configuration refuses 28 heads of 64 at a hidden size of 2048."""
    heads = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 24}
    folder = make_checkpoint(model_type, tmp_path, width="wide", **heads)
    checkpoint = Checkpoint.open(folder)
    mapping = map_checkpoint(checkpoint)
    cuts = {
        cut.kv_heads: cut for ratio in (0.1, 0.2, 0.3) for cut in candidates(mapping, ratio, 32)
    }
    assert len(cuts) > 1
    for cut in cuts.values():
        Layers(mapping, cut_config(dict(checkpoint.config), mapping, cut))


def test_a_pattern_of_layers_that_the_graph_fixes_is_kept(tmp_path: Path) -> None:
    """SmolLM3 leaves out the rotation in every fourth layer; only the last layers may go."""
    source = tiny(tmp_path / "source", "smollm3", num_hidden_layers=6)
    report = prune(source, tmp_path / "out", options(0.15, n_removed=1))
    assert report.removed_layers in ([4], [5])
    check(tmp_path / "out")
