"""Plans: memory against what llama.cpp itself allocates, quality between measured points."""

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from converted import plain, tiny

from edgekit.artifact import Artifact, open_artifact
from edgekit.catalog import open_catalog
from edgekit.codecs.chunks import row_ranges
from edgekit.errors import DoesNotFitError, UsageError
from edgekit.footprint import (
    BATCHES,
    PROCESS_BYTES,
    Memory,
    decoders,
    loading_bytes,
    memory_of,
    shape_of,
)
from edgekit.llama import Context, open_model
from edgekit.llama.binding import capture_log
from edgekit.plan import (
    expected_kl,
    plan_budget,
    plan_json,
    plan_tier,
    plan_weights,
    shape_in,
    with_repacking,
)
from edgekit.planner import uniform

MIB = 1 << 20
KV = re.compile(r"llama_kv_cache: size = +([\d.]+) MiB")
COMPUTE = re.compile(r"CPU +(?:compute|output) +buffer size = +([\d.]+) MiB")
ROUNDING = 0.00501 * MIB  # of a log line


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models whose heads, experts and windows differ."""
    options = {
        "llama": {},
        "qwen3": {},
        "qwen3_moe": {"num_experts_per_tok": 8},
        "olmoe": {},
        "gemma2": {"sliding_window": 600},
        "gemma3_text": {"sliding_window": 300},
    }
    made = {}
    for name, extra in options.items():
        folder = tmp_path_factory.mktemp(name)
        checkpoint = tiny(folder / "c", name, width="wide", max_position_embeddings=8192, **extra)
        made[name] = plain(checkpoint, folder / "a", ("Q8_0",)).artifact
    return made


def told_by_llama_cpp(base: Path, context: int, kv_type: str, batch: int) -> tuple[float, float]:
    """KV cache and compute buffers that llama.cpp says it needs, bytes; weights are not read."""
    with (
        capture_log() as log,
        open_model(base, no_alloc=True) as model,
        Context(model, context, n_batch=batch, kv_type=kv_type, n_threads=1),
    ):
        lines = list(log)
    kv, compute = (
        [float(m[1]) for line in lines if (m := pattern.search(line))] for pattern in (KV, COMPUTE)
    )
    assert kv and compute
    return sum(kv) * MIB, sum(compute) * MIB


def told_and_planned(
    artifact: Path, context: int, kv_type: str, batch: int, *, is_measured: bool = True
) -> tuple[tuple[float, float], Memory]:
    manifest = open_catalog(artifact).manifest
    memory = manifest.memory if is_measured else {}
    shape = shape_of(manifest.architecture, manifest.model, measured=memory)
    told = told_by_llama_cpp(artifact / manifest.base.name, context, kv_type, batch)
    return told, memory_of(shape, context, kv_type, batch)


SETTINGS = [(4096, "f16", 512), (300, "f16", 512), (8192, "f16", 32), (100, "f16", 64)]
QUANTIZED = [(4096, "q8_0", 256), (1000, "q4_0", 128)]


NAMES = ["llama", "qwen3", "qwen3_moe", "olmoe", "gemma2", "gemma3_text"]


@pytest.mark.parametrize(("context", "kv_type", "batch"), SETTINGS + QUANTIZED)
@pytest.mark.parametrize("name", NAMES)
def test_memory_is_what_llama_cpp_allocates(
    artifacts: dict[str, Path], name: str, context: int, kv_type: str, batch: int
) -> None:
    if kv_type != "f16" and name not in ("llama", "olmoe"):  # heads of 24
        with pytest.raises(UsageError, match=f"KV type {kv_type} needs heads of a multiple of 32"):
            plan_budget(open_catalog(artifacts[name]), 1 << 40, context, kv_type)
        return
    (kv, compute), memory = told_and_planned(artifacts[name], context, kv_type, batch)
    assert abs(memory.kv_bytes - kv) <= 2 * ROUNDING  # two caches where layers have windows
    least = compute - 2 * ROUNDING  # of buffers for computing and for logits
    most = 1.1 * compute + 0.6 * MIB if context >= batch else math.inf  # a batch is never whole
    assert least <= memory.compute_bytes <= most
    _, bound = told_and_planned(artifacts[name], context, kv_type, batch, is_measured=False)
    assert compute - 2 * ROUNDING <= bound.compute_bytes
    assert memory.kv_bytes <= bound.kv_bytes  # what was not told counts no windows


def test_layers_with_a_window_keep_the_window_and_a_batch(artifacts: dict[str, Path]) -> None:
    """Gemma-3, 7 layers of 4 KV heads of 24: six keep 300 + 512 tokens, padded to 1024."""
    shape = shape_in(open_catalog(artifacts["gemma3_text"]))
    per_token = 2 * 2 * 4 * 24  # keys and values, two bytes
    assert shape.windowed == (True,) * 5 + (False, True)
    assert memory_of(shape, 8192, "f16", 512).kv_bytes == per_token * (6 * 1024 + 8192)
    assert memory_of(shape, 8192, "f16", 128).kv_bytes == per_token * (6 * 512 + 8192)
    assert memory_of(shape, 512, "f16", 512).kv_bytes == per_token * 7 * 512


def test_kv_of_a_known_model_is_the_formula_by_hand() -> None:
    """Llama-3.2-1B: 16 layers, 8 KV heads of 64, 2 bytes, keys and values, 131072 tokens: 4 GiB."""
    keys = {"block_count": 16, "context_length": 131072, "embedding_length": 2048}
    keys |= {"feed_forward_length": 8192, "attention.head_count": 32}
    keys |= {"attention.head_count_kv": 8}
    model = {f"llama.{key}": value for key, value in keys.items()} | {"vocab_size": 128256}
    shape = shape_of("llama", model)
    assert memory_of(shape, 131072, "f16").kv_bytes == 4 << 30
    assert memory_of(shape, 131072, "q8_0").kv_bytes == (4 << 30) * 34 // 64
    assert memory_of(shape, 131072, "q4_0").kv_bytes == (4 << 30) * 18 // 64
    assert memory_of(shape, 1, "f16").kv_bytes == memory_of(shape, 256, "f16").kv_bytes


def test_a_plan_counts_every_byte(llama_artifact: Path) -> None:
    with open_artifact(llama_artifact) as opened:
        body = plan_json(opened, plan_budget(opened, 1 << 30, 512))
    parts = ("weights_bytes", "kv_bytes", "compute_bytes", "overhead_bytes")
    assert body["total_bytes"] == sum(body[part] for part in parts) <= body["budget_bytes"]
    assert body["weights_bytes"] == sum(row["bytes"] for row in body["tensors"])
    assert body["overhead_bytes"] >= PROCESS_BYTES
    assert body["fits"] and body["expected_kl"] is None
    parameters = 8 * body["weights_bytes"] / body["bits_per_weight"]
    with open_artifact(llama_artifact) as opened:
        assert parameters == pytest.approx(opened.manifest.n_parameters, rel=1e-3)


def test_more_threads_decode_where_cache_and_buffers_leave_room(llama_artifact: Path) -> None:
    shape = replace(shape_in(open_catalog(llama_artifact)), chunk=1 << 20)
    for n_bytes, n_threads in ((0, 2), (40 * MIB, 3), (64 * MIB, 5), (1 << 40, 8)):
        buffers = Memory(kv_bytes=n_bytes, compute_bytes=0, overhead_bytes=0)
        assert decoders(shape, buffers, 8) == n_threads
        assert loading_bytes(shape, n_threads) <= max(n_bytes, loading_bytes(shape, 2))
    assert decoders(shape, buffers, 1) == 1


@pytest.mark.parametrize("chunk_weights", [64, 8192, 1 << 20])
def test_the_largest_chunk_is_that_of_a_layer(
    artifacts: dict[str, Path], chunk_weights: int
) -> None:
    for folder in artifacts.values():
        catalog = open_catalog(folder)
        catalog.manifest = replace(catalog.manifest, chunk_weights=chunk_weights)
        sizes = [
            (stop - start) * stack.cols
            for stack in catalog.stacks
            if stack.name.startswith("blk.")
            for start, stop in row_ranges(
                stack.n_weights // stack.n_experts // stack.cols, stack.cols, chunk_weights
            )
        ]
        assert max(sizes) <= catalog.chunk < max(sizes) + max(s.cols for s in catalog.stacks)


def test_a_tier_of_the_whole_model_is_planned_tensor_by_tensor(moe_artifact: Path) -> None:
    with open_artifact(moe_artifact) as opened:
        plan = plan_tier(opened, "Q4_K")
        assert plan.depths.tier("blk.0.attn_q.weight") == "Q5_0"  # 96 columns
        assert plan.depths.tier("blk.0.ffn_down_exps.weight") == "F16"  # 80 columns
        assert plan.depths.tier("blk.0.ffn_gate_inp.weight") == "source"
        assert plan.budget_bytes is None
        with pytest.raises(UsageError, match=r"has no tier Q5_0; it has Q2_K, Q3_K"):
            plan_tier(opened, "Q5_0")


def least_bytes(artifact: Artifact) -> int:
    return uniform(artifact.stacks, lambda stack: stack.tiers[0]).weights_bytes


def test_a_tight_budget_takes_a_smaller_batch_before_it_gives_up(
    artifacts: dict[str, Path],
) -> None:
    with open_artifact(artifacts["llama"]) as opened:
        shape = shape_in(opened)
        assert BATCHES == (512, 256, 128, 64, 32)
        for batch in (512, 128, 32):
            budget = least_bytes(opened) + memory_of(shape, 32768, "f16", batch).total
            plan = plan_budget(opened, budget, 32768)
            assert (plan.batch, plan.total_bytes) == (batch, budget)
        with pytest.raises(DoesNotFitError):
            plan_budget(opened, budget - 1, 32768)


def test_what_does_not_fit_says_the_numbers_and_a_context_that_would(
    artifacts: dict[str, Path],
) -> None:
    with open_artifact(artifacts["llama"]) as opened:
        shape = shape_in(opened)
        budget = least_bytes(opened) + memory_of(shape, 30000, "f16", 32).total
        with pytest.raises(DoesNotFitError) as error:
            plan_budget(opened, budget, 65536)
        line = str(error.value)
        assert re.search(
            r"needs [\d.]+ MiB at a context of 65536 \(weights [\d.]+ MiB, KV cache 64\.0 MiB, "
            r"compute [\d.]+ MiB, process [\d.]+ MiB\), the budget is [\d.]+ MiB; "
            r"give --budget \d+MiB, or --context \d+$",
            line,
        )
        suggested = int(line.rsplit(" ", 1)[1])
        assert 15000 <= suggested <= 32768
        assert plan_budget(opened, budget, suggested).total_bytes <= budget
        assert error.value.exit_code == 3


def test_where_no_context_helps_the_budget_that_would_is_named(llama_artifact: Path) -> None:
    with open_artifact(llama_artifact) as opened:
        with pytest.raises(DoesNotFitError) as error:
            plan_budget(opened, 50 * MIB, 256)
        match = re.search(r"; give --budget (\d+)MiB$", str(error.value))
        assert match
        enough = int(match[1]) * MIB
        assert plan_budget(opened, enough, 256).total_bytes <= enough
        with pytest.raises(DoesNotFitError):
            plan_budget(opened, enough - 2 * MIB, 256)


def test_the_default_context_is_the_models_own_or_4096(
    artifacts: dict[str, Path], llama_artifact: Path
) -> None:
    with open_artifact(llama_artifact) as short, open_artifact(artifacts["llama"]) as long:
        assert plan_budget(short, 1 << 30).context == 512
        assert plan_budget(long, 1 << 30).context == 4096
        assert plan_budget(short, 1 << 30, 700).context == 700
        for context in (0, -1, 1 << 25):
            with pytest.raises(UsageError, match=f"context {context} is out of range"):
                plan_budget(short, 1 << 40, context)


ROWS = tuple({"weights_bytes": n, "kl_mean": kl} for n, kl in ((100, 0.1), (200, 0.01), (400, 0.0)))


@pytest.mark.parametrize(
    ("weights_bytes", "kl"),
    [
        (100, 0.1),
        (200, 0.01),
        (150, math.sqrt(0.1 * 0.01)),  # half way in the logarithm
        (125, 0.1**0.75 * 0.01**0.25),
        (50, 0.1),
        (400, 0.0),
        (900, 0.0),
    ],
)
def test_kl_is_interpolated_in_its_logarithm(weights_bytes: int, kl: float) -> None:
    assert expected_kl(ROWS, weights_bytes) == pytest.approx(kl)
    assert expected_kl(ROWS[::-1], weights_bytes) == pytest.approx(kl)


def test_a_size_that_measured_worse_counts_as_the_smaller_one() -> None:
    rows = ({"weights_bytes": n, "kl_mean": kl} for n, kl in ((1, 0.1), (2, 0.01), (3, 0.02)))
    assert expected_kl(tuple(rows), 3) == pytest.approx(0.01)


def test_what_was_not_measured_has_no_expected_kl() -> None:
    assert expected_kl((), 100) is None
    assert expected_kl(ROWS[:1], 7) == pytest.approx(0.1)


def test_a_plan_expects_the_measured_kl_of_its_weights(llama_artifact: Path) -> None:
    with open_artifact(llama_artifact) as opened:
        least = least_bytes(opened)
        rows = ({"weights_bytes": least, "kl_mean": 0.5}, {"weights_bytes": 1 << 40, "kl_mean": 0})
        opened.manifest = replace(opened.manifest, quality=rows)
        assert plan_weights(opened, least).expected_kl == pytest.approx(0.5)
        assert plan_json(opened, plan_weights(opened, least))["expected_kl"] == pytest.approx(0.5)


def test_repacking_counts_a_tied_embedding_twice_and_the_largest_tensor_for_a_moment(
    artifacts: dict[str, Path],
) -> None:
    for name, is_tied in (("llama", False), ("gemma2", True)):
        catalog = open_catalog(artifacts[name])
        plan = plan_budget(catalog, 1 << 30, 256)
        sizes = {row["name"]: row["bytes"] for row in plan_json(catalog, plan)["tensors"]}
        assert ("output.weight" not in sizes) == is_tied
        more = sizes["token_embd.weight"] if is_tied else 0
        buffers = plan.memory.kv_bytes + plan.memory.compute_bytes
        more += max(0, max(sizes.values()) - buffers)
        repacked = with_repacking(catalog, plan)
        assert repacked.repack and repacked.total_bytes == plan.total_bytes + more
        tight = replace(plan, budget_bytes=plan.total_bytes + more - 1)
        assert with_repacking(catalog, tight) == (tight if more else with_repacking(catalog, tight))


def test_planning_imports_nothing_that_loads_models(llama_artifact: Path) -> None:
    """It is to answer at once; each of these takes a tenth of the time that it may take."""
    heavy = ("gguf", "llama_cpp", "psutil", "torch", "onnx", "onnxruntime", "edgekit.session")
    script = (
        "import sys; from edgekit.cli import main; "
        "main(sys.argv[1:], standalone_mode=False); "
        f"print([name for name in {heavy} if name in sys.modules], file=sys.stderr)"
    )
    words = ["plan", str(llama_artifact), "--budget", "1GiB", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", script, *words], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["budget_bytes"] == 1 << 30
    assert done.stderr.splitlines()[-1] == "[]"
