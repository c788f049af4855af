"""edgekit: convert a language model once, run it at every memory budget."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from edgekit.session import Session

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


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

    return load(path, budget, context, kv_type, n_threads, residency, follow, repack)
