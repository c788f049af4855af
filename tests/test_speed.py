"""Predicted speeds: counted by hand on small artifacts, and exact where one cost alone is left."""

from dataclasses import replace

import pytest

from edgekit.catalog import open_catalog
from edgekit.devices.profile import Figure, find_device
from edgekit.kernels.ggml import row_bytes
from edgekit.measure import highest_depths
from edgekit.plan import plan_budget, plan_tier, shape_in
from edgekit.speed import (
    _attention,
    predict,
    prompt_seconds,
    stored_bytes,
    token_seconds,
    work_of,
)


def only(**rates: float):
    """A device on which nothing costs anything but what is given."""
    free = Figure(1e17, "estimated", "none")
    never = Figure(1e-17, "estimated", "none")
    device = find_device("pixel-8")
    names = ("decode_bytes_per_s", "attention_per_s", "prompt_operations_per_s")
    device = replace(device, **{name: free for name in names})
    fixed = ("token_seconds", "layer_seconds", "prompt_layer_seconds")
    device = replace(device, **{name: never for name in fixed})
    return replace(device, **{k: Figure(v, "estimated", "given") for k, v in rates.items()})


@pytest.fixture
def llama(llama_artifact):
    catalog = open_catalog(llama_artifact)
    return catalog, work_of(catalog, plan_tier(catalog, "Q4_K"))


def matrices(catalog):
    return [stack for stack in catalog.stacks if len(stack.shape) > 1]


def test_a_token_of_a_dense_model_reads_every_weight_but_the_embedding_it_looks_up(llama):
    catalog, work = llama
    names = {stack.name for stack in catalog.stacks}
    is_tied = "output.weight" not in names
    rest = [s for s in matrices(catalog) if is_tied or s.name != "token_embd.weight"]
    assert work.weight_bytes["Q4_K"] == sum(
        s.n_weights // s.cols * row_bytes("Q4_K", s.cols) for s in rest
    )
    norms = sum(s.n_weights for s in catalog.stacks if len(s.shape) == 1)
    assert work.weight_bytes["F32"] == 4 * norms


def test_a_token_of_a_mixture_reads_the_experts_that_it_is_sent_to(moe_artifact):
    catalog = open_catalog(moe_artifact)
    model = catalog.manifest.model
    used, n = (model[f"qwen3moe.{key}"] for key in ("expert_used_count", "expert_count"))
    assert 0 < used < n
    work = work_of(catalog, plan_tier(catalog, "source"))
    experts = sum(s.n_weights for s in catalog.stacks if "_exps." in s.name)
    dense = sum(
        s.n_weights
        for s in matrices(catalog)
        if "_exps." not in s.name and "gate_inp" not in s.name and s.name != "token_embd.weight"
    )
    assert work.weight_bytes["BF16"] == pytest.approx(2 * (dense + experts * used / n), abs=64)


def test_a_prompt_computes_keys_and_values_alone_in_the_last_block(llama):
    catalog, work = llama
    counted = sum(
        s.n_weights
        for s in matrices(catalog)
        if s.name.startswith("blk.0.") and s.name.split(".")[2] in ("attn_q", "attn_k", "attn_v")
    )
    assert work.layers == 1  # so the only block is the last one
    assert sum(work.prompt_weights.values()) == counted


def test_experts_have_a_rate_of_their_own_in_a_prompt(moe_artifact):
    catalog = open_catalog(moe_artifact)
    work = work_of(catalog, plan_tier(catalog, "source"))
    model, experts = catalog.manifest.model, [s for s in catalog.stacks if "_exps." in s.name]
    used = model["qwen3moe.expert_used_count"] / model["qwen3moe.expert_count"]
    last = f"blk.{work.layers - 1}."
    n = used * sum(s.n_weights for s in experts if not s.name.startswith(last))
    assert sum(work.expert_weights.values()) == pytest.approx(n, abs=len(experts)) and n > 0
    device = only(expert_operations_per_s=1e6)
    assert prompt_seconds(device, work, 100) == pytest.approx(100 * 2 * n / 1e6, rel=1e-3)
    dense = 2 * sum(work.prompt_weights.values())
    device = only(prompt_operations_per_s=1e6)  # of experts too where they have none
    expected = 100 * (2 * n + dense) / 1e6
    assert prompt_seconds(device, work, 100) == pytest.approx(expected, rel=1e-3)


