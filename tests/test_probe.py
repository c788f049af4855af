"""The machine's probe: models that exist nowhere are whole GGUFs, and known costs come back."""

import gguf
import numpy as np
import pytest

from edgekit.devices.memory import peak_rss_bytes
from edgekit.devices.profile import as_toml, find_device
from edgekit.llama import Context, Listener, MemoryFile, open_model
from edgekit.probe import Measured, described, least_disturbed, probe
from edgekit.probe_model import ROUTER, ProbeModel, ProbeShape
from edgekit.probe_timing import (
    CONTEXT,
    DEEP,
    EXPERTS,
    N_PROMPT,
    SHALLOW,
    SHORT_BATCH,
    SMALL_WIDTH,
    TYPES,
    WIDTH,
    Bench,
    Timing,
    deep_shape,
    expert_pair,
    large_shape,
    shapes,
    small_pair,
    small_shape,
    timed,
)
from edgekit.progress import Silent

TINY = ProbeShape("Q4_K", 2, 256, 512, 256, 512)
MIXTURE = ProbeShape("Q4_K", 2, 256, 512, 256, 512, EXPERTS)


def whole(model: ProbeModel) -> bytes:
    data = b""
    while len(data) < model.size:
        data += model.read(len(data), 1 << 20)
    return data


@pytest.mark.parametrize("kind", ["Q4_K", "Q8_0", "BF16"])
def test_it_is_a_gguf_to_the_reader_of_others(tmp_path, kind):
    shape = ProbeShape(kind, 2, 256, 512, 256, 512)
    path = tmp_path / "probe.gguf"
    path.write_bytes(whole(ProbeModel(shape)))
    reader = gguf.GGUFReader(path)
    found = {
        t.name: (tuple(reversed(t.shape.tolist())), t.tensor_type.name) for t in reader.tensors
    }
    assert found == {
        name: (extents, kind if len(extents) == 2 else "F32")
        for name, extents in shape.tensors.items()
    }
    matrices = [t for t in reader.tensors if len(t.shape) == 2]
    assert sum(t.n_bytes for t in matrices) == shape.weights_bytes
    assert shape.expert_weights == 0
    weights = gguf.dequantize(matrices[0].data, matrices[0].tensor_type)
    assert 0.015 < weights.std() < 0.025 and np.isfinite(weights).all()


def test_bytes_do_not_depend_on_how_they_are_read():
    model = ProbeModel(TINY)
    data = whole(model)
    random = np.random.default_rng(0)
    for start in random.integers(0, model.size, 200):
        n = int(random.integers(1, 5000))
        piece = model.read(int(start), n)
        assert 0 < len(piece) <= n
        assert piece == data[start : start + len(piece)]


@pytest.mark.parametrize("shape", [TINY, MIXTURE])
def test_llama_cpp_computes_with_it(shape):
    with open_model(ProbeModel(shape)) as model, Context(model, 64, n_threads=1) as context:
        logits = context.decode([1, 2, 3])
        assert model.n_parameters == sum(np.prod(s) for s in shape.tensors.values())
    assert np.isfinite(logits).all() and logits.std() > 0


def test_a_mixture_sends_a_prompts_tokens_to_all_experts():
    """Or llama.cpp would multiply few of them with many tokens each."""
    data = whole(ProbeModel(MIXTURE))
    with open_model(MemoryFile(data)) as model:
        used = np.zeros(EXPERTS, int)

        def chosen(_block: int, ids: np.ndarray) -> None:
            used[ids] += 1

        listener = Listener(MIXTURE.layers, EXPERTS, chosen, always=True)
        with Context(model, 512, n_threads=1, listener=listener) as context:
            for token in range(1, 129):
                context.decode([token])
    assert used.min() > 0.2 * used.mean()
    assert MIXTURE.expert_weights == 2 * 3 * 512 * 256  # of one block: the last has one token
    assert f"blk.0.{ROUTER}.weight" in MIXTURE.tensors


def made_up(token: float, layer: float, read: float) -> tuple[Measured, float]:
    """Timings of a machine whose every cost is known."""
    rate, operations, attention, batch_rate, experts = 2e10, 4e11, 5e9, 8e9, 1.5e11

    def timing(shape: ProbeShape) -> Timing:
        single = token + shape.layers * layer + shape.weights_bytes / rate
        single += shape.attention * 256 / attention
        reading = N_PROMPT * (2 * shape.prompt_weights / operations + shape.layers * read)
        reading += N_PROMPT * 2 * shape.expert_weights / experts
        n_bytes = shape.used_bytes if shape.experts else shape.weights_bytes
        batch = single - shape.weights_bytes / rate
        batch += n_bytes / (batch_rate if shape.width == WIDTH else rate)
        cells = shape.attention * (CONTEXT - 256) / attention
        batches = N_PROMPT // SHORT_BATCH
        return Timing(single, single + cells, batch + reading, batches * batch + reading)

    return Measured(2, 4e10, (2e9, 1e10), {shape: timing(shape) for shape in shapes()}), rate


