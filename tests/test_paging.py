"""Experts on demand give the logits of the fully resident model, bit for bit."""

import os
import re
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from click.testing import CliRunner
from converted import plain, tiny
from paged import TRAINED, paged, tokens

from edgekit.artifact import Artifact, open_artifact
from edgekit.cli import main
from edgekit.decode import chunks_of
from edgekit.errors import DoesNotFitError, EdgekitError, RefusedError, UsageError
from edgekit.expert_budget import expert_bytes
from edgekit.expert_plan import experts_of, plan_any, plan_paged
from edgekit.llama import Context, Listener, open_model
from edgekit.loader import load
from edgekit.materialize import materialize
from edgekit.paging.store import LevelStore
from edgekit.plan import Plan
from edgekit.routing.eviction import RANKS

TIERS = ("Q4_K", "Q8_0")
MODELS = ("mixtral", "qwen3_moe", "olmoe", "qwen2_moe", "smallthinker", "tiny-moe")
N_TOKENS, N_PROMPT = 500, 100


@pytest.fixture(scope="module", params=MODELS)
def moe(request, tmp_path_factory) -> Path:
    folder, checkpoint = tmp_path_factory.mktemp(request.param), TRAINED
    if request.param != TRAINED.name:
        fields = {"dtype": "bfloat16", "num_hidden_layers": 3}
        checkpoint = tiny(folder / "checkpoint", request.param, **fields)
    return plain(checkpoint, folder / "artifact", TIERS).artifact


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("qwen")
    checkpoint = tiny(folder / "checkpoint", "qwen3_moe", dtype="bfloat16")
    return plain(checkpoint, folder / "artifact", TIERS).artifact


def logits_of(context: Context, batch: int) -> np.ndarray:
    """A prompt in batches, then token by token."""
    ids, rows = tokens(N_TOKENS), []
    for start in range(0, N_PROMPT, batch):
        rows.append(context.decode(ids[start : min(start + batch, N_PROMPT)], "last"))
    rows += [context.decode([token]) for token in ids[N_PROMPT:]]
    return np.concatenate(rows)


def resident(artifact: Path, plan: Plan, path: Path) -> np.ndarray:
    """The same depths in a file of their own, all of it in stock llama.cpp."""
    with open_artifact(artifact) as opened:
        materialize(opened, plan.depths, path, force=True, n_threads=1)
    with (
        open_model(path, residency="anon") as model,
        Context(model, 512, n_batch=plan.batch, n_threads=1) as context,
    ):
        return logits_of(context, plan.batch)


def test_logits_are_those_of_the_resident_model_with_every_cache(moe, tmp_path):
    with open_artifact(moe) as opened:
        n_experts, used = experts_of(opened)
    for cache in {used, used + 1, n_experts - 1}:
        with paged(moe, cache) as (engine, plan, pager):
            ours = logits_of(engine.context, plan.batch)
            assert 0 < pager.stats.n_missing < pager.stats.n_asked
            assert pager.pool.used_bytes <= pager.pool.capacity_bytes
        assert np.array_equal(ours, resident(moe, plan, tmp_path / "m.gguf")), cache


def test_python_and_compiled_listeners_hear_the_same(qwen, monkeypatch):
    heard = []
    for native in ("0", "1"):
        monkeypatch.setenv("EDGEKIT_NO_NATIVE", native)
        with paged(qwen, 4) as (engine, _, pager):
            engine.context.decode(tokens(20), "none")
            for token in tokens(60)[20:]:
                engine.context.decode([token])
            uses = pager.listener.uses
            stats = pager.stats
            heard.append((uses.last.copy(), uses.resident.copy(), stats.n_asked, stats.n_hits))
    for compiled, python in zip(*heard, strict=True):
        assert np.array_equal(compiled, python)
    assert heard[0][0].max() // RANKS == 41  # passes


def test_a_listener_changes_no_logits(qwen, tmp_path):
    with open_artifact(qwen) as opened:
        materialize(opened, plan_paged(opened, 1 << 40, 512, expert_cache=4).depths, tmp_path / "m")
    heard: list[tuple[int, list[int]]] = []
    listener = Listener(2, 8, lambda block, ids: heard.append((block, ids.tolist())), always=True)
    with open_model(tmp_path / "m") as model:
        rows = []
        for chosen in (None, listener):
            with Context(model, 512, n_batch=64, n_threads=1, listener=chosen) as context:
                rows.append(logits_of(context, 64))
    assert np.array_equal(*rows)
    assert len(heard) == 2 * (2 + N_TOKENS - N_PROMPT)
    assert all(len(set(ids)) == len(ids) >= 3 for _, ids in heard)


