"""Generate text with llama.cpp's own samplers, streamed piece by piece."""

import codecs
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from edgekit.errors import UsageError
from edgekit.llama.binding import binding
from edgekit.llama.context import Context

StopReason = Literal["end", "length", "context", "stop"]
Between = Callable[[int], Context]  # tokens still to come -> the context to go on with


@dataclass(frozen=True)
class Sampling:
    """The chain of samplers: top_k, top_p, min_p, temperature, draw.

    Attributes:
        temperature: 0 takes the most likely token always.
        seed: Of the draw, 0 to 2**32 - 2.
        top_k: Keep the k most likely; 0 keeps all.
        top_p: Keep the most likely that together have this probability; 1 keeps all.
        min_p: Drop those below this share of the most likely one's probability; 0 drops none.
        ignore_eos: Go on behind the token that ends a text.
    """

    temperature: float = 0.8
    seed: int = 0
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        """Raise UsageError for a value out of its range."""
        ranges = {
            "temperature": 100.0,
            "seed": 2**32 - 2,
            "top_k": 2**31 - 1,
            "top_p": 1,
            "min_p": 1,
        }
        for name, most in ranges.items():
            value = getattr(self, name)
            if not 0 <= value <= most:
                raise UsageError(f"{name} {value} is not between 0 and {most}")


@dataclass
class Timings:
    """Counts, and seconds spent in llama.cpp.

    Attributes:
        n_prompt: Tokens of the prompt that were computed.
        n_held: Tokens that the context held before them.
        n_gen: Tokens that were drawn.
    """

    n_prompt: int = 0
    n_held: int = 0
    n_gen: int = 0
    prompt_seconds: float = 0.0
    gen_seconds: float = 0.0

    @property
    def prompt_tokens_per_second(self) -> float:
        """Tokens of the prompt per second."""
        return self.n_prompt / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def gen_tokens_per_second(self) -> float:
        """Generated tokens per second, the first not counted: the prompt's decode gave it."""
        return (self.n_gen - 1) / self.gen_seconds if self.gen_seconds else 0.0


@dataclass
class Generation:
    """Iterate for the pieces of text; the counts are complete at the end of the iteration.

    Attributes:
        ids: The generated tokens, an end token included.
        stopped: Why it ended; ``None`` while it runs.
    """

    pieces: Iterator[str] = field(repr=False, default_factory=lambda: iter(()))
    timings: Timings = field(default_factory=Timings)
    ids: list[int] = field(default_factory=list)
    stopped: StopReason | None = None

    def __iter__(self) -> Iterator[str]:
        return self.pieces


def generate(
    context: Context,
    prompt: Sequence[int],
    n: int,
    sampling: Sampling | None = None,
    *,
    stop: Sequence[str] = (),
    between: Between | None = None,
) -> Generation:
    """Decode ``prompt`` behind what the context holds, then draw up to ``n`` tokens.

    Every drawn token but the last is in the context afterwards, so a conversation goes on by
    decoding that one first (`Generation.ids`).

    Args:
        context: With room for the prompt.
        prompt: Token ids, at least one.
        n: Most tokens to draw; it also ends at an end token and when the context is full.
        sampling: ``None`` takes `Sampling`'s defaults.
        stop: Texts that end the generation; they are not part of it.
        between: Called before each call of llama.cpp; the context it gives may be another one
            with the same conversation.

    Raises:
        UsageError: The prompt is empty or does not fit the context, or ``n`` is negative.
    """
    left = context.n_ctx - len(context.tokens)
    if not prompt or len(prompt) > left or n < 0:
        raise UsageError(
            f"a prompt of {len(prompt)} tokens and {n} more; the context has {left} positions left"
        )
    generation = Generation(timings=Timings(n_held=len(context.tokens)))
    run = _Run(between or (lambda _: context), context, generation)
    tokens = run.draw(prompt, n, sampling or Sampling())
    generation.pieces = until_stop(run.text(tokens), stop, generation)
    return generation


class _Run:
    """One generation, whose context may be replaced between two tokens."""

    def __init__(self, between: Between, context: Context, generation: Generation) -> None:
        self._between, self._context, self._generation = between, context, generation

    def draw(self, prompt: Sequence[int], n: int, sampling: Sampling) -> Iterator[int]:
        generation, timings, lib = self._generation, self._generation.timings, binding()
        self._read(prompt, n)
        with _chain(sampling) as chain:
            while timings.n_gen < n:
                token = int(lib.llama_sampler_sample(chain, self._context.handle, -1))
                timings.n_gen += 1
                generation.ids.append(token)
                if self._context.model.is_end(token) and not sampling.ignore_eos:
                    generation.stopped = "end"
                    return
                yield token
                if timings.n_gen == n:
                    break
                self._context = self._between(n - timings.n_gen)
                if len(self._context.tokens) == self._context.n_ctx:
                    generation.stopped = "context"
                    return
                started = time.perf_counter()
                self._context.decode([token])
                timings.gen_seconds += time.perf_counter() - started
        generation.stopped = "length"

    def _read(self, prompt: Sequence[int], n: int) -> None:
        """Decode the prompt, one batch after another."""
        timings, done = self._generation.timings, 0
        while done < len(prompt):
            self._context = self._between(len(prompt) - done + n)
            batch = prompt[done : done + self._context.n_batch]
            done += len(batch)
            started = time.perf_counter()
            self._context.decode(batch, "last" if done == len(prompt) else "none")
            timings.prompt_seconds += time.perf_counter() - started
        timings.n_prompt = len(prompt)

    def text(self, tokens: Iterator[int]) -> Iterator[str]:
        """Join the bytes of tokens to whole characters; half a character waits for its rest."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token in tokens:
            piece = decoder.decode(self._context.model.piece(token))
            if piece:
                yield piece
        rest = decoder.decode(b"", final=True)
        if rest:
            yield rest


@contextmanager
def _chain(sampling: Sampling) -> Iterator[int]:
    lib = binding()
    chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
    if sampling.temperature == 0:
        links = [lib.llama_sampler_init_greedy()]
    else:
        links = [
            lib.llama_sampler_init_top_k(sampling.top_k),
            lib.llama_sampler_init_top_p(sampling.top_p, 1),
            lib.llama_sampler_init_min_p(sampling.min_p, 1),
            lib.llama_sampler_init_temp(sampling.temperature),
            lib.llama_sampler_init_dist(sampling.seed),
        ]
    for link in links:
        lib.llama_sampler_chain_add(chain, link)  # the chain owns it from here
    try:
        yield chain
    finally:
        lib.llama_sampler_free(chain)


def until_stop(pieces: Iterator[str], stop: Sequence[str], generation: Generation) -> Iterator[str]:
    """Hold back what may be the beginning of a stop text."""
    held = ""
    for piece in pieces:
        held += piece
        found = [held.index(text) for text in stop if text and text in held]
        if found:
            generation.stopped = "stop"
            held = held[: min(found)]
            break
        keep = max((_overlap(held, text) for text in stop), default=0)
        ready, held = held[: len(held) - keep], held[len(held) - keep :]
        if ready:
            yield ready
    if held:
        yield held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a beginning of ``stop``, not all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
