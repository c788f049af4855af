"""Measure this machine: what `edgekit devices probe` writes.

Memory and storage are read plainly. What llama.cpp makes of them is timed on models that exist
nowhere, one ggml type at a time: decoding gives bytes per second, a prompt operations per second, a
small model with few and with many layers what a token and a layer cost whatever their size.
"""

import contextlib
import os
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
import psutil

from edgekit.devices.memory import auto_budget
from edgekit.devices.profile import Device, Figure
from edgekit.disk import require_free
from edgekit.footprint import CELLS
from edgekit.llama.context import default_threads
from edgekit.probe_model import ProbeShape
from edgekit.probe_timing import (
    COMMON,
    CONTEXT,
    DEEP,
    N_PROMPT,
    REPEATS,
    SHALLOW,
    SHORT_BATCH,
    SMALL_WIDTH,
    TYPES,
    WIDTH,
    Timing,
    Timings,
    deep_shape,
    expert_pair,
    large_shape,
    seconds_of,
    shapes,
    small_pair,
    timed,
)
from edgekit.progress import Progress

SMALL_BYTES = 4 << 20  # that stay in the caches of any processor that does not tell their size
MOST_BYTES, FILE_BYTES = 256 << 20, 128 << 20  # of memory and of a file that are read
N_ROUNDS = 3  # over all models: a machine's other work comes in bursts


@dataclass(frozen=True)
class Measured:
    """Everything that was timed."""

    threads: int
    memory_bytes_per_s: float
    storage: tuple[float, float]
    timings: Timings


def probe(folder: Path, name: str, progress: Progress, n_threads: int | None = None) -> Device:
    """Measure this machine: `described` of `measured`."""
    return described(name, measured(folder, progress, n_threads))


def measured(folder: Path, progress: Progress, n_threads: int | None = None) -> Measured:
    """Time everything; takes three minutes, and 128 MiB of disk for a while.

    Args:
        folder: Where the storage is that artifacts will lie on.
        progress: Told every step.
        n_threads: That decode; ``None`` takes the physical cores.

    Raises:
        DiskFullError: There is no room for the file.
    """
    threads = n_threads or default_threads()
    progress.start("memory and storage", 2)
    memory = _memory_bytes_per_s(threads)
    progress.advance(1)
    storage = _storage_bytes_per_s(folder)
    progress.advance(1)
    rounds = defaultdict[ProbeShape, list[Timing]](list)
    for _ in range(N_ROUNDS):
        progress.start("probe", len(shapes()))
        for shape in shapes():
            rounds[shape].append(timed(shape, threads))
            progress.advance(1)
    timings = {shape: least_disturbed(of_shape) for shape, of_shape in rounds.items()}
    return Measured(threads, memory, storage, timings)


def least_disturbed(rounds: Sequence[Timing]) -> Timing:
    """Of one model the least of every time."""
    return Timing(*map(min, zip(*map(astuple, rounds), strict=True)))


