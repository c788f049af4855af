"""Measure this machine: what `edgekit devices probe` writes.

Memory and storage are read plainly. What llama.cpp makes of them is timed on models that exist
nowhere, one ggml type at a time: decoding gives bytes per second, a prompt operations per second, a
small model with few and with many layers what a token and a layer cost whatever their size.
"""

import contextlib
import math
import os
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import numpy as np
import psutil

from edgekit.devices.memory import auto_budget
from edgekit.devices.profile import Device, Figure
from edgekit.disk import require_free
from edgekit.footprint import CELLS
from edgekit.llama import Context, open_model
from edgekit.llama.context import default_threads
from edgekit.probe_model import ProbeModel, ProbeShape
from edgekit.progress import Progress

TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "Q4_0", "Q5_0", "BF16", "F16", "F32")
COMMON = "Q4_K"  # whose models tell what a layer costs
WIDTH, FEED_FORWARD, VOCAB, CONTEXT = 2048, 8192, 256, 2048
LEAST_BYTES = 96 << 20  # of weights that prompts are timed on: more than caches hold
MANY_BYTES = 256 << 20  # that tokens are timed on: what caches keep of them does not count
SMALL_BYTES = 4 << 20  # that stay in the caches of any processor that does not tell their size
MOST_BYTES, FILE_BYTES = 256 << 20, 128 << 20  # of memory and of a file that are read
N_DECODES, N_SMALL, N_PROMPT, SHORT_BATCH = 24, 120, 256, 32
DEEP_SECONDS = 0.5  # that tokens of large models are timed for: what memory gives goes up and down
REPEATS = 3
N_ROUNDS = 3  # over all models: a machine's other work comes in bursts


def small_shape(kind: str, layers: int = 4, feed_forward: int = 768) -> ProbeShape:
    """A model that stays in a processor's caches."""
    return ProbeShape(kind, layers, 256, feed_forward, VOCAB, CONTEXT)


