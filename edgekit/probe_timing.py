"""What llama.cpp takes on models that exist nowhere: which are timed, and how.

A model of one ggml type and real width tells what its weights cost; small ones, which stay in the
processor's caches, what a token and a layer cost whatever their size; two mixtures that differ in
the width of their experts what those cost.
"""

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from edgekit.footprint import CELLS
from edgekit.llama import Context, open_model
from edgekit.probe_model import ProbeModel, ProbeShape

TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "Q4_0", "Q5_0", "BF16", "F16", "F32")
COMMON = "Q4_K"  # whose models tell what a layer costs
WIDTH, FEED_FORWARD, VOCAB, CONTEXT = 2048, 8192, 256, 2048
SMALL_WIDTH, EXPERTS = 256, 8
LEAST_BYTES = 96 << 20  # of weights that prompts are timed on: more than caches hold
MANY_BYTES = 256 << 20  # that tokens are timed on: what caches keep of them does not count
N_DECODES, N_SMALL, N_PROMPT, SHORT_BATCH = 24, 120, 256, 32
DEEP_SECONDS = 0.5  # that tokens of large models are timed for: what memory gives goes up and down
REPEATS = 3


def small_shape(kind: str, layers: int = 4, feed_forward: int = 768) -> ProbeShape:
    """A model that stays in a processor's caches."""
    return ProbeShape(kind, layers, SMALL_WIDTH, feed_forward, VOCAB, CONTEXT)


def small_pair(kind: str) -> tuple[ProbeShape, ProbeShape]:
    """Two of them that differ in weights alone."""
    return small_shape(kind, 4, 256), small_shape(kind, 4, 1024)


