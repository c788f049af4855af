"""The machine's probe: models that exist nowhere are whole GGUFs, and known costs come back."""

import gguf
import numpy as np
import pytest

from edgekit.devices.memory import peak_rss_bytes
from edgekit.devices.profile import as_toml, find_device
from edgekit.llama import Context, open_model
from edgekit.probe import (
    CONTEXT,
    DEEP,
    N_PROMPT,
    SHALLOW,
    SHORT_BATCH,
    TYPES,
    WIDTH,
    Measured,
    Timing,
    deep_shape,
    described,
    large_shape,
    least_disturbed,
    probe,
    shapes,
    small_shape,
    timed_again,
)
from edgekit.probe_model import ProbeModel, ProbeShape
from edgekit.progress import Silent

TINY = ProbeShape("Q4_K", 2, 256, 512, 256, 512)


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


def test_llama_cpp_computes_with_it():
    with open_model(ProbeModel(TINY)) as model, Context(model, 64, n_threads=1) as context:
        logits = context.decode([1, 2, 3])
        assert model.n_parameters == sum(np.prod(s) for s in TINY.tensors.values())
    assert np.isfinite(logits).all() and logits.std() > 0


def made_up(token: float, layer: float, read: float) -> tuple[Measured, float]:
    """Timings of a machine whose every cost is known."""
    rate, operations, attention, batch_rate = 2e10, 4e11, 5e9, 8e9

    def timing(shape: ProbeShape) -> Timing:
        single = token + shape.layers * layer + shape.weights_bytes / rate
        single += shape.attention * 256 / attention
        reading = N_PROMPT * (2 * shape.prompt_weights / operations + shape.layers * read)
        batch = single
        if shape.width == WIDTH:
            batch += shape.weights_bytes / batch_rate - shape.weights_bytes / rate
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


@pytest.mark.parametrize("n_bytes", [1, 1 << 40])
def test_what_is_timed_again_takes_the_place_of_what_was(monkeypatch, n_bytes):
    """Large models only for a model that does not stay in the caches."""
    measured, _ = made_up(5e-5, 2e-5, 4e-6)
    monkeypatch.setattr("edgekit.probe._time", lambda *_: Timing(1.0, 2.0, 3.0, 4.0))
    timings = timed_again(measured, ["BF16"], n_bytes).timings
    changed = {shape for shape, timing in timings.items() if timing.token == 1.0}
    assert changed >= {DEEP, SHALLOW, small_shape("BF16", 4, 256), small_shape("BF16", 4, 1024)}
    assert ({large_shape("BF16"), deep_shape("BF16")} <= changed) == (n_bytes > 1)
    assert timings.keys() == measured.timings.keys() and len(changed) == (4 if n_bytes == 1 else 6)


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