def test_bytes_over_bandwidth(llama):
    _, work = llama
    n = sum(work.weight_bytes.values())
    assert token_seconds(only(decode_bytes_per_s=1e6), work) == pytest.approx(n / 1e6)


def test_each_type_has_its_rate(llama):
    _, work = llama
    rates = Figure(1e6, "measured", "given", {"Q4_K": 2e6})
    device = replace(only(), decode_bytes_per_s=rates)
    expected = work.weight_bytes["Q4_K"] / 2e6 + work.weight_bytes["F32"] / 1e6
    assert token_seconds(device, work) == pytest.approx(expected)


def test_fixed_costs_of_a_token(llama):
    _, work = llama
    device = only(token_seconds=3.0, layer_seconds=0.5)
    assert token_seconds(device, work) == pytest.approx(3.0 + 0.5 * work.layers)


def test_attention_reads_whole_groups_of_cells_and_one_at_least(llama):
    catalog, work = llama
    model = catalog.manifest.model
    heads = model["llama.attention.head_count"]
    sizes = model["llama.attention.key_length"] + model["llama.attention.value_length"]
    per_cell = work.layers * heads * sizes
    assert work.attended(0) == work.attended(256) == 256 * per_cell
    assert work.attended(257) == work.attended(512) == 512 * per_cell
    device = only(attention_per_s=1e6)
    assert token_seconds(device, work, 1000) == pytest.approx(1024 * per_cell / 1e6)


def test_layers_with_a_window_are_counted_apart(llama):
    catalog, work = llama
    shape = replace(shape_in(catalog), n_layers=3, windowed=(True, False, True))
    per_layer = sum(work.attention) // work.layers
    assert _attention(catalog, shape) == (per_layer, 2 * per_layer)


def test_a_window_ends_what_a_layer_attends_to(llama):
    _, work = llama
    windowed = replace(work, attention=(0, 10), window=512)
    assert windowed.attended(256) == 2560
    assert windowed.attended(512) == windowed.attended(768) == windowed.attended(4096) == 5120


def test_a_prompt_is_two_operations_per_weight_and_token(llama):
    _, work = llama
    n = 2 * sum(work.prompt_weights.values())
    assert prompt_seconds(only(prompt_operations_per_s=1e6), work, 100) == pytest.approx(
        100 * n / 1e6
    )


def test_every_batch_of_a_prompt_reads_the_weights(llama):
    _, work = llama
    n, (_, head) = sum(work.weight_bytes.values()), work.head
    small = replace(work, batch=32)
    device = only(decode_bytes_per_s=1e6)
    assert prompt_seconds(device, small, 33) == pytest.approx((2 * n - head) / 1e6)
    assert prompt_seconds(device, small, 32) == pytest.approx(n / 1e6)
    assert 0 < head < n


def test_a_batch_has_a_rate_of_its_own_where_it_was_measured(llama):
    _, work = llama
    n, (_, head) = sum(work.weight_bytes.values()), work.head
    device = only(decode_bytes_per_s=1e6, batch_bytes_per_s=1e5)
    want = 2 * (n - head) / 1e5 + head / 1e6
    assert prompt_seconds(device, replace(work, batch=32), 33) == pytest.approx(want)


def test_what_a_plan_reads_of_the_artifact(llama_artifact):
    catalog = open_catalog(llama_artifact)
    base = catalog.manifest.base.n_bytes
    levels = sum(level.n_bytes for s in catalog.stacks for level in s.levels[1:])
    assert stored_bytes(catalog, plan_tier(catalog, "Q2_K")) == base
    top = plan_budget(catalog, 1 << 40)
    assert top.depths == highest_depths(catalog)
    assert stored_bytes(catalog, top) == base + levels
    assert 0 <= catalog.levels_bytes - levels < 64 * len(catalog.manifest.stored_order)  # padding


def test_a_prediction_is_of_the_plan_and_the_device(llama_artifact):
    catalog = open_catalog(llama_artifact)
    device, plan = only(decode_bytes_per_s=1e6, storage_bytes_per_s=1e3), plan_tier(catalog, "Q4_K")
    found, work = predict(device, catalog, plan), work_of(catalog, plan)
    assert found.decode_tokens_per_s == pytest.approx(1e6 / sum(work.weight_bytes.values()))
    assert found.read_seconds == stored_bytes(catalog, plan) / 1e3
