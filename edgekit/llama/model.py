"""Open a model in llama.cpp from a path or from a Python reader, and ask about its vocabulary."""

import contextlib
import ctypes
import io
import os
import tempfile
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol

from edgekit.disk import write_at
from edgekit.errors import EdgekitError, UnsupportedError, UsageError
from edgekit.exporters.gguf import Gguf, read_header, tensor_offsets
from edgekit.exporters.normalizers import TextNormalizer
from edgekit.llama.binding import LOG, binding
from edgekit.llama.expert_memory import ExpertMemory
from edgekit.llama.stream import CookieFile, RawFile, VirtualFile, has_fopencookie, read_from
from edgekit.llama.unnamed import UnnamedFile, unnamed_file
from edgekit.llama.vocab import vocab_of

Residency = Literal["mapped", "anon"]
Progress = Callable[[float], None]

# llama_load_mode (llama.h)
_LOAD_COPY, _LOAD_MMAP = 0, 1
_COPY_BYTES = 1 << 20  # one read while a virtual file is written to another


class Closable(Protocol):
    """What a model closes before itself: its contexts."""

    def close(self) -> None:
        """Give everything back; twice is once."""
        ...


class Model:
    """A model in llama.cpp; a context manager. Made by `open_model`.

    Attributes:
        header: The GGUF header, checked.
        vocab: Special tokens and their use.
        weights_bytes: Bytes of all tensors as llama.cpp counts them.
    """

    def __init__(self, handle: int, header: Gguf, memory: ExpertMemory | None = None) -> None:
        """Take over ``handle``, and the memory that its experts lie in; `close` frees both."""
        lib = binding()
        self._handle: int | None = handle
        self._memory = memory
        self._contexts: weakref.WeakSet[Closable] = weakref.WeakSet()
        self.header = header
        self._normalized = TextNormalizer(header.metadata)
        self._vocab = lib.llama_model_get_vocab(handle)
        self.vocab = vocab_of(lib, self._vocab)
        self.weights_bytes = int(lib.llama_model_size(handle))
        self.n_parameters = int(lib.llama_model_n_params(handle))
        self.n_ctx_train = int(lib.llama_model_n_ctx_train(handle))

    @property
    def handle(self) -> int:
        """The ``llama_model *``.

        Raises:
            EdgekitError: The model was closed.
        """
        if self._handle is None:
            raise EdgekitError("the model is closed; open it again")
        return self._handle

    def __enter__(self) -> "Model":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def add_context(self, context: Closable) -> None:
        """Close ``context`` before the model, in whatever order the user closes."""
        self._contexts.add(context)

    def close(self) -> None:
        """Free the contexts and the weights; twice is once."""
        for context in list(self._contexts):
            context.close()
        if self._handle is not None:
            binding().llama_model_free(self._handle)
            self._handle = None
        if self._memory is not None:
            self._memory.close()
            self._memory = None

    def tokenize(
        self, text: str, *, add_special: bool = True, parse_special: bool = False
    ) -> list[int]:
        """Turn text into token ids, after the normalization that the GGUF asks edgekit for.

        Args:
            text: Any text.
            add_special: Put BOS and EOS where the model wants them.
            parse_special: Read ``<|eot|>`` and the like in the text as that one token.
        """
        data = self._normalized(text, parse_special).encode("utf-8", "replace")
        lib = binding()
        capacity = len(data) + 8  # a token covers at least a byte; room for BOS, EOS and a prefix
        while True:
            ids = (ctypes.c_int32 * capacity)()
            n = lib.llama_tokenize(
                self._open_vocab, data, len(data), ids, capacity, add_special, parse_special
            )
            if n >= 0:
                return list(ids[:n])
            if -n <= capacity:
                raise EdgekitError(f"llama.cpp cannot tokenize {len(data)} bytes: {LOG.reason()}")
            capacity = -n

    def detokenize(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Turn token ids into text; ``special`` shows BOS and the like."""
        lib = binding()
        array = (ctypes.c_int32 * len(ids))(*self.checked(ids))
        capacity = 16 * len(ids) + 16
        while True:
            buffer = ctypes.create_string_buffer(capacity)
            n = lib.llama_detokenize(
                self._open_vocab, array, len(ids), buffer, capacity, False, special
            )
            if n >= 0:
                return buffer.raw[:n].decode("utf-8", "replace")
            capacity = -n

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """The bytes of one token, perhaps a part of a UTF-8 character; control tokens have none."""
        lib, capacity = binding(), 64
        self.checked([token])
        while True:
            buffer = ctypes.create_string_buffer(capacity)
            n = lib.llama_token_to_piece(self._open_vocab, token, buffer, capacity, 0, special)
            if n >= 0:
                return buffer.raw[:n]
            capacity = -n

    def is_end(self, token: int) -> bool:
        """Whether the token ends a generation (EOS, EOT and their kin)."""
        self.checked([token])
        return bool(binding().llama_vocab_is_eog(self._open_vocab, token))

    def checked(self, ids: Sequence[int]) -> Sequence[int]:
        """Give ``ids`` back.

        Raises:
            UsageError: One is no token of the vocabulary; llama.cpp would abort or read wildly.
        """
        for token in ids:
            if not 0 <= token < self.vocab.n_tokens:
                raise UsageError(f"token {token} is not in the vocabulary of {self.vocab.n_tokens}")
        return ids

    @property
    def _open_vocab(self) -> int:
        self.handle  # noqa: B018  raises when closed
        return int(self._vocab)


def open_model(
    source: Path | str | VirtualFile,
    *,
    residency: Residency | None = None,
    extra_bufts: bool = False,
    vocab_only: bool = False,
    no_alloc: bool = False,
    header: Gguf | None = None,
    progress: Progress | None = None,
    experts: ExpertMemory | None = None,
) -> Model:
    """Load a model on the CPU.

    Args:
        source: A GGUF file, or an object that gives its bytes (`VirtualFile`).
        residency: ``mapped`` maps the file: clean pages that the kernel may drop. ``anon`` copies
            the weights into anonymous memory. ``None`` maps a path. The weights of a virtual file
            are always in anonymous memory, written there once and mapped, or copied through a
            stream; where a system has neither, in a temporary file that is mapped.
        extra_bufts: Let llama.cpp repack weights for speed; repacked tensors are copied.
        vocab_only: Load no weights.
        no_alloc: Neither read nor allocate weights, only count them.
        header: The header of ``source`` if it was read and checked already; parsing a large
            vocabulary again costs a second.
        progress: Called before every tensor with the share of bytes done; an exception it raises
            cancels the load and arrives at the caller.
        experts: Where the tensors of experts are put; closed with the model.

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
    if experts is not None:
        params.tensor_buft_overrides = experts.overrides
        return _load_paged(source, header, params, progress, experts)
    if isinstance(source, Path):
        mapped = residency != "anon" and not no_alloc
        return _load_path(source, header, params, mapped, progress)
    is_mapped = not (extra_bufts or vocab_only or no_alloc)
    if is_mapped and (file := unnamed_file(source.size)) is not None:
        return _load_unnamed(source, file, header, params, progress)
    if not has_fopencookie():
        return _load_spilled(source, header, params, progress)
    return _load_cookie(source, header, params, progress)


def _load_paged(
    source: Path | VirtualFile,
    header: Gguf,
    params: Any,
    progress: Progress | None,
    experts: ExpertMemory,
) -> Model:
    """Copied, not mapped; the file's experts are written to ``experts``."""
    try:
        if isinstance(source, Path):
            handle = _path_handle(source, params, False, progress)
        else:
            handle = _cookie_handle(source, header, params, progress)
    except BaseException as error:
        experts.close()
        experts.raise_error(error)
        raise
    model = Model(handle, header, experts)
    try:
        experts.check(t.name for t in header.tensors if t.name.endswith("_exps.weight"))
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


def _load_path(
    path: Path, header: Gguf, params: Any, mapped: bool, progress: Progress | None
) -> Model:
    return Model(_path_handle(path, params, mapped, progress), header)


def _path_handle(path: Path, params: Any, mapped: bool, progress: Progress | None) -> int:
    params.load_mode = _LOAD_MMAP if mapped and binding().llama_supports_mmap() else _LOAD_COPY
    encoded = os.fsencode(path)
    load = binding().llama_model_load_from_file
    return _Load(params, progress, None).run(str(path), lambda p: load(encoded, p))


def _load_cookie(
    source: VirtualFile, header: Gguf, params: Any, progress: Progress | None
) -> Model:
    return Model(_cookie_handle(source, header, params, progress), header)


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


def _load_unnamed(
    source: VirtualFile, file: UnnamedFile, header: Gguf, params: Any, progress: Progress | None
) -> Model:
    """Write the bytes to memory, where they stay, and map them."""
    with file:
        _write_all(source, file.descriptor, progress)
        model = _load_path(file.path, header, params, True, None)
        file.drop(header.data_offset)  # llama.cpp has read it and holds it no more
        return model


def _load_spilled(
    source: VirtualFile, header: Gguf, params: Any, progress: Progress | None
) -> Model:
    """Write the bytes to a temporary file, map it, and remove its name while it is open."""
    descriptor, name = tempfile.mkstemp(prefix="edgekit-", suffix=".gguf")
    path = Path(name)
    try:
        with open(descriptor, "wb", buffering=0):
            _write_all(source, descriptor, progress)
        # Windows removes no mapped file, so there the weights are copied.
        return _load_path(path, header, params, os.name == "posix", None)
    finally:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()


def _write_all(source: VirtualFile, descriptor: int, progress: Progress | None) -> None:
    """Write all bytes of ``source`` to an open file, which is empty or of its size."""

    def report(n_bytes: int) -> None:
        if progress is not None:
            progress(n_bytes / source.size)

    write_to = getattr(source, "write_to", None)
    if write_to is not None:
        write_to(descriptor, report)
        return
    position = 0
    while position < source.size:
        report(position)
        data = read_from(source, position, min(_COPY_BYTES, source.size - position))
        write_at(descriptor, data, position)
        position += len(data)


def _read_header(source: Path | VirtualFile) -> Gguf:
    if isinstance(source, Path):
        return read_header(source)
    return read_header(io.BufferedReader(RawFile(source), 1 << 16), name="the virtual file")


def _check_whole(source: Path | VirtualFile, header: Gguf) -> None:
    parts = header.get("split.count", 0)
    if isinstance(parts, int) and parts > 1:
        name = source if isinstance(source, Path) else "the virtual file"
        raise UnsupportedError(
            f"{name} is one of {parts} parts of a model; join them with llama-gguf-split --merge"
        )