def test_experts_that_left_take_no_memory(tmp_path):
    checkpoint = tiny(
        tmp_path / "c", "qwen3_moe", dtype="bfloat16", width="wide", num_experts=64,
        moe_intermediate_size=768, num_hidden_layers=2,
    )  # fmt: skip
    artifact = plain(checkpoint, tmp_path / "a", ("Q8_0",)).artifact
    process = psutil.Process()
    with paged(artifact, 6) as (engine, plan, pager):
        before = process.memory_info().rss
        for token in tokens(120):
            engine.context.decode([token])
        grown = process.memory_info().rss - before
        assert plan.paged is not None
        assert plan.paged.experts_bytes > 70 << 20
        assert pager.stats.n_missing > 200
        assert 0.8 * pager.pool.used_bytes < grown < pager.pool.capacity_bytes + (2 << 20)


def test_a_pool_smaller_than_a_layer_takes_prompts_in_chunks_whose_experts_fit(qwen, tmp_path):
    with paged(qwen, 3) as (engine, plan, _):
        assert plan.paged is not None
        assert plan.paged.longest_batch == plan.batch == 2  # 2 layers x 3 slots hold 2 x 3
        ours = logits_of(engine.context, plan.batch)
    assert np.array_equal(ours, resident(qwen, plan, tmp_path / "m.gguf"))


def test_a_file_in_the_cache_serves_the_same_experts(qwen, tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path / "cache"))
    rows = []
    for residency in ("anon", "mapped", "auto"):
        with paged(qwen, 4, residency=residency) as (engine, plan, _):
            rows.append(logits_of(engine.context, plan.batch))
    assert np.array_equal(rows[0], rows[1]) and np.array_equal(rows[0], rows[2])


def test_reading_ahead_changes_no_logits_and_guesses_better_than_chance(moe, tmp_path):
    with open_artifact(moe) as opened:
        n_experts, used = experts_of(opened)
    for cache in {used, 3}:
        with paged(moe, cache, prefetch="gate") as (engine, plan, pager):
            ours = logits_of(engine.context, plan.batch)
            stats = pager.stats
        assert np.array_equal(ours, resident(moe, plan, tmp_path / "m.gguf")), cache
        if "smallthinker" in str(moe):  # its router knows
            assert stats.n_predicted == 0
            continue
        assert stats.n_predicted > 300
        assert stats.n_predicted_right / stats.n_predicted > used / n_experts + 0.1


def test_a_router_before_attention_has_reads_begun_before_they_are_waited_for(tmp_path):
    fields = {"dtype": "bfloat16", "num_hidden_layers": 3}
    checkpoint = tiny(tmp_path / "c", "smallthinker", **fields)
    artifact = plain(checkpoint, tmp_path / "a", TIERS).artifact
    with paged(artifact, 3) as (engine, _, pager):
        for token in tokens(60):
            engine.context.decode([token])
        stats = pager.stats
    assert stats.n_guessed == stats.n_missing > 60


