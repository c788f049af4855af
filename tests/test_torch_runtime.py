"""A depth in torch: llama.cpp's logits on the same weights, and memory of the packed bytes."""

import dataclasses
import gc
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from converted import tiny, unmeasured

from edgekit.artifact import open_artifact
from edgekit.assembly import Assembly
from edgekit.cli import main
from edgekit.convert import convert
from edgekit.errors import UsageError
from edgekit.llama import Context, open_model
from edgekit.plan import plan_tier
from edgekit.planner import packed_bytes, uniform
from edgekit.progress import Silent
from edgekit.torch_runtime import TorchModel

IDS = np.array([1, 7, 30, 12, 99, 100, 5, 64], np.int64)
TIERS = {
    "nested": ("Q4_K", "Q8_0", "source"),
    "B": ("Q2_K", "B1", "B2", "B3", "source"),
    "R": ("Q4_K", "R1", "R2", "source"),
}
ARCHS = ("llama", "qwen2", "qwen3_moe", "gemma3_text")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("torch")


def converted(folder: Path, model_type: str, kind: str) -> Path:
    """A random model as an artifact; made once."""
    checkpoint, artifact = folder / model_type, folder / f"{model_type}-{kind}"
    if not checkpoint.exists():
        tiny(checkpoint, model_type, dtype="bfloat16", num_hidden_layers=2)
    if not artifact.exists():
        codec = "nested" if kind == "nested" else "bitstack"
        options = unmeasured(TIERS[kind], statistics=False, codec=codec)
        convert(checkpoint, artifact, options, Silent())
    return artifact


def llama_logits(artifact, depths) -> np.ndarray:
    with (
        Assembly(artifact, depths) as source,
        open_model(source) as model,
        Context(model, 16, kv_type="f32", flash_attention=False, n_outputs=16) as context,
    ):
        return np.array(context.decode(IDS.tolist(), range(len(IDS))))


@pytest.mark.parametrize("model_type", ARCHS)
def test_the_source_tier_is_llama_cpp_s_model(folder, model_type):
    with open_artifact(converted(folder, model_type, "nested")) as artifact:
        depths = plan_tier(artifact, "source").depths
        got, wanted = TorchModel(artifact, depths).logits(IDS), llama_logits(artifact, depths)
    assert np.abs(got - wanted).max() <= 0.02 * np.abs(wanted).max()  # llama.cpp multiplies in BF16


@pytest.mark.parametrize("kind", ["nested", "B", "R"])
def test_a_depth_computes_with_its_own_weights(folder, kind):
    """Packed levels are nearer to the source than llama.cpp's types of the same depth are not."""
    with open_artifact(converted(folder, "llama", kind)) as artifact:
        source = TorchModel(artifact, plan_tier(artifact, "source").depths).logits(IDS)
        errors = []
        for tier in artifact.manifest.tiers[1:-1]:
            depths = plan_tier(artifact, tier).depths
            ours = TorchModel(artifact, depths).logits(IDS)
            errors.append(np.abs(ours - source).mean())
            theirs = np.abs(llama_logits(artifact, depths) - source).mean()
            assert 0.5 * theirs < errors[-1] < 1.5 * theirs, tier
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("kind", ["B", "R"])
def test_resident_weights_are_the_manifest_s_bytes_and_follow_the_depth(folder, model_type, kind):
    with open_artifact(converted(folder, model_type, kind)) as artifact:
        low, high = (plan_tier(artifact, TIERS[kind][i]).depths for i in (1, 2))
        model = TorchModel(artifact, high)
        fresh = {tier: TorchModel(artifact, d).logits(IDS) for tier, d in (("l", low), ("h", high))}

        def told(depths) -> int:
            return sum(packed_bytes(s, depths.tier(s.name)) for s in artifact.stacks)

        def tensors() -> int:
            """Bytes of all tensors that the process holds besides parameters and buffers."""
            gc.collect()
            alive = {
                t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                for t in gc.get_objects()
                if issubclass(type(t), torch.Tensor) and not t.is_meta
            }
            return sum(alive.values())

        assert abs(model.weights.n_bytes - told(high)) <= 0.02 * told(high)
        before = tensors()
        model.weights.set_depths(low)
        freed = before - tensors()
        assert abs(freed - (told(high) - told(low))) <= 0.02 * (told(high) - told(low))
        assert abs(model.weights.n_bytes - told(low)) <= 0.02 * told(low)
        np.testing.assert_array_equal(model.logits(IDS), fresh["l"])
        model.weights.set_depths(high)
        np.testing.assert_array_equal(model.logits(IDS), fresh["h"])
        assert tensors() == before


@pytest.mark.parametrize("kind", ["B", "R"])
def test_a_change_of_depth_reads_what_it_adds_and_nothing_else(folder, kind, monkeypatch):
    with open_artifact(converted(folder, "llama", kind)) as artifact:
        low, high = (plan_tier(artifact, TIERS[kind][i]).depths for i in (1, 2))
        read, part = list[str](), artifact.part

        def noted(level, expert=0) -> memoryview:
            read.append(level.tier)
            return part(level, expert)

        monkeypatch.setattr(artifact, "part", noted)
        model = TorchModel(artifact, low)
        read.clear()
        model.weights.set_depths(high)
        assert set(read) == {TIERS[kind][2]}
        read.clear()
        model.weights.set_depths(low)
        assert read == []


def test_an_artifact_without_its_config_is_told(folder, tmp_path):
    with open_artifact(converted(folder, "llama", "nested")) as artifact:
        manifest = artifact.manifest
        source = {k: v for k, v in manifest.source.items() if k != "config"}
        artifact.manifest = dataclasses.replace(manifest, source=source)
        depths = uniform(artifact.stacks, lambda stack: stack.tiers[0])
        with pytest.raises(UsageError, match="convert it again to run it in torch"):
            TorchModel(artifact, depths)


def test_a_device_that_is_not_there_is_told(folder):
    with open_artifact(converted(folder, "llama", "nested")) as artifact:
        depths = uniform(artifact.stacks, lambda stack: stack.tiers[0])
        with pytest.raises(UsageError, match="torch cannot use --device"):
            TorchModel(artifact, depths, "cuda:99")


def test_eval_runs_in_torch_what_it_runs_in_llama_cpp(folder, tmp_path):
    artifact, text = converted(folder, "llama", "nested"), tmp_path / "text"
    text.write_text("".join(chr(97 + n) for n in np.random.default_rng(0).integers(0, 26, 400)))
    found = {}
    for runtime in ("llama", "torch"):
        words = ["eval", str(artifact), "--tier", "Q4_K", "--text", str(text), "--context", "32"]
        done = CliRunner().invoke(main, [*words, "--runtime", runtime, "--json"])
        assert done.exit_code == 0, done.output
        found[runtime] = json.loads(done.stdout)
    ours, theirs = found["torch"], found["llama"]
    assert ours["n_tokens"] == theirs["n_tokens"] > 0
    assert ours["weights_bytes"] == theirs["weights_bytes"]
    assert ours["ppl"] == pytest.approx(theirs["ppl"], rel=0.01)
    assert ours["kl_mean"] == pytest.approx(theirs["kl_mean"], rel=0.2)


def test_eval_in_torch_wants_an_artifact(tmp_path):
    path, text = tmp_path / "model.gguf", tmp_path / "text"
    path.touch()
    text.write_text("some words")
    words = ["eval", str(path), "--text", str(text), "--runtime", "torch"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 2 and "are for artifacts" in done.output
