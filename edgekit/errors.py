"""Every error that edgekit raises on purpose, each with the exit code the command line ends with.

EdgekitError                1  failed
├── UsageError              2  the command or its options do not make sense
│   ├── UnknownNameError    2  a name that is not in a table
│   └── TooLongError        2  a prompt that does not fit the context
├── DoesNotFitError         3  more memory is needed than there is
│   └── MemoryShortError    3  memory went away while a model was being loaded
├── DiskFullError           4  more disk is needed than there is
└── RefusedError            5  unsafe or corrupt input
    └── UnsupportedError    5  sound input of a kind that edgekit does not know
"""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import ClassVar


class EdgekitError(Exception):
    """An error with one clear line: which object, what it has, what it needs, the next step."""

    exit_code: ClassVar[int] = 1


class UsageError(EdgekitError):
    """The command, an option or an argument does not make sense."""

    exit_code = 2


class UnknownNameError(UsageError):
    """A name is not in the table it was looked up in; the message offers the nearest one."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        """Say that ``name`` is no ``kind``, with the closest of ``known``, or all of them."""
        names = sorted(known)
        close = get_close_matches(name, names, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"known: {', '.join(names)}"
        super().__init__(f"unknown {kind} '{name}'; {hint}")


class TooLongError(UsageError):
    """A prompt has more tokens than the context."""


class DoesNotFitError(EdgekitError):
    """A plan needs more memory than the budget holds."""

    exit_code = 3


class MemoryShortError(DoesNotFitError):
    """Memory went away while a model was being loaded; the load was ended before the kernel did."""


class DiskFullError(EdgekitError):
    """A file needs more disk than is free."""

    exit_code = 4


class RefusedError(EdgekitError):
    """Input is unsafe or corrupt and was not used."""

    exit_code = 5


class UnsupportedError(RefusedError):
    """Input is sound, but of a kind (architecture, tokenizer) that edgekit does not know."""
