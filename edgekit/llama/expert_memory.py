"""Memory for expert tensors that edgekit owns: llama.cpp lays them out, edgekit fills and drops.

llama.cpp is told by ``tensor_buft_overrides`` to take a buffer type of ours for the expert tensors.
It is the CPU's own with another function for allocation, which maps anonymous memory: reserved, not
resident, however large the model is. Each tensor's address is told when it is put there.

While the model loads, the experts' bytes are zeros that are written and dropped again; dropped
pages read as zeros, so nothing is lost.
"""

import ctypes
import errno
import mmap
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

from edgekit.errors import DoesNotFitError, EdgekitError, UnsupportedError
from edgekit.llama.tensor import data_of, ggml, name_of

PATTERN = rb"ffn_(gate|up|down)_exps\.weight"
NAME = b"CPU_Experts"  # llama.cpp keeps buffer types apart by name
_GetName = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)
_Allocate = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_Initialize = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
_MADV_HUGEPAGE, _MADV_NOHUGEPAGE = 14, 15  # Linux, mman.h
PAGE = mmap.PAGESIZE


class _BufferType(ctypes.Structure):
    """`struct ggml_backend_buffer_type` of ggml-backend-impl.h."""

    _fields_ = (
        ("get_name", ctypes.c_void_p),
        ("alloc_buffer", ctypes.c_void_p),
        ("get_alignment", ctypes.c_void_p),
        ("get_max_size", ctypes.c_void_p),
        ("get_alloc_size", ctypes.c_void_p),
        ("is_host", ctypes.c_void_p),
        ("device", ctypes.c_void_p),
        ("context", ctypes.c_void_p),
    )


class _BufferHead(ctypes.Structure):
    """The first functions of `struct ggml_backend_buffer_i`, which begins a buffer."""

    _fields_ = (
        ("free_buffer", ctypes.c_void_p),
        ("get_base", ctypes.c_void_p),
        ("init_tensor", ctypes.c_void_p),
    )


class _Override(ctypes.Structure):
    """`struct llama_model_tensor_buft_override` of llama.h."""

    _fields_ = (("pattern", ctypes.c_char_p), ("buft", ctypes.c_void_p))


@dataclass(frozen=True)
class Span:
    """Where a tensor lies in memory."""

    address: int
    n_bytes: int


def can_page() -> bool:
    """Whether this system drops pages on request (``MADV_DONTNEED`` with Linux's meaning)."""
    return sys.platform in ("linux", "android")