@pytest.mark.parametrize("level", [0, 1])
def test_an_expert_with_a_wrong_hash_is_refused_and_the_text_before_it_stays(qwen, level, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in qwen.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    with open_artifact(broken) as opened:
        stack = opened.stack("blk.1.ffn_up_exps.weight")
        record = opened.manifest.levels if level else opened.manifest.base
        places = [part.offset for part in stack.levels[level].parts]
    with (broken / record.name).open("r+b") as file:
        for place in places:
            file.seek(place + 5)
            byte = file.read(1)[0]
            file.seek(place + 5)
            file.write(bytes([byte ^ 1]))
    with paged(broken, 4) as (engine, _, pager):
        with pytest.raises(RefusedError, match="sha256") as caught:
            engine.context.decode(tokens(3))
        assert caught.value.exit_code == 5 and "blk.1.ffn_up_exps" in str(caught.value)
        assert engine.context.tokens == [] and not pager.listener.uses.resident[1].any()


def test_a_disk_that_fails_ends_with_one_line_and_the_conversation_is_whole(qwen, monkeypatch):
    with paged(qwen, 3) as (engine, _, pager):
        ids = tokens(40)
        for token in ids[:20]:
            engine.context.decode([token])
        real = os.preadv

        def failing(*args: object) -> int:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(os, "preadv", failing)
        with pytest.raises(EdgekitError, match="Input/output error") as caught:
            for token in ids[20:]:
                engine.context.decode([token])
        assert caught.value.exit_code == 1 and "\n" not in str(caught.value)
        n = len(engine.context.tokens)
        assert engine.context.tokens == ids[:n]
        monkeypatch.setattr(os, "preadv", real)
        after = [engine.context.decode([token]) for token in ids[n:]]
        assert pager.pool.used_bytes <= pager.pool.capacity_bytes
    with paged(qwen, 3) as (engine, _, _):
        whole = [engine.context.decode([token]) for token in ids]
    assert np.array_equal(np.concatenate(after), np.concatenate(whole[n:]))


def test_whoever_stops_waiting_leaves_no_room_taken_behind(qwen, monkeypatch):
    with paged(qwen, 3) as (engine, _, pager):
        ids, started, go_on = tokens(60), threading.Event(), threading.Event()
        real = os.preadv

        def slow(*args: Any) -> int:
            started.set()
            assert go_on.wait(60)
            return real(*args)

        def interrupt() -> None:
            assert started.wait(60)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            go_on.set()

        for token in ids[:20]:
            engine.context.decode([token])
        monkeypatch.setattr(os, "preadv", slow)
        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            for token in ids[20:]:
                engine.context.decode([token])
        thread.join()
        n = len(engine.context.tokens)
        after = [engine.context.decode([token]) for token in ids[n:]]
        resident = pager.listener.uses.resident.sum(axis=1)
        sizes = [block.expert_bytes for block in pager.pool._blocks]
        assert pager.pool.used_bytes == resident @ sizes
    with paged(qwen, 3) as (engine, _, _):
        whole = [engine.context.decode([token]) for token in ids]
    assert np.array_equal(np.concatenate(after), np.concatenate(whole[n:]))


def test_every_level_of_an_expert_is_read_once_in_however_many_chunks(tmp_path, monkeypatch):
    for module in ("convert", "encode"):
        monkeypatch.setattr(f"edgekit.{module}.CHUNK_WEIGHTS", 1 << 10)
    checkpoint = tiny(tmp_path / "c", "qwen3_moe", dtype="bfloat16", width="wide")
    artifact = plain(checkpoint, tmp_path / "a", TIERS).artifact
    real, n_read = os.preadv, 0

    def counting(descriptor: int, views: list[memoryview], offset: int) -> int:
        nonlocal n_read
        n = real(descriptor, views, offset)
        n_read += n
        return n

    monkeypatch.setattr(os, "preadv", counting)
    with open_artifact(artifact) as opened:
        depths = plan_paged(opened, 1 << 40, 512, expert_cache=4).depths
        stack = next(s for s in opened.stacks if s.name.endswith("_exps.weight"))
        store = LevelStore(opened, depths)
        into = memoryview(bytearray(expert_bytes(stack, depths.tier(stack.name))))
        told = store.read(stack.name, 1, into)
        store.close()
    assert len(list(chunks_of(stack, 2, 1, 1 << 10))) > 2
    assert told == n_read == sum(level.parts[1].n_bytes for level in stack.levels[:2])


def named_budget(error: DoesNotFitError) -> int:
    """MiB."""
    match = re.search(r"; give --budget (\d+)MiB", str(error))
    assert match is not None, error
    return int(match[1])


def is_least(artifact: Artifact, mib: int, context: int) -> bool:
    """Whether a plan fits ``mib`` MiB and none fits one less."""
    with pytest.raises(DoesNotFitError):
        plan_any(artifact, mib - 1 << 20, context)
    return plan_any(artifact, mib << 20, context).total_bytes <= mib << 20


def test_a_model_too_small_for_paging_to_pay_is_told_the_budget_for_all_its_experts(qwen):
    with open_artifact(qwen) as opened:
        with pytest.raises(DoesNotFitError, match="the lowest depth needs") as error:
            plan_any(opened, 1, 256)
        assert is_least(opened, named_budget(error.value), 256)


def test_experts_are_paged_when_not_even_the_lowest_depth_fits(tmp_path):
    checkpoint = tiny(
        tmp_path / "c", "qwen3_moe", dtype="bfloat16", width="wide", num_experts=64,
        moe_intermediate_size=768,
    )  # fmt: skip
    artifact = plain(checkpoint, tmp_path / "a", TIERS).artifact
    with open_artifact(artifact) as opened:
        whole = plan_any(opened, 1 << 40, 256)
        assert whole.paged is None
        least = sum(s.levels[0].n_bytes for s in opened.stacks)
        budget = whole.memory.total + least // 2
        plan = plan_any(opened, budget, 256)
        assert plan.paged is not None and plan.total_bytes <= budget
        assert 3 <= plan.paged.experts_per_layer < 64
        tiers = {plan.depths.tier(s.name) for s in opened.stacks if "_exps" in s.name}
        assert tiers == {"Q4_K"}
        with pytest.raises(DoesNotFitError, match="--budget"):
            plan_any(opened, budget, 256, pager=False)
        with pytest.raises(DoesNotFitError, match="3 of 64 experts per layer") as error:
            plan_any(opened, whole.memory.total, 256)
        assert is_least(opened, named_budget(error.value), 256)
        with pytest.raises(
            DoesNotFitError, match=r"give --budget \d+MiB, or --context \d+$"
        ) as error:
            plan_any(opened, budget, 1 << 16)
        assert is_least(opened, named_budget(error.value), 1 << 16)
        shorter = int(str(error.value).rpartition(" ")[2])
        assert plan_any(opened, budget, shorter).total_bytes <= budget
    with load(artifact, budget, 256, n_threads=1, follow=False) as session:
        text = "".join(session.generate("a text", 20))
        assert session.paging is not None and session.paging.n_missing > 0
    with load(artifact, 1 << 40, 256, n_threads=1, follow=False, expert_cache=63) as session:
        assert session.plan.paged is not None and isinstance(text, str)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expert_cache": 2}, "holds fewer"),
        ({"expert_cache": 4, "pager": False}, "--no-pager"),
    ],
)
def test_a_cache_that_makes_no_sense_is_told(qwen, options, message):
    with open_artifact(qwen) as opened, pytest.raises(UsageError, match=message):
        plan_any(opened, 1 << 40, 256, **options)


