"""Run a command in a forked child, so that its end can be told in words.

The memory manager's kill cannot be caught, and an assertion inside llama.cpp ends the process. The
parent holds next to nothing: the fork happens before anything large is imported and shares its
pages. Where the system cannot fork, the command simply runs.
"""

import contextlib
import ctypes
import os
import signal
import sys
import threading
from dataclasses import dataclass

import click

from edgekit.errors import DoesNotFitError, EdgekitError
from edgekit.sizes import format_size

WISHES = ("SIGUSR1", "SIGUSR2")  # for other budgets
FORWARDED = ("SIGTERM", "SIGHUP", *WISHES)
ENDS = (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM))  # asked for
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Supervised:
    """The child's side: tells the parent what it is about to need."""

    descriptor: int | None

    def needs(self, n_bytes: int, budget: int) -> None:
        """The plan takes ``n_bytes`` of ``budget``; told last counts."""
        if self.descriptor is not None:
            os.write(self.descriptor, f"{n_bytes} {budget}\n".encode())


def supervised() -> Supervised:
    """Fork: the child returns and goes on; the parent waits for its end and exits as it does."""
    if not _can_fork():
        return Supervised(None)
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    for name in WISHES:  # nothing is loaded yet whose budget they could change
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        _die_with(parent)
        return Supervised(writer)
    os.close(writer)
    _finish(_wait(pid), _told(reader))
    raise AssertionError("a parent does not come back")


def _can_fork() -> bool:
    """Forking is safe with one thread, and useful where output goes to the real descriptors."""
    try:
        is_real = sys.stdout.fileno() == 1 and sys.stderr.fileno() == 2
    except (OSError, ValueError, AttributeError):  # replaced by a caller that collects it
        return False
    return hasattr(os, "fork") and is_real and threading.active_count() == 1


def _die_with(parent: int) -> None:
    """A child whose parent was killed ends too; only Linux offers it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it was killed before we asked
            os._exit(1)


def _wait(pid: int) -> int:
    """The child's wait status; signals meant for it are passed on."""

    def forward(number: int, frame: object) -> None:
        with contextlib.suppress(ProcessLookupError):  # it ended a moment ago
            os.kill(pid, number)

    for name in FORWARDED:
        signal.signal(getattr(signal, name), forward)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to the child as well
    return os.waitpid(pid, 0)[1]


def _told(reader: int) -> tuple[int, int] | None:
    with os.fdopen(reader) as lines:
        last = lines.read().strip().rpartition("\n")[2].split()
    return (int(last[0]), int(last[1])) if len(last) == 2 else None


def _finish(status: int, told: tuple[int, int] | None) -> None:
    if not os.WIFSIGNALED(status):
        raise click.exceptions.Exit(os.waitstatus_to_exitcode(status))
    number = os.WTERMSIG(status)
    if number in ENDS:
        raise click.Abort
    if number != signal.SIGKILL:
        name = signal.Signals(number).name
        raise EdgekitError(
            f"llama.cpp ended the process with {name}; please report it with the command and the "
            "output of: edgekit inspect"
        )
    needed = f"it needed {format_size(told[0])}" if told else "it was still loading"
    had = f"of a budget of {format_size(told[1])}, and" if told else "and"
    raise DoesNotFitError(
        f"killed by the memory manager: {needed} {had} had less; close other programs or give a "
        "smaller --budget"
    )
