"""edgekit: convert a language model once, run it at every memory budget."""

from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgekit.isolated import IsolatedSession
    from edgekit.loader import load

__version__ = "0.1.0"
__all__ = ["__version__", "load", "load_isolated"]


def __getattr__(name: str) -> object:
    """``edgekit.load``, which is not imported before it is used: llama.cpp comes with it."""
    if name != "load":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from edgekit.loader import load

    return load


def load_isolated(path: Path | str, **options: object) -> "AbstractContextManager[IsolatedSession]":
    """As `load`, in a process of its own: if llama.cpp is killed or aborts, the caller goes on.

    The budget is that of the child; ``options`` are `load`'s arguments by name. Where the caller
    would have died, the next call raises one of edgekit's errors.
    """
    from edgekit.isolated import IsolatedSession

    return closing(IsolatedSession(path, dict(options)))