def large_shape(kind: str, n_bytes: int = LEAST_BYTES) -> ProbeShape:
    """A model of real width and at least so many bytes; prompts are timed on it."""
    one = ProbeShape(kind, 1, WIDTH, FEED_FORWARD, VOCAB, CONTEXT)
    layers = max(2, -(-n_bytes // one.weights_bytes))
    return ProbeShape(kind, layers, WIDTH, FEED_FORWARD, VOCAB, CONTEXT)


def deep_shape(kind: str) -> ProbeShape:
    """One that tokens are timed on."""
    return large_shape(kind, MANY_BYTES)


def expert_pair(kind: str, width: int) -> tuple[ProbeShape, ProbeShape]:
    """Two mixtures that differ in the width of their experts alone; prompts are timed on them."""
    layers, widths = (2, (256, 768)) if width == WIDTH else (3, (256, 512))
    narrow, wide = (ProbeShape(kind, layers, width, ffn, VOCAB, CONTEXT, EXPERTS) for ffn in widths)
    return narrow, wide


DEEP, SHALLOW = small_shape(COMMON, 24), small_shape(COMMON)


def shapes(kinds: Collection[str] = TYPES) -> tuple[ProbeShape, ...]:
    """Every model that is timed, once; of ``kinds``, and the two of `COMMON`."""
    found = [DEEP, SHALLOW]
    for kind in kinds:
        found += [*small_pair(kind), large_shape(kind), deep_shape(kind)]
        found += [*expert_pair(kind, SMALL_WIDTH), *expert_pair(kind, WIDTH)]
    return tuple(dict.fromkeys(found))


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

    token: float = math.inf
    late_token: float = math.inf
    prompt: float = math.inf
    batched_prompt: float = math.inf


Timings = Mapping[ProbeShape, Timing]


class Opened:
    """A model in llama.cpp, ready to be timed; a context manager."""

    def __init__(self, shape: ProbeShape, threads: int) -> None:
        """Load it."""
        self.shape, self._threads = shape, threads
        with contextlib.ExitStack() as stack:
            self._model = stack.enter_context(open_model(ProbeModel(shape)))
            self._context = stack.enter_context(Context(self._model, CONTEXT, n_threads=threads))
            self._stack = stack.pop_all()

    def __enter__(self) -> "Opened":
        """Use as a context manager."""
        return self

    def __exit__(self, *_: object) -> None:
        """Free it."""
        self._stack.close()

    def with_tokens(self, timing: Timing) -> Timing:
        """``timing`` with tokens timed, where this model tells something about them."""
        is_large = self.shape.width == WIDTH
        if self.shape.experts or (is_large and self.shape != deep_shape(self.shape.kind)):
            return timing
        context = self._context
        context.clear()
        context.decode([1])  # warms up
        context.clear()
        n, least = (N_DECODES, DEEP_SECONDS) if is_large else (N_SMALL, 0.0)
        tokens = late = _token_seconds(context, n, least)
        if self.shape == DEEP:
            context.decode(_prompt(CONTEXT - len(context.tokens) - N_DECODES))
            late = _token_seconds(context, N_DECODES)
        return replace(timing, token=_least_median(tokens), late_token=_least_median(late))

    def with_prompt(self, timing: Timing) -> Timing:
        """``timing`` with a prompt at once timed, where this model tells something about it."""
        if self.shape == deep_shape(self.shape.kind) != large_shape(self.shape.kind):
            return timing
        return replace(timing, prompt=_prompt_seconds(self._context))

    def with_batches(self, timing: Timing) -> Timing:
        """``timing`` with a prompt in batches timed, for large models."""
        if self.shape != large_shape(self.shape.kind):
            return timing
        with Context(self._model, N_PROMPT, n_batch=SHORT_BATCH, n_threads=self._threads) as short:
            return replace(timing, batched_prompt=_prompt_seconds(short))


def timed(shape: ProbeShape, threads: int) -> Timing:
    """Load a model, time it and free it."""
    with Opened(shape, threads) as model:
        return model.with_batches(model.with_prompt(model.with_tokens(Timing())))


class Bench:
    """Some models that are timed again and again, between other things; a context manager."""

    def __init__(self, shapes: Collection[ProbeShape], threads: int, *, keeps: bool) -> None:
        """Time ``shapes``; hold all of them in memory, or one at a time."""
        self._shapes, self._threads, self._keeps = shapes, threads, keeps
        self._held: dict[ProbeShape, Opened] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Bench":
        """Use as a context manager."""
        return self

    def __exit__(self, *_: object) -> None:
        """Free the models."""
        self._held.clear()
        self._stack.close()

    def with_tokens(self, timings: Timings) -> Timings:
        """``timings`` with tokens timed anew."""
        return self._anew(timings, Opened.with_tokens)

    def with_prompts(self, timings: Timings) -> Timings:
        """``timings`` with prompts at once timed anew."""
        return self._anew(timings, Opened.with_prompt)

    def _anew(self, timings: Timings, time_it: Callable[[Opened, Timing], Timing]) -> Timings:
        now = dict[ProbeShape, Timing]()
        for shape in self._shapes:
            with self._opened(shape) as model:
                now[shape] = time_it(model, timings[shape])
        return {**timings, **now}

    @contextlib.contextmanager
    def _opened(self, shape: ProbeShape) -> Iterator[Opened]:
        if not self._keeps:
            with Opened(shape, self._threads) as model:
                yield model
            return
        if shape not in self._held:
            self._held[shape] = self._stack.enter_context(Opened(shape, self._threads))
        yield self._held[shape]


def seconds_of(call: Callable[[], object]) -> float:
    """How long a call takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _prompt(n: int) -> list[int]:
    return [1 + i % (VOCAB - 1) for i in range(n)]


def _prompt_seconds(context: Context) -> float:
    """The least of a few, the first one aside, which warms up; leaves the context empty."""
    seconds, ids = list[float](), _prompt(N_PROMPT)
    for _ in range(1 + REPEATS):
        context.clear()
        seconds.append(seconds_of(lambda: context.decode(ids)))
    context.clear()
    return min(seconds[1:])


def _token_seconds(context: Context, n: int, least: float = 0.0) -> list[float]:
    """Of ``n`` tokens, one after the other, and more until they take ``least`` seconds.

    More only as far as they attend to the first group of cells.
    """
    seconds = list[float]()
    while len(seconds) < n or (sum(seconds) < least and len(context.tokens) < CELLS):
        seconds.append(seconds_of(lambda: context.decode([1])))
    return seconds


def _least_median(seconds: Sequence[float]) -> float:
    """The least median of a few stretches."""
    n = max(1, len(seconds) // REPEATS)
    return min(statistics.median(seconds[i : i + n]) for i in range(0, len(seconds) - n + 1, n))