def test_costs_that_went_in_come_out():
    measured, rate = made_up(token=5e-5, layer=2e-5, read=4e-6)
    device = described("here", measured)
    assert device.token_seconds.value == pytest.approx(5e-5, rel=0.02)
    assert device.layer_seconds.value == pytest.approx(2e-5, rel=0.02)
    assert device.prompt_layer_seconds.value == pytest.approx(4e-6, rel=0.02)
    assert device.attention_per_s.value == pytest.approx(5e9, rel=0.01)
    for kind in TYPES:
        assert device.decode_bytes_per_s.of(kind) == pytest.approx(rate, rel=0.01)
        assert device.small_decode_bytes_per_s.of(kind) == pytest.approx(rate, rel=0.01)
        assert device.prompt_operations_per_s.of(kind) == pytest.approx(4e11, rel=0.02)
        assert device.batch_bytes_per_s.of(kind) == pytest.approx(8e9, rel=0.02)
        assert device.small_prompt_operations_per_s.of(kind) == pytest.approx(4e11, rel=0.02)
        assert device.expert_operations_per_s.of(kind) == pytest.approx(1.5e11, rel=0.02)
        assert device.small_expert_operations_per_s.of(kind) == pytest.approx(1.5e11, rel=0.02)


@pytest.mark.parametrize("late", [1e-3, 1e-1])  # attention costs nothing, or all of a token
def test_noise_larger_than_what_is_measured_leaves_every_figure_above_zero(tmp_path, late):
    measured, _ = made_up(5e-5, 2e-5, 4e-6)
    flat = {shape: Timing(1e-3, late, 2e-3, 2e-3) for shape in measured.timings}
    device = described("noisy", Measured(2, 4e10, (2e9, 1e10), flat))
    path = tmp_path / "noisy.toml"
    path.write_text(as_toml(device))
    assert find_device(str(path)) == device  # which refuses what is not above zero


def test_of_two_rounds_the_less_disturbed_counts():
    rounds = [Timing(1.0, 5.0, 3.0, 7.0), Timing(2.0, 4.0, 3.5, 6.0)]
    assert least_disturbed(rounds) == Timing(1.0, 4.0, 3.0, 6.0)


def untimed(timing):
    return {name for name, value in vars(timing).items() if np.isinf(value)}


def test_a_model_is_timed_for_what_it_tells_alone():
    assert untimed(timed(small_shape("Q4_K"), 1)) == {"batched_prompt"}
    assert untimed(timed(expert_pair("Q4_K", SMALL_WIDTH)[0], 1)) == {
        "token", "late_token", "batched_prompt",
    }  # fmt: skip


@pytest.mark.slow
def test_large_models_are_timed_for_tokens_or_for_prompts():
    assert untimed(timed(deep_shape("Q4_K"), 2)) == {"prompt", "batched_prompt"}
    assert untimed(timed(large_shape("Q4_K"), 2)) == {"token", "late_token"}


@pytest.mark.parametrize("keeps", [True, False])
def test_a_bench_times_its_models_anew_and_leaves_the_others(keeps):
    narrow, wide = small_pair("Q4_K")
    before = {shape: Timing(9.0, 9.0, 9.0, 9.0) for shape in (narrow, wide, SHALLOW)}
    with Bench((narrow, wide), 1, keeps=keeps) as bench:
        for _ in range(2):
            tokens, prompts = bench.with_tokens(before), bench.with_prompts(before)
    for shape in (narrow, wide):
        assert 0 < tokens[shape].token < 1 and tokens[shape].prompt == 9.0
        assert 0 < prompts[shape].prompt < 9 and prompts[shape].token == 9.0
    assert tokens[SHALLOW] == prompts[SHALLOW] == before[SHALLOW]


def test_large_models_do_not_fit_caches_and_small_ones_differ_in_weights_alone():
    assert all(large_shape(kind).weights_bytes >= 96 << 20 for kind in TYPES)
    assert all(256 << 20 <= deep_shape(kind).weights_bytes < 512 << 20 for kind in TYPES)
    assert DEEP.layers > SHALLOW.layers and DEEP.width == SHALLOW.width
    assert small_shape("F32", 4, 1024).weights_bytes < 20 << 20


def test_a_childs_peak_is_its_own(tmp_path):
    import subprocess
    import sys

    held = np.ones(40 << 20, np.uint8)  # what this process holds must not count
    code = "from edgekit.devices.memory import peak_rss_bytes as p; print(p())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < peak_rss_bytes() - held.nbytes // 2
    assert int(done.stdout) < 80 << 20


@pytest.mark.slow
def test_this_machine_has_a_profile(tmp_path):
    device = probe(tmp_path, "here", Silent())
    assert device.decode_bytes_per_s.value < device.memory_bytes_per_s.value * 1.5
    assert device.budget_bytes > 0 and list(tmp_path.iterdir()) == []
