"""edgekit: convert a language model once, run it at every memory budget."""

from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from edgekit.isolated import IsolatedSession
    from edgekit.session import Session

__version__ = "0.1.0"
__all__ = ["__version__", "load", "load_isolated"]


def load(
    path: Path | str,
    budget: int | None = None,
    context: int | None = None,
    kv_type: str = "f16",
    *,
    n_threads: int | None = None,
    residency: Literal["auto", "anon", "mapped"] = "auto",
    follow: bool = True,
    repack: bool = False,
    runtime: Literal["llama", "onnx"] = "llama",
) -> "AbstractContextManager[Session]":
    """Load the artifact in ``path`` at the best depth within ``budget`` bytes.

    Arguments and errors are those of `edgekit.loader.load`.

    Example::

        with edgekit.load("llama-edge", budget=1_200_000_000) as session:
            for piece in session.generate("Hello", 64):
                print(piece, end="")
            session.resize(900_000_000)  # the conversation goes on at another depth
    """
    from edgekit.loader import load

    return load(
        path, budget, context, kv_type, n_threads, residency, follow, repack, runtime=runtime
    )


def load_isolated(path: Path | str, **options: object) -> "AbstractContextManager[IsolatedSession]":
    """As `load`, in a process of its own: if llama.cpp is killed or aborts, the caller goes on.

    The budget is that of the child; ``options`` are `load`'s arguments by name. Where the caller
    would have died, the next call raises one of edgekit's errors.
    """
    from edgekit.isolated import IsolatedSession

    return closing(IsolatedSession(path, dict(options)))
