"""A budget tried on this machine, in a process of its own: peak memory, speed, load, changes.

The peak of a process is for all of its life, so every budget gets a fresh one. It measures what it
is asked for, when it is asked: a word on a line in, JSON on a line out.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from threading import Timer
from typing import IO, Any

from edgekit.devices.memory import peak_rss_bytes
from edgekit.errors import EdgekitError
from edgekit.loader import load
from edgekit.session import Session

N_PROMPT, N_TOKENS, N_PROMPTS = 256, 48, 3
LEAST_SECONDS = 0.5  # that tokens, or prompts, are timed for at a time
TIMEOUT_SECONDS = 600


@dataclass(frozen=True)
class Trial:
    """What a budget measured.

    Where no change of depth was tried its bytes are 0 and its seconds infinite.

    Attributes:
        budget_bytes: The process was given.
        planned_bytes: Total of the plan.
        peak_bytes: The most that the process held resident.
        load_seconds: From the first byte read to a context ready for tokens, files in the cache.
        prompt_tokens_per_s: Reading a prompt of `N_PROMPT` tokens.
        decode_tokens_per_s: Single tokens behind that prompt.
        resize_bytes: Total of the plan it changed to, the budget halved as far as it goes.
        resize_seconds: From this depth to that one.
        return_seconds: And back.
    """

    budget_bytes: int
    planned_bytes: int
    peak_bytes: int
    load_seconds: float
    prompt_tokens_per_s: float
    decode_tokens_per_s: float
    resize_bytes: int
    resize_seconds: float
    return_seconds: float


class Running:
    """The process of a trial, as its parent sees it. Made by `running`."""

    def __init__(self, name: str, child: "subprocess.Popen[str]", errors: IO[str]) -> None:
        """Talk to ``child``, whose last words are in ``errors``."""
        self._name, self._child, self._errors = name, child, errors

    def loaded(self) -> tuple[int, float]:
        """Total bytes of the plan, and the seconds that loading it took; waits for it."""
        planned, seconds = self._answer()
        return planned, seconds

    def prompt_seconds(self) -> float:
        """Of one token of a prompt of `N_PROMPT`: the least of a few prompts."""
        return float(self._ask("prompt"))

    def token_seconds(self) -> float:
        """Of a token behind that prompt, which must have been asked for: the median of some."""
        return float(self._ask("token"))

    def peak_bytes(self) -> int:
        """The most that the process has held resident."""
        return int(self._ask("peak"))

    def resize(self, budget: int) -> tuple[int, float]:
        """Change to ``budget``: total bytes of its plan, and the seconds."""
        planned, seconds = self._ask(f"resize {budget}")
        return planned, seconds

    def _ask(self, words: str) -> Any:
        assert self._child.stdin is not None
        with suppress(OSError):  # it has ended; why is told below
            self._child.stdin.write(f"{words}\n")
            self._child.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._child.stdout is not None
        watch = Timer(TIMEOUT_SECONDS, self._child.kill)
        watch.start()
        try:
            line = self._child.stdout.readline()
        finally:
            watch.cancel()
        if not line:
            code = self._child.wait()
            self._errors.seek(0)
            last = (self._errors.read().strip().splitlines() or [f"exit code {code}"])[-1]
            raise EdgekitError(f"measuring {self._name} failed: {last}")
        return json.loads(line)


@contextmanager
def running(artifact: Path, budget: int, context: int, kv_type: str) -> Iterator[Running]:
    """Load ``budget`` of an artifact in a child process, which ends with the block.

    Every method of what it gives raises `EdgekitError` with the child's own words if that fails.
    """
    words = [str(artifact), str(budget), str(context), kv_type]
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors,
        subprocess.Popen(
            [sys.executable, "-m", "edgekit.trial", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as child,
    ):
        try:
            yield Running(f"{artifact} at {budget} bytes", child, errors)
        finally:
            child.kill()


class _Server:
    """The child's side."""

    def __init__(self, session: Session) -> None:
        self._session = session
        n_vocab, n_ctx = session.model.vocab.n_tokens, session.context.n_ctx
        self._ids = [3 + (17 * i) % max(1, n_vocab - 3) for i in range(min(N_PROMPT, n_ctx // 2))]
        self._last = min(len(self._ids) + N_TOKENS, n_ctx)

    def prompt(self) -> float:
        return min(self._timed(N_PROMPTS, self._read_prompt)) / len(self._ids)

    def token(self) -> float:
        return median(self._timed(N_TOKENS // 2, self._draw))

    def peak(self) -> int:
        return peak_rss_bytes()

    def resize(self, budget: str) -> tuple[int, float]:
        started = time.perf_counter()
        plan = self._session.resize(int(budget))
        return plan.total_bytes, time.perf_counter() - started

    def _read_prompt(self) -> float:
        self._session.context.clear()
        return self._seconds(self._ids)

    def _draw(self) -> float:
        if len(self._session.context.tokens) >= self._last:
            self._session.context.truncate(len(self._ids))
        return self._seconds(self._ids[:1])

    def _seconds(self, ids: list[int]) -> float:
        started = time.perf_counter()
        self._session.context.decode(ids)
        return time.perf_counter() - started

    def _timed(self, n: int, call: Callable[[], float]) -> list[float]:
        """Seconds of at least ``n`` calls, and of more until they take `LEAST_SECONDS`."""
        seconds = list[float]()
        while len(seconds) < n or sum(seconds) < LEAST_SECONDS:
            seconds.append(call())
        return seconds


def _serve(words: list[str]) -> None:
    """Be the child of `running`."""
    artifact, budget, context, kv_type = words

    def tell(value: object) -> None:
        sys.stdout.write(json.dumps(value) + "\n")
        sys.stdout.flush()

    loaded = load(artifact, int(budget), int(context), kv_type, residency="anon", follow=False)
    with loaded as session:
        tell((session.plan.total_bytes, session.load_seconds))
        server = _Server(session)
        for line in sys.stdin:
            name, *args = line.split()
            tell(getattr(server, name)(*args))


if __name__ == "__main__":
    try:
        _serve(sys.argv[1:])
    except EdgekitError as error:
        sys.exit(str(error))
