"""Memory for a model's weights that edgekit owns: llama.cpp lays them out, edgekit fills them.

llama.cpp is told by ``tensor_buft_overrides`` to take a buffer type of ours for all tensors. It is
the CPU's own with another function for allocation, which maps anonymous memory: reserved, not
resident, however large the model is, in large pages where the system has them. Each tensor's
address is told when it is put there.

What llama.cpp reads as the model is a header with nothing behind it. It maps the file, with all
pages at once, and copies each tensor from the map. So the file is cut behind its header before it
is mapped, and the function that would copy is replaced while the model loads.
"""

import ctypes
import errno
import mmap
import os
import sys
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from edgekit.errors import DoesNotFitError, EdgekitError, UnsupportedError
from edgekit.exporters.gguf import Gguf, tensor_offsets
from edgekit.kernels.ggml import ByteArray
from edgekit.llama.tensor import data_of, ggml, name_of

NAME = b"CPU_Weights"  # llama.cpp keeps buffer types apart by name
_ALL = rb"."  # a regular expression that every tensor's name has a match for
_GetName = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)
_Allocate = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_Initialize = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
_SetTensor = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t
)
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
        ("memset_tensor", ctypes.c_void_p),
        ("set_tensor", ctypes.c_void_p),
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


def can_place() -> bool:
    """Whether ggml's buffer types have the form that this module knows, on a system it knows."""
    try:
        _cpu_buffer_type()
    except UnsupportedError:
        return False
    return can_page()


def are_addresses_limited() -> bool:
    """Whether the process may have only so many addresses (``ulimit -v``)."""
    try:
        import resource
    except ImportError:  # Windows
        return False
    return resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY


class WeightMemory:
    """The memory of all tensors of one model; `close` it after the model.

    Attributes:
        paged: Names of tensors whose pages come and go; nothing fills them here.
        spans: Where each tensor lies, by name; filled while the model loads.
    """

    def __init__(self, paged: Collection[str] = frozenset()) -> None:
        """Prepare the buffer type; nothing is mapped yet.

        Raises:
            UnsupportedError: ggml's structs are unknown (`can_place`).
        """
        self.paged = frozenset(paged)
        self.spans: dict[str, Span] = {}
        self._maps: list[tuple[int, int]] = []  # address, bytes
        self._copying: list[tuple[_BufferHead, int]] = []  # with the function that copies
        self._error: Exception | None = None
        self._before_map: Callable[[], None] | None = None
        # kept by self: llama.cpp holds the pointers
        self._allocate, self._initialize = _Allocate(self._allocated), _Initialize(self._placed)
        self._set_tensor = _SetTensor(lambda *_: None)
        self._name = ctypes.create_string_buffer(NAME)
        self._get_name = _GetName(self._named)
        self._type = _cpu_buffer_type()
        self._type.get_name = ctypes.cast(self._get_name, ctypes.c_void_p).value
        self._type.alloc_buffer = ctypes.cast(self._allocate, ctypes.c_void_p).value
        self._overrides = (_Override * 2)(
            _Override(_ALL, ctypes.addressof(self._type)), _Override(None, None)
        )

    def overrides(self, before_map: Callable[[], None]) -> int:
        """What ``llama_model_params.tensor_buft_overrides`` takes.

        Args:
            before_map: Called once llama.cpp has read the header and before it maps the file.
        """
        self._before_map = before_map
        return ctypes.addressof(self._overrides)

    def raise_error(self, cause: BaseException) -> None:
        """Raise what went wrong here while llama.cpp loaded; it only says that it failed."""
        if self._error is not None:
            raise self._error from cause

    def loaded(self) -> None:
        """Take the weights over from llama.cpp, which has placed those that it uses.

        Raises:
            EdgekitError: It has placed none here, or not one that is paged.
        """
        if not self.spans:  # what it uses then is the hole in a file
            raise EdgekitError(
                "this build of llama.cpp does not put weights where edgekit makes them; install "
                "llama-cpp-python 0.3.36, or run with --residency mapped"
            )
        missing = sorted(self.paged - set(self.spans))
        if missing:
            raise EdgekitError(
                f"llama.cpp did not put {missing[0]} where edgekit can page it; "
                "run with --no-pager, and please report this"
            )
        for head, copy in self._copying:
            head.set_tensor = copy
        self._copying.clear()
        for name in self.paged:  # with large pages a single expert may take 2 MiB more
            span = self.spans[name]
            start, end = span.address // PAGE, -(-(span.address + span.n_bytes) // PAGE)
            _madvise(start * PAGE, (end - start) * PAGE, _MADV_NOHUGEPAGE)

    def drop(self, address: int, n_bytes: int) -> None:
        """Let whole pages go; they read as zeros from then on."""
        if n_bytes:
            _madvise(address, n_bytes, mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Unmap; twice is once. The model that used it must be freed before."""
        while self._maps:
            _libc().munmap(*self._maps.pop())
        self.spans.clear()

    def _named(self, _type: int) -> int:
        if self._before_map is not None:
            self._before_map()
            self._before_map = None
        return ctypes.addressof(self._name)

    def _allocated(self, _type: int, n_bytes: int) -> int | None:
        n_bytes = max(PAGE, -(-n_bytes // PAGE) * PAGE)
        # not counted against what the system promises: only what is filled is ever resident
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
        access = mmap.PROT_READ | mmap.PROT_WRITE
        address = _libc().mmap(None, n_bytes, access, flags, -1, 0)
        if address in (None, ctypes.c_void_p(-1).value):
            reason = os.strerror(ctypes.get_errno())
            self._error = DoesNotFitError(
                f"{n_bytes} bytes of addresses for weights cannot be reserved ({reason}); "
                "raise ulimit -v"
            )
            return None
        self._maps.append((address, n_bytes))
        _madvise(address, n_bytes, _MADV_HUGEPAGE)
        buffer = ggml().ggml_backend_cpu_buffer_from_ptr(address, n_bytes)
        head = _BufferHead.from_address(buffer)
        if head.free_buffer is None and head.get_base and head.init_tensor is None:
            head.init_tensor = ctypes.cast(self._initialize, ctypes.c_void_p).value
            self._copying.append((head, head.set_tensor))
            head.set_tensor = ctypes.cast(self._set_tensor, ctypes.c_void_p).value
        return int(buffer)

    def _placed(self, _buffer: int, tensor: int) -> int:
        self.spans[name_of(tensor)] = Span(data_of(tensor), int(ggml().ggml_nbytes(tensor)))
        return 0


class MemorySink:
    """The weights in a `WeightMemory` by their places in a file; takes none that are paged.

    Nor those that llama.cpp has not placed: it does not use them.
    """

    def __init__(self, memory: WeightMemory, header: Gguf) -> None:
        """Take the tensors of a file with ``header``, which is loaded."""
        offsets = tensor_offsets(header.tensors, header.alignment)
        self._places = [
            (header.data_offset + offset, memory.spans[tensor.name])
            for offset, tensor in zip(offsets, header.tensors, strict=True)
            if tensor.name in memory.spans and tensor.name not in memory.paged
        ]
        self._starts = [start for start, _ in self._places]

    def takes(self, offset: int) -> bool:
        """Whether a weight lies at ``offset``: header and padding have no place."""
        return any(True for _ in self._rooms(offset, 1))

    def room(self, offset: int, n_bytes: int) -> ByteArray | None:
        """The memory of these bytes, if they are of one tensor."""
        for _, room in self._rooms(offset, n_bytes):
            return room if room.nbytes == n_bytes else None
        return None

    def put(self, offset: int, data: memoryview) -> None:
        """Copy each tensor's bytes to their places, unless they were made there."""
        source = np.frombuffer(data, np.uint8)
        for at, room in self._rooms(offset, data.nbytes):
            part = source[at - offset : at - offset + room.nbytes]
            if part.ctypes.data != room.ctypes.data:
                room[:] = part

    def _rooms(self, offset: int, n_bytes: int) -> Iterator[tuple[int, ByteArray]]:
        """What of these bytes has a place: the offset of each tensor's part, and its memory."""
        end = offset + n_bytes
        for start, span in self._places[max(0, bisect_right(self._starts, offset) - 1) :]:
            if start >= end:
                break
            first, stop = max(offset, start), min(end, start + span.n_bytes)
            if first < stop:
                memory = (ctypes.c_uint8 * (stop - first)).from_address(
                    span.address + first - start
                )
                yield first, np.ctypeslib.as_array(memory)


def _cpu_buffer_type() -> _BufferType:
    """A copy of the CPU's buffer type."""
    lib = ggml()
    address = lib.ggml_backend_cpu_buffer_type()
    kind = _BufferType.from_buffer_copy(
        (ctypes.c_char * ctypes.sizeof(_BufferType)).from_address(address)
    )
    if kind.device != lib.ggml_backend_buft_get_device(address) or not kind.alloc_buffer:
        raise UnsupportedError(
            "this build of ggml has buffer types of another form, so weights cannot be placed; "
            "install llama-cpp-python 0.3.36"
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
