"""Open a model in llama.cpp from a path or from a Python reader."""

import contextlib
import io
import os
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Literal

from edgekit.errors import EdgekitError, UnsupportedError, UsageError
from edgekit.exporters.gguf import Gguf, read_header, tensor_offsets
from edgekit.llama.binding import LOG, binding, take_log
from edgekit.llama.header_file import header_file
from edgekit.llama.model import Model
from edgekit.llama.stream import CookieFile, RawFile, VirtualFile, has_fopencookie, read_from
from edgekit.llama.weight_memory import (
    MemorySink,
    WeightMemory,
    are_addresses_limited,
    can_place,
)
from edgekit.sink import FileSink, Sink

Residency = Literal["mapped", "anon"]
Progress = Callable[[float], None]

# llama_load_mode (llama.h)
_LOAD_COPY, _LOAD_MMAP = 0, 1
_COPY_BYTES = 1 << 20  # one read while a virtual file is written to another


def open_model(
    source: Path | str | VirtualFile,
    *,
    residency: Residency | None = None,
    extra_bufts: bool = False,
    vocab_only: bool = False,
    no_alloc: bool = False,
    header: Gguf | None = None,
    progress: Progress | None = None,
    paged: Collection[str] = frozenset(),
) -> Model:
    """Load a model on the CPU.

    Args:
        source: A GGUF file, or an object that gives its bytes (`VirtualFile`).
        residency: ``mapped`` maps the file: clean pages that the kernel may drop. ``anon`` copies
            the weights into anonymous memory. ``None`` maps a path. The weights of a virtual file
            are always in anonymous memory, made where they stay, or copied through a stream; where
            a system has neither, in a temporary file that is mapped.
        extra_bufts: Let llama.cpp repack weights for speed; repacked tensors are copied.
        vocab_only: Load no weights.
        no_alloc: Neither read nor allocate weights, only count them.
        header: The header of ``source`` if it was read and checked already; parsing a large
            vocabulary again costs a second.
        progress: Called before every tensor with the share of bytes done; an exception it raises
            cancels the load and arrives at the caller.
        paged: Names of tensors of a virtual file that are not read: the caller fills their places
            in the model's `WeightMemory` and drops their pages.

    Raises:
        RefusedError: The header is corrupt; UnsupportedError: one part of a split model.
        EdgekitError: llama.cpp refuses the model; the message has its reason.
    """
    if residency not in (None, "mapped", "anon"):
        raise UsageError(f"residency '{residency}' is not one of 'mapped', 'anon'")
    if isinstance(source, str):
        source = Path(source)
    if header is None:
        header = _read_header(source)
    _check_whole(source, header)
    params = binding().llama_model_default_params()
    params.n_gpu_layers = 0
    params.use_extra_bufts, params.vocab_only = extra_bufts, vocab_only
    params.no_alloc = no_alloc
    if isinstance(source, Path):
        mapped = residency != "anon" and not no_alloc
        return Model(_path_handle(source, params, mapped, progress), header)
    if not (extra_bufts or vocab_only or no_alloc):
        model = _load_placed(source, header, params, progress, paged)
        if model is not None:
            return model
    if not has_fopencookie():
        return _load_spilled(source, header, params, progress)
    return Model(_cookie_handle(source, header, params, progress), header)


def _load_placed(
    source: VirtualFile,
    header: Gguf,
    params: Any,
    progress: Progress | None,
    paged: Collection[str],
) -> Model | None:
    """Have llama.cpp say where weights belong, and make them there.

    Returns:
        ``None`` where the system or this build of llama.cpp does not let us.

    Raises:
        UnsupportedError: It does not, and some weights are paged.
    """
    if not paged and are_addresses_limited():  # those of the file's map count for a moment
        return None
    with header_file(_head_of(source, header), source.size) as file:
        if file is None or not can_place():
            if paged:
                raise UnsupportedError(
                    "experts on demand need Linux and llama-cpp-python 0.3.36; run with --no-pager"
                )
            return None
        memory = WeightMemory(paged)
        params.tensor_buft_overrides = memory.overrides(file.cut)
        try:
            handle = _path_handle(file.path, params, True, None)
        except BaseException as error:
            memory.close()
            memory.raise_error(error)
            raise
    model = Model(handle, header, memory)
    try:
        memory.loaded()
        _write_all(source, MemorySink(memory, header), progress)
    except BaseException:
        model.close()
        raise
    return model


