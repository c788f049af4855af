"""Sessions in ONNX Runtime: depth by budget, equal tokens in every runtime, limits, exit codes."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from models import whole_model
from onnx_models import float_graph, logits_of, onnx_artifact

import edgekit
from edgekit.cli import main
from edgekit.errors import DoesNotFitError, RefusedError, TooLongError, UsageError
from edgekit.llama import Sampling
from edgekit.onnx.artifact import described, open_onnx
from edgekit.onnx.materialize import materialize_onnx
from edgekit.onnx.plan import BATCHES, depth_of, plan_depth, plan_onnx
from edgekit.onnx_runtime import Tokenizer, has_genai, open_runner
from edgekit.onnx_runtime.sampler import kept
from edgekit.onnx_session import OnnxSettings, load_onnx

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = ("tiny-llama", "tiny-moe")
GREEDY = Sampling(temperature=0.0, ignore_eos=True)
PROMPT = "def read(path):"


@pytest.fixture(scope="module", params=SAMPLES)
def sample(request, tmp_path_factory):
    """A trained sample and its artifact."""
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = ROOT / "samples" / request.param
    return checkpoint, onnx_artifact(checkpoint, folder / "artifact")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    return onnx_artifact(ROOT / "samples" / "tiny-llama", folder / "artifact")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def total(artifact: Path, depth: int, context: int = 256) -> int:
    """What a depth needs at least."""
    return plan_depth(described(artifact)[1], depth, context, BATCHES[-1]).total_bytes


def greedy_of_graph(graph: Path, ids: list[int], n: int) -> list[int]:
    """Greedy tokens through onnxruntime alone, the whole text anew for every token."""
    ids = list(ids)
    for _ in range(n):
        ids.append(int(logits_of(graph, np.array([ids]), len(ids))[0, -1].argmax()))
    return ids[-n:]


@pytest.fixture(scope="module")
def of_transformers(sample) -> list[int]:
    """64 greedy tokens of the checkpoint in transformers."""
    checkpoint, artifact = sample
    ids = torch.tensor([Tokenizer(artifact / "onnx").encode(PROMPT)])
    model = whole_model(checkpoint)
    found = model.generate(ids, max_new_tokens=64, do_sample=False, eos_token_id=None)
    return found[0, ids.shape[1] :].tolist()


def test_float_tokens_are_those_of_transformers(sample, of_transformers, tmp_path):
    checkpoint, artifact = sample
    ids = Tokenizer(artifact / "onnx").encode(PROMPT)
    assert greedy_of_graph(float_graph(checkpoint, tmp_path), ids, 64) == of_transformers


@pytest.mark.skipif(not has_genai(), reason="onnxruntime-genai is not installed")
def test_float_tokens_of_genai_are_those_of_transformers(sample, of_transformers, tmp_path):
    """A model folder whose graph is the float model: what genai reads is as in ours."""
    checkpoint, artifact = sample
    opened, folder = open_onnx(artifact), tmp_path / "model"
    materialize_onnx(opened, 8, folder)
    float_graph(checkpoint, folder / "onnx").rename(folder / "onnx/model.onnx")
    runner = open_runner(folder, opened.part.facts, 128, 128, 1, genai=True)
    found, ids = list[int](), Tokenizer(folder).encode(PROMPT)
    for _ in range(64):
        found.append(int(runner.decode(ids).argmax()))
        ids = found[-1:]
    runner.close()
    assert found == of_transformers


@pytest.mark.skipif(not has_genai(), reason="onnxruntime-genai is not installed")
@pytest.mark.parametrize("depth", [8, 4, 2])
def test_our_loop_and_genai_give_the_same_tokens(sample, depth, tmp_path):
    """And plain onnxruntime without a cache that is bound in place."""
    _, artifact = sample
    with load_onnx(artifact, 1 << 40, 128, OnnxSettings(1, genai=False)) as session:
        opened = session.artifact
    materialize_onnx(opened, depth, tmp_path / "whole")
    ids = session.tokenizer.encode(PROMPT)
    plain = greedy_of_graph(tmp_path / "whole/onnx/model.onnx", ids, 12)
    found = []
    for genai in (False, True):
        budget = total(artifact, depth, 128)
        with load_onnx(artifact, budget, 128, OnnxSettings(1, genai=genai)) as session:
            assert depth_of(session.plan) == depth
            generation = session.generate(PROMPT, 64, GREEDY)
            text = "".join(generation)
            assert text == session.tokenizer.decode(generation.ids) and len(text) > 20
            found.append(generation.ids)
    assert len(found[0]) == 64 and found[0] == found[1]
    assert found[0][:12] == plain


def test_a_budget_decides_the_depth_and_the_plan_says_so(artifact):
    _, part = described(artifact)
    totals = {depth: total(artifact, depth) for depth in (2, 4, 8)}
    assert totals[2] < totals[4] < totals[8]
    for depth in (2, 4, 8):
        plan = plan_onnx(part, totals[depth], 256)
        assert depth_of(plan) == depth and plan.total_bytes <= totals[depth]
    assert depth_of(plan_onnx(part, totals[8] - 1, 256)) == 4
    with pytest.raises(DoesNotFitError, match=r"the lowest depth needs .* give --budget"):
        plan_onnx(part, 1 << 20, 256)
    with pytest.raises(UsageError, match="context 5000 is out of range"):
        plan_onnx(part, 1 << 40, 5000)


def test_load_is_the_same_call_for_both_runtimes(artifact):
    with edgekit.load(artifact, 1 << 40, 128, n_threads=1, runtime="onnx") as session:
        text = "".join(session.generate("def ", 8, GREEDY))
        assert session.plan.total_bytes <= 1 << 40 and text
        assert session.load_seconds > 0 and session.changes == []


def test_a_conversation_goes_on_after_a_change_of_depth(artifact):
    low = total(artifact, 2, 128)
    with load_onnx(artifact, 1 << 40, 128, OnnxSettings(1, genai=False)) as session:
        first = session.generate(PROMPT, 5, GREEDY)
        list(first)
        before = list(session.runner.tokens)
        plan = session.resize(low)
        assert depth_of(plan) == 2 and plan.total_bytes <= low
        assert session.runner.tokens == before
        [change] = session.changes
        assert (change.reason, change.after_bytes) == ("asked", plan.total_bytes)
        fresh = list(before)
        with pytest.raises(DoesNotFitError):
            session.resize(1 << 20)
        assert session.runner.tokens == fresh and depth_of(session.plan) == 2


def test_a_budget_of_the_same_depth_changes_the_batch(artifact):
    """What fits is what is planned, also where no other depth is loaded."""
    part = described(artifact)[1]
    small = plan_depth(part, 8, 128, BATCHES[-1]).total_bytes
    with load_onnx(artifact, 1 << 40, 128, OnnxSettings(1, genai=False)) as session:
        plan = session.resize(small)
        assert depth_of(plan) == 8 and plan.total_bytes <= small == plan.budget_bytes
        assert session.runner.n_batch == plan.batch == BATCHES[-1] and session.plan is plan
        assert session.resize(1 << 40).batch == session.runner.n_batch > BATCHES[-1]
        assert session.changes == []


def test_a_depth_that_cannot_be_loaded_leaves_the_old_one(artifact, tmp_path):
    """Its data file is damaged: refused, and the conversation goes on at the old depth."""
    copy = Path(shutil.copytree(artifact, tmp_path / "copy"))
    low = total(copy, 2, 128)
    with load_onnx(copy, low, 128, OnnxSettings(1, genai=False)) as session:
        list(session.generate(PROMPT, 3, GREEDY))
        before = list(session.runner.tokens)
        data = bytearray((copy / "onnx/depth8.bin").read_bytes())
        data[5] ^= 1
        (copy / "onnx/depth8.bin").write_bytes(data)
        with pytest.raises(RefusedError, match="corrupt"):
            session.resize(1 << 40)
        assert depth_of(session.plan) == 2 and session.runner.tokens == before
        session.request(1 << 40)
        assert "".join(session.generate(PROMPT, 3, GREEDY)) and session.changes == []


def test_a_prompt_longer_than_the_context_is_told_as_llama_cpp_s(artifact):
    with (
        load_onnx(artifact, 1 << 40, 8, OnnxSettings(1, genai=False)) as session,
        pytest.raises(TooLongError, match="the context 8; shorten it"),
    ):
        session.generate("def f(x):\n    return x + 1\n" * 12, 1, GREEDY)


def test_a_common_beginning_is_not_computed_again(artifact):
    with load_onnx(artifact, 1 << 40, 128, OnnxSettings(1, genai=False)) as session:
        ids = session.tokenizer.encode(PROMPT)
        first = session.generate(PROMPT, 4, GREEDY)
        list(first)
        again = session.generate(PROMPT, 4, GREEDY)
        assert list(again) and again.ids == first.ids
        assert (first.timings.n_prompt, first.timings.n_held) == (len(ids), 0)
        assert (again.timings.n_prompt, again.timings.n_held) == (1, len(ids) - 1)


def test_long_prompts_are_read_in_batches_with_the_same_result(artifact):
    text = "def f(x):\n    return x + 1\n" * 12
    opened = open_onnx(artifact)
    folder = None
    with load_onnx(artifact, 1 << 40, 256, OnnxSettings(1, genai=False)) as session:
        ids = session.tokenizer.encode(text)
        whole = session.runner.decode(ids)
        from edgekit.onnx.cache import cached_folder

        folder = cached_folder(opened, 8)
    small = open_runner(folder, opened.part.facts, 256, 7, 1, genai=False)
    assert len(ids) > 60
    np.testing.assert_allclose(small.decode(ids), whole, atol=2e-4)
    with pytest.raises(UsageError, match="positions left"):
        small.decode([1] * 256)
    small.close()


def test_the_cache_is_used_again_and_a_touched_file_is_not(artifact):
    from edgekit.onnx.cache import cached_folder

    opened = open_onnx(artifact)
    folder = cached_folder(opened, 4)
    data = folder / "onnx/model.onnx_data"
    first = data.stat().st_ino
    assert cached_folder(opened, 4) == folder and data.stat().st_ino == first
    blob = bytearray(data.read_bytes())
    blob[-1] ^= 1
    data.write_bytes(blob)
    assert cached_folder(opened, 4) == folder
    assert data.read_bytes() != bytes(blob)


def test_another_onnxruntime_gets_graphs_of_its_own(artifact, monkeypatch):
    """An older one refuses what the newest is told of experts."""
    from edgekit.onnx import cache

    places = set()
    for is_newest in (True, False):
        monkeypatch.setattr(cache, "is_newest", lambda is_newest=is_newest: is_newest)
        places.add(cache.cached_folder(open_onnx(artifact), 4))
    assert len(places) == 2


def test_without_a_cache_the_codes_are_composed_for_the_session(artifact, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path / "file"))
    with load_onnx(artifact, 1 << 40, 64, OnnxSettings(1, genai=False)) as session:
        assert "".join(session.generate("def ", 3, GREEDY))


def test_sampling_keeps_what_llama_cpp_keeps():
    """top_k, then top_p, then min_p, all before the temperature: by hand."""
    logits = np.log(np.array([0.5, 0.3, 0.1, 0.06, 0.04], np.float32))
    every = Sampling(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)
    assert kept(logits, every)[0].tolist() == [0, 1, 2, 3, 4]
    assert kept(logits, Sampling(top_k=2, top_p=1.0, min_p=0.0))[0].tolist() == [0, 1]
    assert kept(logits, Sampling(top_k=0, top_p=0.79, min_p=0.0))[0].tolist() == [0, 1]
    assert kept(logits, Sampling(top_k=0, top_p=1.0, min_p=0.19))[0].tolist() == [0, 1, 2]
    _, shares = kept(logits, Sampling(temperature=0.5, top_k=2, top_p=1.0, min_p=0.0))
    np.testing.assert_allclose(shares, [0.25 / 0.34, 0.09 / 0.34], rtol=1e-5)


def test_run_and_plan_json_have_the_fields_of_llama_cpp(artifact):
    command = ["run", str(artifact), "-p", PROMPT, "-n", "4", "--budget", "1GiB", "--json"]
    body = json.loads(CliRunner().invoke(main, [*command, "--threads", "1"]).stdout)
    told = {"text", "n_prompt", "n_gen", "prompt_tokens_per_second", "gen_tokens_per_second",
            "load_seconds", "peak_rss_bytes", "plan"}  # fmt: skip
    assert told <= set(body) and body["n_gen"] == 4
    planned = json.loads(
        CliRunner().invoke(main, ["plan", str(artifact), "--budget", "1GiB", "--json"]).stdout
    )
    parts = ("weights_bytes", "kv_bytes", "compute_bytes", "overhead_bytes")
    assert planned["total_bytes"] == sum(planned[part] for part in parts)
    assert (planned["depth"], planned["kv_type"], planned["fits"]) == (8, "f32", True)
    assert sum(t["bytes"] for t in planned["tensors"]) == planned["weights_bytes"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells the peak")
def test_a_process_stays_within_its_plan(artifact):
    """Peak resident bytes of a process that loads and generates, against what was planned."""
    code = f"""
