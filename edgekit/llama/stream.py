"""A C ``FILE*`` whose bytes come from Python: llama.cpp loads a GGUF that exists nowhere.

glibc's ``fopencookie`` calls back for every read and seek. Two facts of glibc shape this file. All
bytes of such a stream pass through its buffer, one call per fill, so the buffer is large. And it
fills whole buffers: past the end of what was asked for, and from the block boundary *before* the
place that is sought. Either would decode parts of tensors that nobody asked for; so a fill ends
where the next tensor starts, and one that does not begin at a tensor gets nothing, upon which glibc
seeks exactly (``_IO_new_file_seekoff`` in glibc's ``libio/fileops.c``).
"""

import bisect
import ctypes
import functools
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from edgekit.errors import EdgekitError

_FULLY_BUFFERED = 0  # _IOFBF in stdio.h
BUFFER_BYTES = 1 << 20  # of the stream; larger gains nothing measurable


@runtime_checkable
class VirtualFile(Protocol):
    """Bytes that can be read at any offset; what `open_model` takes in place of a path.

    An object may also have ``readinto(offset, buffer: memoryview) -> int``, which then is called
    in place of ``read`` and writes straight into a stream's memory, and ``write_to(sink, report)``,
    which gives everything to a `Sink` and calls ``report(n_bytes)`` with what is done so far.
    """

    @property
    def size(self) -> int:
        """Bytes in all."""
        ...

    def read(self, offset: int, n: int) -> bytes:
        """Give at least one and at most ``n`` bytes from ``offset``; ``offset + n <= size``."""
        ...


@dataclass(frozen=True, eq=False)
class MemoryFile:
    """A virtual file over bytes that are in memory already, such as a header alone."""

    data: bytes

    @property
    def size(self) -> int:
        """Bytes in all."""
        return len(self.data)

    def read(self, offset: int, n: int) -> bytes:
        """Give ``n`` bytes from ``offset``."""
        return self.data[offset : offset + n]


def read_from(source: VirtualFile, offset: int, n: int) -> bytes:
    """The bytes from ``offset``, at least one and at most ``n``.

    Raises:
        EdgekitError: The reader gives none, or more.
    """
    data = source.read(offset, n)
    check_read(offset, n, len(data))
    return data


def check_read(offset: int, n: int, got: int) -> None:
    """Refuse ``got`` bytes where 1 to ``n`` were asked."""
    if not 0 < got <= n:
        raise EdgekitError(
            f"the reader gave {got} bytes at offset {offset} where 1 to {n} were asked"
        )


class RawFile(io.RawIOBase):
    """A virtual file as a binary file, for the header reader."""

    def __init__(self, source: VirtualFile) -> None:
        """Begin at its first byte."""
        self._source, self._position = source, 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to another place."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._source.size}
        self._position = base[whence] + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill ``buffer`` as far as a read of the source does; 0 at the end."""
        n = min(len(buffer), self._source.size - self._position)
        data = self._source.read(self._position, n) if n > 0 else b""
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


_READ = ctypes.CFUNCTYPE(ctypes.c_ssize_t, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_WRITE = ctypes.CFUNCTYPE(ctypes.c_ssize_t, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_SEEK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_int64), ctypes.c_int
)
_CLOSE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)


class _CookieFunctions(ctypes.Structure):
    """``cookie_io_functions_t`` of glibc's stdio.h."""

    _fields_ = (("read", _READ), ("write", _WRITE), ("seek", _SEEK), ("close", _CLOSE))


@functools.cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fopencookie.argtypes = [ctypes.c_void_p, ctypes.c_char_p, _CookieFunctions]
    libc.fopencookie.restype = ctypes.c_void_p
    libc.fclose.argtypes = [ctypes.c_void_p]
    libc.setvbuf.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    return libc


def has_fopencookie() -> bool:
    """Whether this platform's C library can call back for a stream (glibc and musl can)."""
    return sys.platform == "linux" and hasattr(ctypes.CDLL(None), "fopencookie")


class CookieFile:
    """A ``FILE*`` over a `VirtualFile`; keep it alive, then close it.

    Attributes:
        pointer: The ``FILE*``.
        error: What the source raised in a callback; the read then failed on the C side.
        n_reads: Calls of the source, for measurements.
    """

    def __init__(self, source: VirtualFile, starts: Sequence[int]) -> None:
        """Open ``source``, whose header and tensors begin at ``starts``, increasing from 0."""
        self.source, self.size = source, source.size
        self._starts = [*starts, self.size]
        self.error: BaseException | None = None
        self.n_reads = 0
        self._position = 0
        self._has_sought = False
        self._buffer = ctypes.create_string_buffer(BUFFER_BYTES)
        self._functions = _CookieFunctions(
            _READ(self._read), _WRITE(), _SEEK(self._seek), _CLOSE(self._close)
        )
        self.pointer: int | None = _libc().fopencookie(None, b"rb", self._functions)
        if not self.pointer:
            raise EdgekitError(f"fopencookie failed with errno {ctypes.get_errno()}")
        _libc().setvbuf(self.pointer, self._buffer, _FULLY_BUFFERED, BUFFER_BYTES)

    def close(self) -> None:
        """Close the stream; twice is once."""
        if self.pointer:
            _libc().fclose(self.pointer)
            self.pointer = None

    def _read(self, _cookie: int, buffer: int, wanted: int) -> int:
        if self.error is not None:
            return -1
        part = bisect.bisect_right(self._starts, self._position)
        n = min(wanted, self._starts[part] - self._position) if part < len(self._starts) else 0
        is_early = self._has_sought and self._position != self._starts[part - 1]
        self._has_sought = False
        if n == 0 or is_early:
            return 0
        try:
            got = self._fill(buffer, n)
        except BaseException as error:  # C cannot carry it; open_model raises it again
            self.error = error
            return -1
        self._position += got
        return got

    def _fill(self, buffer: int, n: int) -> int:
        self.n_reads += 1
        readinto = getattr(self.source, "readinto", None)
        if readinto is not None:
            got = int(readinto(self._position, _view(buffer, n)))
            check_read(self._position, n, got)
            return got
        data = read_from(self.source, self._position, n)
        _view(buffer, len(data))[:] = data
        return len(data)

    def _seek(self, _cookie: int, offset: Any, whence: int) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}.get(whence)
        if base is None or base + offset[0] < 0:
            return -1
        self._position = offset[0] = base + offset[0]
        self._has_sought = whence == io.SEEK_SET
        return 0

    def _close(self, _cookie: int) -> int:
        return 0


def _view(address: int, n: int) -> memoryview:
    return memoryview((ctypes.c_ubyte * n).from_address(address)).cast("B")