class _Load:
    """One call of llama.cpp's loader: its progress callback, and errors raised inside of it."""

    def __init__(self, params: Any, progress: Progress | None, cookie: CookieFile | None) -> None:
        self.error: BaseException | None = None
        self._report, self._cookie = progress, cookie
        self._callback = type(params.progress_callback)(self._on_tensor)  # kept alive by self
        params.progress_callback = self._callback
        self.params = params

    def _on_tensor(self, share: float, _user_data: object) -> bool:
        try:
            if self._report is not None:
                self._report(share)
        except BaseException as error:  # C cannot carry it; finish() raises it again
            self.error = error
        return self.error is None

    def run(self, name: str, load: Callable[[Any], int | None]) -> int:
        take_log()
        LOG.clear()
        handle = load(self.params)
        error = self.error or (self._cookie.error if self._cookie else None)
        if error is not None:
            if handle:
                binding().llama_model_free(handle)
            raise error
        if not handle:
            raise EdgekitError(f"llama.cpp does not load {name}: {LOG.reason()}")
        return handle


def _path_handle(path: Path, params: Any, mapped: bool, progress: Progress | None) -> int:
    params.load_mode = _LOAD_MMAP if mapped and binding().llama_supports_mmap() else _LOAD_COPY
    encoded = os.fsencode(path)
    load = binding().llama_model_load_from_file
    return _Load(params, progress, None).run(str(path), lambda p: load(encoded, p))


def _cookie_handle(
    source: VirtualFile, header: Gguf, params: Any, progress: Progress | None
) -> int:
    params.load_mode = _LOAD_COPY
    starts = (header.data_offset + n for n in tensor_offsets(header.tensors, header.alignment))
    cookie = CookieFile(source, [0, *starts])
    load = binding().llama_model_load_from_file_ptr
    try:
        return _Load(params, progress, cookie).run(
            "the virtual file", lambda p: load(cookie.pointer, p)
        )
    finally:
        cookie.close()


def _load_spilled(
    source: VirtualFile, header: Gguf, params: Any, progress: Progress | None
) -> Model:
    """Write the bytes to a temporary file, map it, and remove its name while it is open."""
    descriptor, name = tempfile.mkstemp(prefix="edgekit-", suffix=".gguf")
    path = Path(name)
    try:
        with open(descriptor, "wb", buffering=0):
            _write_all(source, FileSink(descriptor), progress)
        # Windows removes no mapped file, so there the weights are copied.
        return Model(_path_handle(path, params, os.name == "posix", None), header)
    finally:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()


def _write_all(source: VirtualFile, sink: Sink, progress: Progress | None) -> None:
    """Give all bytes of ``source`` to ``sink``."""

    def report(n_bytes: int) -> None:
        if progress is not None:
            progress(n_bytes / source.size)

    write_to = getattr(source, "write_to", None)
    if write_to is not None:
        write_to(sink, report)
        return
    position = 0
    while position < source.size:
        report(position)
        data = read_from(source, position, min(_COPY_BYTES, source.size - position))
        sink.put(position, memoryview(data))
        position += len(data)


def _read_header(source: Path | VirtualFile) -> Gguf:
    if isinstance(source, Path):
        return read_header(source)
    return read_header(io.BufferedReader(RawFile(source), 1 << 16), name="the virtual file")


def _head_of(source: VirtualFile, header: Gguf) -> bytes:
    head = b""
    while len(head) < header.data_offset:
        head += read_from(source, len(head), header.data_offset - len(head))
    return head


def _check_whole(source: Path | VirtualFile, header: Gguf) -> None:
    parts = header.get("split.count", 0)
    if isinstance(parts, int) and parts > 1:
        name = source if isinstance(source, Path) else "the virtual file"
        raise UnsupportedError(
            f"{name} is one of {parts} parts of a model; join them with llama-gguf-split --merge"
        )