def test_a_dense_model_has_no_expert_cache(llama_artifact):
    with open_artifact(llama_artifact) as opened:
        assert plan_any(opened, 1 << 40, 256).paged is None
        with pytest.raises(UsageError, match="no experts"):
            plan_any(opened, 1 << 40, 256, expert_cache=4)


def test_a_change_of_budget_changes_the_pool_and_the_conversation_goes_on(qwen):
    with load(qwen, 1 << 30, 256, n_threads=1, follow=False, expert_cache=4) as session:
        first = "".join(session.generate("one", 10))
        session.resize(1 << 31)
        assert session.plan.paged is not None
        assert "".join(session.generate("one" + first, 5)) is not None


def test_a_disk_that_fails_in_the_command_line_leaves_the_conversation_in_its_file(
    qwen, tmp_path, monkeypatch
):
    artifact, state = tmp_path / "a", tmp_path / "state"
    shutil.copytree(qwen, artifact)
    base = next(artifact.glob("*.gguf"))
    run = ["run", str(artifact), "-p", "some text", "-n", "30", "--temperature", "0", "--raw"]
    run += ["--expert-cache", "3", "--context", "256", "--ignore-eos", "--state", str(state)]
    real, n_reads = os.preadv, 0

    def failing(*args: Any) -> int:
        nonlocal n_reads
        n_reads += 1
        if n_reads > 150:
            raise OSError(5, "Input/output error")
        return real(*args)

    monkeypatch.setattr(os, "preadv", failing)
    failed = CliRunner().invoke(main, run)
    assert failed.exit_code == 1
    assert failed.stderr.strip().splitlines()[-1].startswith(f"Error: {base}"[:20])
    assert "Input/output error" in failed.stderr
    monkeypatch.setattr(os, "preadv", real)
    assert state.stat().st_size > 0
    run[3:4] = [" and"]
    assert CliRunner().invoke(main, run).exit_code == 0