import json, edgekit
from edgekit.llama import Sampling
with edgekit.load({str(artifact)!r}, 1 << 40, 1024, n_threads=1, runtime="onnx") as session:
    list(session.generate({PROMPT!r}, 32, Sampling(temperature=0.0, ignore_eos=True)))
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(json.dumps([1024 * int(line.split()[1]), session.plan.total_bytes]))
"""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    peak, planned = json.loads(done.stdout)
    assert 0.7 * planned < peak <= planned, (peak, planned)


def test_what_does_not_fit_ends_with_exit_code_3(artifact):
    result = CliRunner().invoke(main, ["run", str(artifact), "-p", "a", "--budget", "30MiB"])
    assert result.exit_code == 3 and result.stderr.startswith("Error: the lowest depth needs")


def test_llama_commands_tell_what_an_artifact_is_for(artifact):
    result = CliRunner().invoke(
        main, ["run", str(artifact), "-p", "a", "--runtime", "llama", "--budget", "1GiB"]
    )
    assert result.exit_code == 2 and "nothing for llama.cpp; use --runtime onnx" in result.stderr


def test_materialized_folders_load_everywhere(artifact, tmp_path):
    for depth in ("8", "4", "2"):
        out = tmp_path / depth
        words = ["materialize", str(artifact), "--format", "onnx", "--depth", depth, "-o", str(out)]
        body = json.loads(CliRunner().invoke(main, [*words, "--json"]).stdout)
        assert body["bytes"] == sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
        inputs = [
            i.name for i in onnxruntime.InferenceSession(out / "onnx/model.onnx").get_inputs()
        ]
        assert inputs[:3] == ["input_ids", "attention_mask", "past_key_values.0.key"]
        again = CliRunner().invoke(main, words)
        assert again.exit_code == 2 and "exists" in again.stderr
        shutil.rmtree(out)


def test_a_conversation_by_the_command_line(artifact):
    command = [sys.executable, "-m", "edgekit", "run", str(artifact), "-n", "4", "--threads", "1"]
    said = subprocess.run(command, input="a b\nc\n/quit\n", capture_output=True, text=True)
    assert (said.returncode, "Traceback" in said.stderr) == (0, False), said.stderr
    assert len(said.stdout.strip().splitlines()) >= 2


@pytest.mark.parametrize("given", [
    {"kv_type": "q8_0"}, {"residency": "anon"}, {"repack": True}, {"expert_cache": 2},
    {"prefetch": "gate"},
])  # fmt: skip
def test_what_only_llama_cpp_can_choose_is_refused(given, artifact):
    words = f"^{next(iter(given))}: ONNX Runtime has no such choice"
    with pytest.raises(UsageError, match=words), edgekit.load(artifact, 1 << 30, **given):
        pass


def test_an_artifact_for_onnx_alone_is_loaded_for_it(artifact):
    with edgekit.load(artifact, 1 << 30, 64, n_threads=1) as session:
        assert type(session).__name__ == "OnnxSession"


def test_it_offers_what_the_command_line_uses(artifact):
    """But for what keeps a state in a file, which is refused before."""
    used = {
        name
        for path in ("run", "chat", "loading")
        for name in re.findall(
            r"\bsession\.(\w+)", (ROOT / f"edgekit/cli/{path}.py").read_text(encoding="utf-8")
        )
    }
    with load_onnx(artifact, 1 << 30, 64, OnnxSettings(1)) as session:
        missing = {name for name in used if not hasattr(session, name)}
    assert missing == {"restore", "save", "context"} and len(used) > 10
