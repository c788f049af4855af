"""A session in a process of its own: what ends llama.cpp there does not end the caller.

The child is a plain Python with edgekit; requests and answers are pickles over its standard input
and output, one after the other, and text comes piece by piece as it is asked for. It ends with its
input, or when a call is interrupted. A kill by the memory manager becomes `DoesNotFitError`,
another signal `EdgekitError`.
"""

import contextlib
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from edgekit import errors
from edgekit.errors import DoesNotFitError, EdgekitError
from edgekit.llama import Generation, Message, Sampling
from edgekit.loader import load
from edgekit.plan import Plan
from edgekit.session import Change, Session
from edgekit.sizes import format_size


@dataclass(frozen=True)
class _Answer:
    """What the child says: a value, or the kind and the text of an error."""

    value: Any = None
    error: tuple[str, str] | None = None


class IsolatedSession:
    """`generate`, `resize`, `adapt` and `close` of a `Session`, in a child process.

    Made by `load_isolated`.

    Attributes:
        plan: What is loaded, as of the last call.
        changes: Every change of depth so far.
    """

    def __init__(self, path: Path | str, options: dict[str, Any]) -> None:
        """Start the child and load."""
        command = [sys.executable, "-c", "from edgekit.isolated import serve; serve()"]
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.plan: Plan | None = None
        self.changes: list[Change] = []
        try:
            self._call("load", str(path), options)
        except BaseException:
            self.close()
            raise

    def generate(
        self,
        prompt: str | Sequence[Message],
        n: int,
        sampling: Sampling | None = None,
        *,
        chat: bool = True,
        stop: Sequence[str] = (),
    ) -> Generation:
        """As `Session.generate`; counts are complete at the end of the iteration."""
        self._call("generate", prompt, n, sampling, chat, tuple(stop))
        generation = Generation()
        generation.pieces = self._pieces(generation)
        return generation

    def resize(self, budget: int) -> Plan:
        """As `Session.resize`; also between two pieces of a generation."""
        self._call("resize", budget)
        assert self.plan is not None
        return self.plan

    def adapt(self) -> None:
        """As `Session.adapt`: call it when idle."""
        self._call("adapt")

    def close(self) -> None:
        """End the child; twice is once."""
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self._child.wait()

    def _pieces(self, generation: Generation) -> Iterator[str]:
        while True:
            piece, counts = self._call("next")
            generation.timings, generation.ids, generation.stopped = counts
            if piece is None:
                return
            yield piece

    def _call(self, name: str, *args: Any) -> Any:
        try:
            _send(cast(BinaryIO, self._child.stdin), (name, args))
            answer: _Answer = pickle.load(cast(BinaryIO, self._child.stdout))
        except (OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
            raise self._ended() from error
        except BaseException:  # half an answer was read, or the next call would get this one's
            self._child.terminate()
            self.close()
            raise
        if answer.error is not None:
            raise _rebuilt(*answer.error)
        value, self.plan, self.changes = answer.value
        return value

    def _ended(self) -> EdgekitError:
        """Why there is no answer."""
        code = self._child.wait()
        if code == -signal.SIGKILL:
            need = format_size(self.plan.total_bytes) if self.plan else "more than was free"
            had = format_size(self.plan.budget_bytes or 0) if self.plan else "less"
            return DoesNotFitError(
                f"killed by the memory manager: it needed {need} of a budget of {had}; load again "
                "with a smaller budget"
            )
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return EdgekitError(f"the session's process ended with {how}; load again")


def _rebuilt(kind: str, text: str) -> EdgekitError:
    """An error of the child as one of ours."""
    found = getattr(errors, kind, EdgekitError)
    error: EdgekitError = found.__new__(found)
    error.args = (text,)
    return error


def _send(pipe: BinaryIO, value: object) -> None:
    pickle.dump(value, pipe)
    pipe.flush()


class _Server:
    """The child's side: one session, one generation at a time."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._session: Session | None = None
        self._generation = Generation()

    @property
    def session(self) -> Session:
        if self._session is None:
            raise EdgekitError("nothing is loaded; load first")
        return self._session

    def load(self, path: str, options: dict[str, Any]) -> None:
        self._session = self._stack.enter_context(load(path, **options))

    def generate(self, prompt: Any, n: int, sampling: Any, chat: bool, stop: Any) -> None:
        self._generation = self.session.generate(prompt, n, sampling, chat=chat, stop=stop)

    def next(self) -> tuple[str | None, Any]:
        piece = next(self._generation.pieces, None)
        return piece, (self._generation.timings, self._generation.ids, self._generation.stopped)

    def resize(self, budget: int) -> None:
        self.session.resize(budget)

    def adapt(self) -> None:
        self.session.adapt()

    def answer(self, name: str, args: tuple[Any, ...]) -> _Answer:
        try:
            value = getattr(self, name)(*args)
        except EdgekitError as error:
            return _Answer(error=(type(error).__name__, str(error)))
        return _Answer((value, self.session.plan, self.session.changes))

    def serve(self, requests: BinaryIO, answers: BinaryIO) -> None:
        with self._stack, contextlib.suppress(EOFError):
            while True:
                _send(answers, self.answer(*pickle.load(requests)))


def serve() -> None:
    """Be the child of an `IsolatedSession`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to the caller too
    channel, sys.stdout = sys.stdout.buffer, sys.stderr  # nothing but answers on it
    _Server().serve(sys.stdin.buffer, channel)