def large_shape(kind: str, n_bytes: int = LEAST_BYTES) -> ProbeShape:
    """A model of real width and at least so many bytes."""
    one = ProbeShape(kind, 1, WIDTH, FEED_FORWARD, VOCAB, CONTEXT)
    layers = max(2, -(-n_bytes // one.weights_bytes))
    return ProbeShape(kind, layers, WIDTH, FEED_FORWARD, VOCAB, CONTEXT)


def deep_shape(kind: str) -> ProbeShape:
    """One that only tokens are timed on."""
    return large_shape(kind, MANY_BYTES)


DEEP, SHALLOW = small_shape(COMMON, 24), small_shape(COMMON)


@dataclass(frozen=True)
class Timing:
    """Seconds of one model: of a token at the start, behind many others, of a prompt.

    Medians of the least disturbed stretch: whatever else the machine does only adds. What was not
    timed is infinite.

    Attributes:
        token: At the start.
        late_token: Behind many others.
        prompt: Of `N_PROMPT` tokens at once.
        batched_prompt: In batches of `SHORT_BATCH`.
    """

    token: float
    late_token: float
    prompt: float
    batched_prompt: float


@dataclass(frozen=True)
class Measured:
    """Everything that was timed."""

    threads: int
    memory_bytes_per_s: float
    storage: tuple[float, float]
    timings: Mapping[ProbeShape, Timing]


def shapes(kinds: Collection[str] = TYPES) -> tuple[ProbeShape, ...]:
    """Every model that is timed, once; of ``kinds``, and the two of `COMMON`."""
    small = [small_shape(kind, 4, ffn) for kind in kinds for ffn in (256, 1024)]
    large = dict.fromkeys(shape(kind) for kind in kinds for shape in (large_shape, deep_shape))
    return (DEEP, SHALLOW, *small, *large)


def probe(folder: Path, name: str, progress: Progress, n_threads: int | None = None) -> Device:
    """Measure this machine: `described` of `measured`."""
    return described(name, measured(folder, progress, n_threads))


def measured(folder: Path, progress: Progress, n_threads: int | None = None) -> Measured:
    """Time everything; takes two minutes, and 128 MiB of disk for a while.

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
            rounds[shape].append(_time(shape, threads))
            progress.advance(1)
    timings = {shape: least_disturbed(of_shape) for shape, of_shape in rounds.items()}
    return Measured(threads, memory, storage, timings)


def timed_again(before: Measured, kinds: Collection[str], model_bytes: int) -> Measured:
    """With what predicts a model of ``kinds`` as it is now: memory's speed changes by the minute.

    Large models are left out where one of ``model_bytes`` stays in the caches.
    """
    is_small = model_bytes <= _cache_bytes()
    chosen = (s for s in shapes(kinds) if s.width < WIDTH or not is_small)
    now = {shape: _time(shape, before.threads) for shape in chosen}
    return replace(before, timings={**before.timings, **now})


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
    small = {kind: _small_rates(kind, timings) for kind in TYPES}
    attention = _attention_per_s(timings[DEEP])
    token, layer = _fixed_costs(timings, small[COMMON][0], attention)
    # Of small models types differ by less than timings do
    small_prompt = statistics.median(prompt for _, prompt in small.values())
    prompt = _prompt_cost(timings, small_prompt)
    fixed = token, layer, prompt, attention
    large = {kind: _large_rates(kind, timings, fixed) for kind in TYPES}

    def figure(value: float, what: str = "llama.cpp") -> Figure:
        return Figure(_digits(value), "measured", f"{how}: {what}")

    def by_type(rates: Mapping[str, tuple[float, ...]], which: int) -> Figure:
        values = {kind: _digits(rate[which]) for kind, rate in rates.items()}
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
        decode_bytes_per_s=by_type(large, 0),
        attention_per_s=figure(attention),
        prompt_operations_per_s=by_type(large, 1),
        token_seconds=figure(token),
        layer_seconds=figure(layer),
        prompt_layer_seconds=figure(prompt),
        batch_bytes_per_s=by_type(large, 2),
        small_bytes=Figure(_cache_bytes(), "measured", f"{how}: the processor's last cache"),
        small_decode_bytes_per_s=by_type(small, 0),
        small_prompt_operations_per_s=figure(small_prompt),
    )


def _small_rates(kind: str, timings: Mapping[ProbeShape, Timing]) -> tuple[float, float]:
    """Bytes and operations per second, from two small models that differ in weights alone."""
    narrow, wide = small_shape(kind, 4, 256), small_shape(kind, 4, 1024)
    less, more = timings[narrow], timings[wide]
    token = _positive(more.token - less.token, more.token)
    prompt = _positive(more.prompt - less.prompt - token, more.prompt)
    n_bytes = wide.weights_bytes - narrow.weights_bytes
    return n_bytes / token, 2 * N_PROMPT * (wide.prompt_weights - narrow.prompt_weights) / prompt


def _fixed_costs(
    timings: Mapping[ProbeShape, Timing], rate: float, attention: float
) -> tuple[float, float]:
    """Seconds of a token and of a layer whatever their size, from two models of other depths."""
    deep = _unattended(DEEP, timings, attention)
    shallow = _unattended(SHALLOW, timings, attention)
    of_weights = (DEEP.weights_bytes - SHALLOW.weights_bytes) / rate
    layer = _positive(deep - shallow - of_weights, deep) / (DEEP.layers - SHALLOW.layers)
    token = shallow - SHALLOW.layers * layer - SHALLOW.weights_bytes / rate
    return _positive(token, shallow), layer


def _prompt_cost(timings: Mapping[ProbeShape, Timing], rate: float) -> float:
    """Seconds of a layer and a token of a prompt whatever their size."""
    deep, shallow = timings[DEEP], timings[SHALLOW]
    rest = (deep.prompt - deep.token - shallow.prompt + shallow.token) / N_PROMPT
    weights = 2 * (DEEP.prompt_weights - SHALLOW.prompt_weights) / rate
    return _positive(rest - weights, deep.prompt / N_PROMPT) / (DEEP.layers - SHALLOW.layers)


def _unattended(shape: ProbeShape, timings: Mapping[ProbeShape, Timing], attention: float) -> float:
    """Seconds of a first token less its attention, which reads one group of cells."""
    token = timings[shape].token
    return _positive(token - shape.attention * CELLS / attention, token)


def _attention_per_s(deep: Timing) -> float:
    cells = CONTEXT - CELLS
    return DEEP.attention * cells / _positive(deep.late_token - deep.token, deep.late_token)


def _large_rates(
    kind: str, timings: Mapping[ProbeShape, Timing], fixed: tuple[float, float, float, float]
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
    not_batch = timing.token - large.weights_bytes / decode
    of_weights = _positive(batch - not_batch, batch)
    not_weights = batch + N_PROMPT * large.layers * read
    prompt = _positive(timing.prompt - not_weights, timing.prompt)
    operations = 2 * N_PROMPT * large.prompt_weights
    return decode, operations / prompt, large.weights_bytes / of_weights


def _positive(seconds: float, whole: float) -> float:
    """A difference of two timings, at least a twentieth of the larger: noise must not flip it."""
    return max(seconds, whole / 20)


def _cache_bytes() -> int:
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


def _time(shape: ProbeShape, threads: int) -> Timing:
    """Time one model."""
    ids = [1 + i % (shape.vocab - 1) for i in range(CONTEXT)]
    n = N_SMALL if shape.width < WIDTH else N_DECODES
    reads = shape.width < WIDTH or shape == large_shape(shape.kind)
    with open_model(ProbeModel(shape)) as model, Context(model, CONTEXT, n_threads=threads) as c:
        prompt = _prompt_seconds(c, ids[:N_PROMPT]) if reads else math.inf
        c.decode(ids[:1])  # warms up
        c.clear()
        tokens = _token_seconds(c, n, 0 if reads else DEEP_SECONDS)
        late = tokens
        if shape == DEEP:
            c.decode(ids[: CONTEXT - len(c.tokens) - N_DECODES])
            late = _token_seconds(c, N_DECODES)
        batched = math.inf
        if shape == large_shape(shape.kind):
            with Context(model, N_PROMPT, n_batch=SHORT_BATCH, n_threads=threads) as short:
                batched = _prompt_seconds(short, ids[:N_PROMPT])
    return Timing(_least_median(tokens), _least_median(late), prompt, batched)


def _prompt_seconds(context: Context, ids: list[int]) -> float:
    """The least of a few, the first one aside, which warms up; leaves the context empty."""
    seconds = list[float]()
    for _ in range(1 + REPEATS):
        seconds.append(_seconds(lambda: context.decode(ids)))
        context.clear()
    return min(seconds[1:])


def _token_seconds(context: Context, n: int, least: float = 0.0) -> list[float]:
    """Of ``n`` tokens, one after the other, and more until they take ``least`` seconds.

    More only as far as they attend to the first group of cells.
    """
    seconds = list[float]()
    while len(seconds) < n or (sum(seconds) < least and len(context.tokens) < CELLS):
        seconds.append(_seconds(lambda: context.decode([1])))
    return seconds


def _least_median(seconds: Sequence[float]) -> float:
    """The least median of a few stretches."""
    n = max(1, len(seconds) // REPEATS)
    return min(statistics.median(seconds[i : i + n]) for i in range(0, len(seconds) - n + 1, n))


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _memory_bytes_per_s(threads: int) -> float:
    """Reading memory that no cache holds, all threads at once."""
    room = psutil.virtual_memory().available // 4
    n = max(1, min(MOST_BYTES, room) // (8 * threads))
    parts = [np.ones(n, np.uint64) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        runs = [_seconds(lambda: list(pool.map(np.sum, parts))) for _ in range(4 * REPEATS)]
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