def described(name: str, measured: Measured) -> Device:
    """The profile from what was timed."""
    timings, budget = measured.timings, auto_budget()
    total, how = (
        psutil.virtual_memory().total,
        f"edgekit devices probe, {time.strftime('%Y-%m-%d')}",
    )
    small_decode = {kind: _small_decode_rate(kind, timings) for kind in TYPES}
    small_prompt = _operations_per_s(
        small_pair, timings, lambda s: s.prompt_weights, lambda s: timings[s].token
    )
    attention = _attention_per_s(timings[DEEP])
    token, layer = _fixed_costs(timings, small_decode[COMMON], attention)
    prompt = _prompt_cost(timings, small_prompt[COMMON])
    fixed = token, layer, prompt, attention
    large = {kind: _large_rates(kind, timings, fixed) for kind in TYPES}
    decode, large_prompt, batch = (
        {kind: rates[i] for kind, rates in large.items()} for i in range(3)
    )
    small_experts = _expert_rates(SMALL_WIDTH, timings, small_prompt, small_decode)
    experts = _expert_rates(WIDTH, timings, large_prompt, batch)

    def figure(value: float, what: str = "llama.cpp") -> Figure:
        return Figure(_digits(value), "measured", f"{how}: {what}")

    def by_type(rates: Mapping[str, float]) -> Figure:
        values = {kind: _digits(rate) for kind, rate in rates.items()}
        return Figure(statistics.median(values.values()), "measured", f"{how}: llama.cpp", values)

    return Device(
        id=name,
        name=name,
        system=f"{platform.system()} {platform.release()}",
        processor=_processor(),
        cores=figure(measured.threads, "threads that decode"),
        total_memory_bytes=Figure(total, "measured", how),
        app_share=figure(min(1.0, budget.n_bytes / total), budget.source),
        memory_bytes_per_s=figure(measured.memory_bytes_per_s, "sums of integers, all threads"),
        storage_bytes_per_s=figure(measured.storage[0], "a file that is not in the page cache"),
        cached_bytes_per_s=figure(measured.storage[1], "a file that is"),
        decode_bytes_per_s=by_type(decode),
        attention_per_s=figure(attention),
        prompt_operations_per_s=by_type(large_prompt),
        token_seconds=figure(token),
        layer_seconds=figure(layer),
        prompt_layer_seconds=figure(prompt),
        batch_bytes_per_s=by_type(batch),
        small_bytes=Figure(cache_bytes(), "measured", f"{how}: the processor's last cache"),
        small_decode_bytes_per_s=by_type(small_decode),
        small_prompt_operations_per_s=by_type(small_prompt),
        expert_operations_per_s=by_type(experts),
        small_expert_operations_per_s=by_type(small_experts),
    )


def _small_decode_rate(kind: str, timings: Timings) -> float:
    """Bytes per second of a token, from two small models that differ in weights alone."""
    narrow, wide = small_pair(kind)
    less, more = timings[narrow].token, timings[wide].token
    return (wide.weights_bytes - narrow.weights_bytes) / _positive(more - less, more)


def _operations_per_s(
    pair: Callable[[str], tuple[ProbeShape, ProbeShape]],
    timings: Timings,
    weights: Callable[[ProbeShape], int],
    rest: Callable[[ProbeShape], float],
) -> dict[str, float]:
    """Operations per second of a prompt, by ggml type.

    What is no multiplication (norms, attention, routing) takes all types as long as `COMMON`,
    whose two models tell it: a difference of two timings for each type would be mostly noise.

    Args:
        pair: The two models of a type, which differ in ``weights`` alone.
        timings: Of all models.
        weights: That a token is multiplied with.
        rest: Seconds that a model's prompt takes for what is known of it.
    """

    def operations(shape: ProbeShape) -> int:
        return 2 * N_PROMPT * weights(shape)

    def seconds(shape: ProbeShape) -> float:
        return timings[shape].prompt - rest(shape)

    narrow, wide = pair(COMMON)
    more = _positive(seconds(wide) - seconds(narrow), timings[wide].prompt)
    fixed = seconds(wide) - operations(wide) * more / (operations(wide) - operations(narrow))
    wides = {kind: pair(kind)[1] for kind in TYPES}
    return {
        kind: operations(shape) / _positive(seconds(shape) - fixed, timings[shape].prompt)
        for kind, shape in wides.items()
    }


def _expert_rates(
    width: int, timings: Timings, prompt: Mapping[str, float], batch: Mapping[str, float]
) -> dict[str, float]:
    """The same for experts of mixtures of that width, given the rates of their other matrices."""

    def rest(shape: ProbeShape) -> float:
        of_others = 2 * N_PROMPT * shape.prompt_weights / prompt[shape.kind]
        return of_others + shape.used_bytes / batch[shape.kind]

    return _operations_per_s(
        lambda kind: expert_pair(kind, width), timings, lambda s: s.expert_weights, rest
    )


def _fixed_costs(timings: Timings, rate: float, attention: float) -> tuple[float, float]:
    """Seconds of a token and of a layer whatever their size, from two models of other depths."""
    deep = _unattended(DEEP, timings, attention)
    shallow = _unattended(SHALLOW, timings, attention)
    of_weights = (DEEP.weights_bytes - SHALLOW.weights_bytes) / rate
    layer = _positive(deep - shallow - of_weights, deep) / (DEEP.layers - SHALLOW.layers)
    token = shallow - SHALLOW.layers * layer - SHALLOW.weights_bytes / rate
    return _positive(token, shallow), layer


