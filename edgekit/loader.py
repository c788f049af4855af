"""``edgekit.load``: an artifact, opened and loaded at the depth that a budget buys."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import cast

from edgekit.artifact import open_artifact
from edgekit.catalog import runtime_of
from edgekit.devices.memory import held_bytes
from edgekit.engine import RESIDENCIES, Prefetch, Residency, Settings
from edgekit.errors import UnknownNameError, UsageError
from edgekit.llama import system_info
from edgekit.progress import Progress, Silent
from edgekit.session import Session
from edgekit.wish import Wish, refuse_llamas

RUNTIMES = ("llama", "onnx")


@contextmanager
def load(
    path: Path | str,
    budget: int | None = None,
    context: int | None = None,
    kv_type: str = "f16",
    *,
    n_threads: int | None = None,
    residency: Residency = "auto",
    follow: bool = True,
    repack: bool = False,
    expert_cache: int | None = None,
    pager: bool = True,
    prefetch: Prefetch = "off",
    progress: Progress | None = None,
    besides: int = 0,
    runtime: str | None = None,
) -> Iterator[Session]:
    """Load the artifact in ``path`` at the best depth within ``budget`` bytes; a context manager.

    Args:
        path: The artifact's folder.
        budget: Bytes the process may hold; ``None`` takes what is free now.
        context: Tokens; ``None`` takes 4096 or the model's own, whichever is less.
        kv_type: ``f16``, ``q8_0`` or ``q4_0``.
        n_threads: Of llama.cpp and of decoding; ``None`` takes the physical cores.
        residency: ``anon`` decodes into memory; ``mapped`` writes a file into the cache once and
            maps it; ``auto`` maps a file that the cache has, and decodes otherwise.
        follow: Change depth as memory pressure asks for.
        repack: Let llama.cpp lay weights out for its fastest kernels where that fits the budget
            too; the weights are decoded into memory then.
        expert_cache: Resident experts per layer; the others are read when they are chosen.
            ``None`` keeps all where they fit, else as many as fit.
        pager: False keeps all experts resident.
        prefetch: How experts of the next layer are guessed and read ahead: by its router
            (``gate``), by the trace of the conversion (``table``), or not (``off``).
        progress: Told how far each load is.
        besides: Bytes that the caller will take besides the model, within the budget.
        runtime: ``llama``, or ``onnx``, which has its own cache in float32 and changes depth when
            it is asked to only, saves no conversation, and whose `generate` has no ``after``,
            ``anew`` and ``check``; ``None`` takes ``llama`` where the artifact has a GGUF.

    Raises:
        DoesNotFitError: Not even the lowest depth fits.
        RefusedError: The artifact is corrupt.
        UsageError: The artifact is not for this runtime, or has no such options.

    Example::

        with edgekit.load("llama-edge", budget=1_200_000_000) as session:
            for piece in session.generate("Hello", 64):
                print(piece, end="")
            session.resize(900_000_000)  # the conversation goes on at another depth
    """
    runtime = runtime or runtime_of(Path(path))
    if runtime not in RUNTIMES:
        raise UnknownNameError("runtime", runtime, RUNTIMES)
    if runtime == "onnx":
        refuse_llamas(
            kv_type=kv_type != "f16",
            residency=residency != "auto",
            repack=repack,
            expert_cache=expert_cache is not None,
            prefetch=prefetch != "off",
        )
        loaded = _with_onnx(Path(path), budget, context, n_threads, progress or Silent())
    else:
        wish = Wish(budget, context, kv_type, follow, repack, besides, expert_cache, pager)
        settings = Settings(n_threads, residency, prefetch, progress or Silent())
        loaded = _with_llama(Path(path), wish, settings)
    with loaded as session:
        yield session


def _with_onnx(
    folder: Path, budget: int | None, context: int | None, n_threads: int | None, progress: Progress
) -> AbstractContextManager[Session]:
    from edgekit.onnx_session import OnnxSettings, load_onnx  # 2 MiB of a budget without it

    loaded = load_onnx(folder, budget, context, OnnxSettings(n_threads, progress=progress))
    return cast(AbstractContextManager[Session], loaded)  # the same interface


@contextmanager
def _with_llama(folder: Path, wish: Wish, settings: Settings) -> Iterator[Session]:
    if settings.residency not in RESIDENCIES:
        raise UnknownNameError("residency", settings.residency, RESIDENCIES)
    if settings.prefetch != "off" and not wish.pager:
        raise UsageError("nothing is prefetched where all experts stay; choose one of the two")
    if wish.repack and settings.residency == "mapped":
        raise UsageError("mapped weights cannot be repacked; choose one of the two")
    system_info()  # llama.cpp's libraries are part of what the process holds
    held = held_bytes()
    with open_artifact(folder, remember=True) as artifact:
        session = Session(artifact, wish, settings, held)
        try:
            yield session
        finally:
            session.close()