class ExpertMemory:
    """The memory of all expert tensors of one model; `close` it after the model.

    Attributes:
        spans: Where each expert tensor lies, by name; filled while the model loads.
    """

    def __init__(self) -> None:
        """Prepare the buffer type; nothing is mapped yet.

        Raises:
            UnsupportedError: The system cannot drop pages, or ggml's structs are unknown.
        """
        if not can_page():
            raise UnsupportedError(
                f"experts on demand need Linux, this is {sys.platform}; run with --no-pager"
            )
        self.spans: dict[str, Span] = {}
        self._maps: list[tuple[int, int]] = []  # address, bytes
        self._error: Exception | None = None
        # kept by self: llama.cpp holds the pointers
        self._allocate, self._initialize = _Allocate(self._allocated), _Initialize(self._placed)
        self._name = ctypes.create_string_buffer(NAME)
        self._get_name = _GetName(lambda _: ctypes.addressof(self._name))
        self._type = _cpu_buffer_type()
        self._type.get_name = ctypes.cast(self._get_name, ctypes.c_void_p).value
        self._type.alloc_buffer = ctypes.cast(self._allocate, ctypes.c_void_p).value
        self._overrides = (_Override * 2)(
            _Override(PATTERN, ctypes.addressof(self._type)), _Override(None, None)
        )

    @property
    def overrides(self) -> int:
        """What ``llama_model_params.tensor_buft_overrides`` takes."""
        return ctypes.addressof(self._overrides)

    def raise_error(self, cause: BaseException) -> None:
        """Raise what went wrong here while llama.cpp loaded; it only says that it failed."""
        if self._error is not None:
            raise self._error from cause

    def check(self, names: Iterable[str]) -> None:
        """Check that every tensor of ``names`` lies here.

        Raises:
            EdgekitError: llama.cpp put one of them elsewhere.
        """
        missing = sorted(set(names) - set(self.spans))
        if missing:
            raise EdgekitError(
                f"llama.cpp did not put {missing[0]} where edgekit can page it; "
                "run with --no-pager, and please report this"
            )

    def drop_all(self) -> None:
        """Let every page go."""
        for address, n_bytes in self._maps:
            _madvise(address, n_bytes, mmap.MADV_DONTNEED)

    def ready(self) -> None:
        """The zeros of the load are over: let them go, and take small pages from now on.

        With huge ones a single expert may take 2 MiB more.
        """
        self.drop_all()
        for address, n_bytes in self._maps:
            _madvise(address, n_bytes, _MADV_NOHUGEPAGE)

    def drop(self, address: int, n_bytes: int) -> None:
        """Let whole pages go; they read as zeros from then on."""
        if n_bytes:
            _madvise(address, n_bytes, mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Unmap; twice is once. The model that used it must be freed before."""
        while self._maps:
            _libc().munmap(*self._maps.pop())
        self.spans.clear()

    def _allocated(self, _type: int, n_bytes: int) -> int | None:
        n_bytes = max(PAGE, -(-n_bytes // PAGE) * PAGE)
        # not counted against what the system promises: only what is filled is ever resident
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
        access = mmap.PROT_READ | mmap.PROT_WRITE
        address = _libc().mmap(None, n_bytes, access, flags, -1, 0)
        if address in (None, ctypes.c_void_p(-1).value):
            reason = os.strerror(ctypes.get_errno())
            self._error = DoesNotFitError(
                f"{n_bytes} bytes of addresses for experts cannot be reserved ({reason}); "
                "raise ulimit -v, or run with --no-pager"
            )
            return None
        self._maps.append((address, n_bytes))
        _madvise(address, n_bytes, _MADV_HUGEPAGE)  # 4 GiB of zeros take 4 s in small pages
        buffer = ggml().ggml_backend_cpu_buffer_from_ptr(address, n_bytes)
        head = _BufferHead.from_address(buffer)
        if head.free_buffer is None and head.get_base and head.init_tensor is None:
            head.init_tensor = ctypes.cast(self._initialize, ctypes.c_void_p).value
        return int(buffer)

    def _placed(self, _buffer: int, tensor: int) -> int:
        self.spans[name_of(tensor)] = Span(data_of(tensor), int(ggml().ggml_nbytes(tensor)))
        return 0


def _cpu_buffer_type() -> _BufferType:
    """A copy of the CPU's buffer type."""
    lib = ggml()
    address = lib.ggml_backend_cpu_buffer_type()
    kind = _BufferType.from_buffer_copy(
        (ctypes.c_char * ctypes.sizeof(_BufferType)).from_address(address)
    )
    if kind.device != lib.ggml_backend_buft_get_device(address) or not kind.alloc_buffer:
        raise UnsupportedError(
            "this build of ggml has buffer types of another form, so experts cannot be paged; "
            "install llama-cpp-python 0.3.36, or run with --no-pager"
        )
    return kind


def _madvise(address: int, n_bytes: int, advice: int) -> None:
    if _libc().madvise(address, n_bytes, advice):
        number = ctypes.get_errno()
        if number != errno.EINVAL or advice == mmap.MADV_DONTNEED:  # no huge pages in this kernel
            raise OSError(number, os.strerror(number))


@cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    size, pointer, number = ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int
    libc.mmap.restype = pointer
    libc.mmap.argtypes = [pointer, size, number, number, number, ctypes.c_long]
    libc.munmap.argtypes, libc.madvise.argtypes = [pointer, size], [pointer, size, number]
    return libc