def _prompt_cost(timings: Timings, rate: float) -> float:
    """Seconds of a layer and a token of a prompt whatever their size."""
    deep, shallow = timings[DEEP], timings[SHALLOW]
    rest = (deep.prompt - deep.token - shallow.prompt + shallow.token) / N_PROMPT
    weights = 2 * (DEEP.prompt_weights - SHALLOW.prompt_weights) / rate
    return _positive(rest - weights, deep.prompt / N_PROMPT) / (DEEP.layers - SHALLOW.layers)


def _unattended(shape: ProbeShape, timings: Timings, attention: float) -> float:
    """Seconds of a first token less its attention, which reads one group of cells."""
    token = timings[shape].token
    return _positive(token - shape.attention * CELLS / attention, token)


def _attention_per_s(deep: Timing) -> float:
    cells = CONTEXT - CELLS
    return DEEP.attention * cells / _positive(deep.late_token - deep.token, deep.late_token)


def _large_rates(
    kind: str, timings: Timings, fixed: tuple[float, float, float, float]
) -> tuple[float, float, float]:
    """Of models of real width, less what is not weights.

    Returns:
        Bytes per second of a token; operations per second of a prompt; bytes per second of a batch.
    """
    large, deep, (token, layer, read, attention) = large_shape(kind), deep_shape(kind), fixed
    single, timing = _unattended(deep, timings, attention), timings[large]
    decode = deep.weights_bytes / _positive(single - token - deep.layers * layer, single)
    n_more = N_PROMPT // SHORT_BATCH - 1
    batch = _positive(timing.batched_prompt - timing.prompt, timing.prompt) / n_more
    not_batch = token + large.layers * layer + large.attention * CELLS / attention
    of_weights = _positive(batch - not_batch, batch)
    not_weights = batch + N_PROMPT * large.layers * read
    prompt = _positive(timing.prompt - not_weights, timing.prompt)
    operations = 2 * N_PROMPT * large.prompt_weights
    return decode, operations / prompt, large.weights_bytes / of_weights


def _positive(seconds: float, whole: float) -> float:
    """A difference of two timings, at least a twentieth of the larger: noise must not flip it."""
    return max(seconds, whole / 20)


def cache_bytes() -> int:
    """The last cache of the first core."""
    sizes = [SMALL_BYTES]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with contextlib.suppress(OSError, ValueError):
            sizes.append(int(path.read_text().strip().removesuffix("K")) << 10)
    return max(sizes)


def _digits(value: float) -> float:
    """Four digits: a measurement has no more."""
    return float(f"{value:.4g}")


def _processor() -> str:
    """The processor's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine() or "unknown"


def _memory_bytes_per_s(threads: int) -> float:
    """Reading memory that no cache holds, all threads at once."""
    room = psutil.virtual_memory().available // 4
    n = max(1, min(MOST_BYTES, room) // (8 * threads))
    parts = [np.ones(n, np.uint64) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        runs = [seconds_of(lambda: list(pool.map(np.sum, parts))) for _ in range(4 * REPEATS)]
    return 8 * n * threads / min(runs)


def _storage_bytes_per_s(folder: Path) -> tuple[float, float]:
    """Reading a file cold and warm."""
    require_free(folder, FILE_BYTES, "measuring its speed")
    block = np.random.default_rng(0).bytes(1 << 20)  # a file system may compress
    with tempfile.NamedTemporaryFile(dir=folder, prefix="edgekit-probe-") as file:
        for _ in range(FILE_BYTES >> 20):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        cold, warm = [], []
        for _ in range(REPEATS):
            _drop_from_cache(file.fileno())
            cold.append(_read_seconds(file.name))
            warm.append(_read_seconds(file.name))
    return FILE_BYTES / min(cold), FILE_BYTES / min(warm)


def _drop_from_cache(descriptor: int) -> None:
    """Forget the file's pages where the system can be asked to."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _read_seconds(path: str) -> float:
    buffer = bytearray(1 << 20)
    started = time.perf_counter()
    with Path(path).open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return time.perf_counter() - started
