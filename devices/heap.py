"""What the C library's heaps keep of memory that was freed, and how they are told not to."""

import ctypes
import functools
import gc
import sys
from typing import Any

_M_MMAP_THRESHOLD = -3  # malloc.h
LARGE = 128 << 10  # bytes; glibc's threshold to begin with


def keep_large_blocks_apart() -> None:
    """Have glibc give every large block back to the system when it is freed.

    Its threshold for that grows with what is freed, up to 32 MiB. Chunks of weights and layers'
    activations then come from its heaps, which keep what was freed among what was not: 30 MiB after
    a load, 0.9 GiB while a model of a billion weights is pruned.
    """
    _glibc()


def return_free_memory() -> None:
    """Give freed memory back to the system: what Python's cycles hold, and what glibc keeps."""
    gc.collect()
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


@functools.cache
def _glibc() -> Any:
    """The C library where it is glibc, its threshold set; else None."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is None or not hasattr(libc, "malloc_trim"):  # musl has no such heaps
        return None
    libc.mallopt(_M_MMAP_THRESHOLD, LARGE)
    return libc
