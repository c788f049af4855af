"""One depth of an artifact in llama.cpp, and the way from one depth to another.

Weights are decoded from the artifact to where llama.cpp uses them (``anon``): nothing is written to
disk, nothing is held twice. Or they are written once into the cache and mapped (``mapped``):
clean pages, which the kernel may drop and which the next load finds again.

A change of depth saves the conversation to an unnamed temporary file, frees the old depth, loads
the new one and reads the conversation back: never are two depths in memory, and the KV cache is
not copied in memory either.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from edgekit import cache
from edgekit.artifact import Artifact
from edgekit.assembly import Assembly
from edgekit.devices.heap import keep_large_blocks_apart, return_free_memory
from edgekit.errors import EdgekitError, MemoryShortError
from edgekit.expert_budget import Paged, expert_stacks
from edgekit.footprint import decoders
from edgekit.llama import Context, Model, open_model
from edgekit.llama.context import default_threads
from edgekit.materialize import materialize
from edgekit.paging import Pager, PagerOptions
from edgekit.paging.pager import READERS, Prefetcher
from edgekit.paging.prefetch import gate_guess, table_guess
from edgekit.paging.store import ExpertStore, FileStore, LevelStore
from edgekit.plan import Plan, shape_in
from edgekit.planner import Depths
from edgekit.progress import Progress, Silent
from edgekit.saved import Saved
from edgekit.sink import Report, Sink

Watch = Callable[[int], None]
Residency = Literal["auto", "anon", "mapped"]
RESIDENCIES = ("auto", "anon", "mapped")
Prefetch = Literal["off", "gate", "table"]
ROUTES_EARLY = ("smallthinker",)  # architectures whose routers read the input of attention


@dataclass(frozen=True)
class Settings:
    """How depths are loaded.

    Attributes:
        n_threads: Of llama.cpp and of decoding; ``None`` takes the physical cores.
        residency: ``anon``, ``mapped``, or ``auto``: mapped where the cache has the file already.
        prefetch: How experts of the next layer are guessed and read ahead, where they are paged:
            by its router (``gate``), by the trace of the conversion (``table``), or not.
        progress: Told how far each load is.
    """

    n_threads: int | None = None
    residency: Residency = "auto"
    prefetch: Prefetch = "off"
    progress: Progress = field(default_factory=Silent)


class Engine:
    """At most one depth in memory, with the conversation that it holds.

    Attributes:
        plan: What is loaded, or was before `park`; ``None`` at first.
    """

    def __init__(self, artifact: Artifact, settings: Settings) -> None:
        """Load nothing yet."""
        keep_large_blocks_apart()
        self._artifact, self._settings = artifact, settings
        self._model: Model | None = None
        self._context: Context | None = None
        self._saved: Saved | None = None
        self._pager: Pager | None = None
        self.plan: Plan | None = None

    @property
    def is_loaded(self) -> bool:
        """Whether there is a context to decode with."""
        return self._context is not None

    @property
    def context(self) -> Context:
        """The conversation; another object after each change of depth.

        Raises:
            EdgekitError: Nothing is loaded.
        """
        if self._context is None:
            raise EdgekitError(f"no depth of {self._artifact.folder} is loaded; load it again")
        return self._context

    @property
    def pager(self) -> Pager | None:
        """Of experts; ``None`` where all weights are resident."""
        return self._pager

    @property
    def n_tokens(self) -> int:
        """Tokens of the conversation, also while it is parked."""
        if self._saved is not None:
            return len(self._saved.tokens)
        return len(self._context.tokens) if self._context is not None else 0

    def load(self, plan: Plan, watch: Watch | None = None) -> int:
        """Load ``plan`` instead of what is loaded; the conversation goes on.

        Args:
            plan: What to load.
            watch: Called while weights come in, with the bytes so far; what it raises ends the
                load.

        Returns:
            Bytes of weights that were loaded; 0 where only the context is another one.

        Raises:
            EdgekitError: It failed, and what was loaded before is back.
        """
        before, was_loaded = self.plan, self.is_loaded
        self._save()
        keeps = before is not None and _weights_of(plan) == _weights_of(before)
        self._free(keep_weights=keeps)
        n_bytes = 0 if self._model is not None else plan.weights_bytes
        try:
            self._open(plan, watch)
        except MemoryShortError:  # what was loaded before would not fit any more either
            self._free()
            raise
        except Exception:
            self._free()
            if before is not None and was_loaded:
                self._open(before)
                self._resume()
            raise
        self._resume()
        return n_bytes

    def park(self) -> None:
        """Free everything but the conversation, which waits on disk for the next `load`."""
        self._save()
        self._free()

    def save_file(self, path: Path) -> None:
        """Write the conversation to ``path``, also a parked one.

        Raises:
            EdgekitError: It cannot be written.
        """
        if self._saved is not None:
            self._saved.copy_to(path)
        else:
            self.context.save_file(path)

    def close(self) -> None:
        """Free everything; twice is once."""
        self._free()
        self._forget()

    def _save(self) -> None:
        if self._context is not None and self.plan is not None:
            self._forget()
            self._saved = Saved(self._context, self.plan.kv_type)

    def _resume(self) -> None:
        if self._saved is not None:
            assert self.plan is not None
            self._saved.restore(self.context, self.plan.kv_type)
        self._forget()

    def _forget(self) -> None:
        if self._saved is not None:
            self._saved.close()
            self._saved = None

    def _free(self, *, keep_weights: bool = False) -> None:
        if self._context is not None:
            self._context.close()
            self._context = None
        if self._model is not None and not keep_weights:
            if self._pager is not None:  # its threads write into the model's memory
                self._pager.close()
                self._pager = None
            self._model.close()
            self._model = None
        return_free_memory()

    def _open(self, plan: Plan, watch: Watch | None = None) -> None:
        threads = self._settings.n_threads or default_threads()
        if self._model is None:
            self._model = self._opened(plan, threads, watch)
        self._context = Context(
            self._model,
            plan.context,
            n_batch=plan.batch,
            kv_type=plan.kv_type,
            n_threads=threads,
            listener=self._pager.listener if self._pager is not None else None,
        )
        self.plan = plan
        self._artifact.release()

    def _opened(self, plan: Plan, threads: int, watch: Watch | None) -> Model:
        if plan.paged is not None:
            return self._opened_paged(plan, plan.paged, threads, watch)
        n_decoders = decoders(shape_in(self._artifact), plan.memory, threads)
        with Assembly(self._artifact, plan.depths, n_decoders) as assembly:
            path = self._cached(plan, assembly.size, n_decoders)
            if path is not None:
                return open_model(path, header=assembly.gguf, residency="mapped")
            self._settings.progress.start("load", assembly.size)
            return open_model(
                assembly if watch is None else _Watched(assembly, watch),
                header=assembly.gguf,
                extra_bufts=plan.repack,
                progress=self._advance(assembly.size),
            )

    def _opened_paged(self, plan: Plan, paged: Paged, threads: int, watch: Watch | None) -> Model:
        """Dense weights decoded into memory, experts left to a pager."""
        names = frozenset(stack.name for stack in expert_stacks(self._artifact.stacks))
        prefetcher = self._prefetcher(paged)
        n_decoders = decoders(shape_in(self._artifact), plan.memory, threads)
        with Assembly(self._artifact, plan.depths, n_decoders) as assembly:
            store = self._store(plan, assembly, names, n_decoders)
            try:
                self._settings.progress.start("load", assembly.size)
                model = open_model(
                    assembly if watch is None else _Watched(assembly, watch),
                    header=assembly.gguf,
                    progress=self._advance(assembly.size),
                    paged=names,
                )
            except BaseException:
                store.close()
                raise
        readers = threads if isinstance(store, LevelStore) else READERS
        options = PagerOptions(
            paged.pool_bytes,
            readers,
            prefetcher,
            self._artifact.manifest.architecture in ROUTES_EARLY,
        )
        try:
            assert model.memory is not None
            self._pager = Pager(model.memory, paged.n_experts, store, options)
        except BaseException:
            model.close()
            store.close()
            raise
        return model

    def _prefetcher(self, paged: Paged) -> Prefetcher | None:
        manifest = self._artifact.manifest
        n_blocks = int(manifest.model[f"{manifest.architecture}.block_count"])
        if manifest.architecture in ROUTES_EARLY:  # they know, so nobody guesses
            return None
        if self._settings.prefetch == "gate":
            return gate_guess(self._artifact, n_blocks, paged.n_used)
        if self._settings.prefetch == "table":
            return table_guess(manifest.experts, n_blocks, paged.n_experts, paged.n_used)
        return None

    def _store(
        self, plan: Plan, assembly: Assembly, names: frozenset[str], n_threads: int
    ) -> ExpertStore:
        """Where experts are read: a file in the cache, or the artifact's levels."""
        path = self._cached(plan, assembly.size, n_threads)
        if path is not None:
            return FileStore(path, assembly.gguf, names)
        return LevelStore(self._artifact, plan.depths)

    def _advance(self, n_bytes: int) -> Callable[[float], None]:
        """What llama.cpp tells, a share of everything, as the bytes that came since."""
        done = 0

        def advance(share: float) -> None:
            nonlocal done
            now = round(share * n_bytes)
            self._settings.progress.advance(now - done)
            done = now

        return advance

    def _cached(self, plan: Plan, n_bytes: int, n_threads: int) -> Path | None:
        """The file to map: one that the cache has, or that is wanted there and made."""
        if self._settings.residency == "anon" or plan.repack:  # mapped pages cannot be repacked
            return None
        manifest = self._artifact.manifest
        tiers = {name: plan.depths.tier(name) for name in sorted(plan.depths.tiers)}
        path = cache.model_path((manifest.base.sha256, manifest.levels.sha256), tiers)
        if cache.has_model(path):
            return path
        if self._settings.residency == "auto":
            return None
        cache.make_room(path, n_bytes)
        # another process may have made it by now
        materialize(self._artifact, plan.depths, path, force=True, n_threads=n_threads)
        cache.stamp(path)
        return path


class _Watched:
    """A virtual file that tells how far its reader is."""

    def __init__(self, assembly: Assembly, watch: Watch) -> None:
        self._assembly, self._watch = assembly, watch
        self.size, self._n_read = assembly.size, 0

    def read(self, offset: int, n: int) -> bytes:
        buffer = bytearray(n)
        return bytes(buffer[: self.readinto(offset, memoryview(buffer))])

    def readinto(self, offset: int, buffer: memoryview) -> int:
        self._watch(self._n_read)
        n = self._assembly.readinto(offset, buffer)
        self._n_read += n
        return n

    def write_to(self, sink: Sink, report: Report) -> None:
        def told(n_bytes: int) -> None:
            self._watch(n_bytes)
            report(n_bytes)

        self._assembly.write_to(sink, told)


def _weights_of(plan: Plan) -> tuple[Depths, bool, Paged | None]:
    """What makes two plans differ in what is loaded, contexts aside."""
    return plan.depths, plan.repack, plan.paged
