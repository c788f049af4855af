"""The conversation of ``edgekit run``: lines in, streamed text out, commands with a slash."""

import os
import select
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import click

from edgekit.cli.console import note
from edgekit.errors import DoesNotFitError, EdgekitError, UsageError
from edgekit.sizes import format_size, parse_size

if TYPE_CHECKING:
    from edgekit.llama import Message, Sampling
    from edgekit.session import Session

IDLE_SECONDS = 0.25  # between two looks at memory pressure while nobody types
HELP = "/budget SIZE: another depth; /plan: what is loaded; /clear: forget; /quit: end"


@dataclass
class Chat:
    """A conversation at the terminal.

    Attributes:
        session: Loaded.
        n_tokens: Most tokens of one answer.
        sampling: How they are drawn.
        raw: Lines are continued as they are, without the chat template.
        stop: Texts that end an answer.
    """

    session: "Session"
    n_tokens: int
    sampling: "Sampling"
    raw: bool = False
    stop: tuple[str, ...] = ()
    messages: list[dict[str, str]] = field(default_factory=list)

    def run(self) -> None:
        """Answer line after line until the end of the input or ``/quit``."""
        note(HELP)
        for line in self._lines():
            word, _, rest = line.strip().partition(" ")
            if word in ("/quit", "/exit"):
                return
            try:
                if word in self._commands():
                    self._commands()[word](rest.strip())
                elif word.startswith("/"):
                    note(f"unknown command {word}; {HELP}")
                elif line.strip():
                    self._answer(line.strip())
            except (UsageError, DoesNotFitError) as error:  # the conversation goes on
                note(f"Error: {error}")

    def _commands(self) -> dict[str, Callable[[str], None]]:
        return {
            "/budget": self._budget,
            "/plan": self._plan,
            "/clear": lambda _: self.messages.clear(),
            "/help": lambda _: note(HELP),
        }

    def _answer(self, text: str) -> None:
        self.messages.append({"role": "user", "content": text})
        seen, pieces = len(self.session.changes), []
        try:
            generation = self.session.generate(
                self._prompt(), self.n_tokens, self.sampling, chat=not self.raw, stop=self.stop
            )
            for piece in generation:
                pieces.append(piece)
                click.echo(piece, nl=False)
        except KeyboardInterrupt:  # stops the answer, not the conversation
            pass
        except EdgekitError:
            self.messages.pop()
            raise
        click.echo()
        self.messages.append({"role": "assistant", "content": "".join(pieces)})
        self._tell_changes(seen)

    def _prompt(self) -> "str | Sequence[Message]":
        """All messages where the model has a chat template, else the text so far and the line."""
        if self.raw:
            return "\n".join(message["content"] for message in self.messages)
        return self.session.prompt_of(self.messages)

    def _budget(self, size: str) -> None:
        self.session.resize(parse_size(size))
        self._plan("")

    def _plan(self, _: str) -> None:
        plan = self.session.plan
        note(
            f"{plan.bits_per_weight:.2f} bits per weight, "
            f"{format_size(plan.weights_bytes)} of weights, {format_size(plan.total_bytes)} "
            f"in all, context {plan.context}, {plan.kv_type} cache"
        )

    def _tell_changes(self, seen: int) -> None:
        for change in self.session.changes[seen:]:
            note(
                f"{change.reason}: {format_size(change.before_bytes)} became "
                f"{format_size(change.after_bytes)} in {change.seconds:.2f} s"
            )

    def _lines(self) -> Iterator[str]:
        """Lines of stdin; while it waits for one, the session follows memory pressure.

        Read from the descriptor: lines in a buffer of Python's would not wake `select`.
        """
        source, rest = sys.stdin.fileno(), b""
        while True:
            if sys.stdin.isatty():
                click.echo("> ", nl=False, err=True)
            while b"\n" not in rest:
                while not _is_readable(source):
                    self.session.adapt()
                block = os.read(source, 1 << 16)
                if not block:
                    yield rest.decode("utf-8", "replace")
                    return
                rest += block
            line, _, rest = rest.partition(b"\n")
            yield line.decode("utf-8", "replace")


def _is_readable(source: int) -> bool:
    try:
        return bool(select.select([source], [], [], IDLE_SECONDS)[0])
    except (OSError, ValueError):  # Windows waits for sockets only: reading blocks
        return True
