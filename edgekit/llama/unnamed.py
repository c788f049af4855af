"""A file in memory without a name: written once, where its bytes stay, then mapped by llama.cpp.

Its pages are anonymous memory to the kernel: they count against the process's group while they are
there, are swapped and not dropped, and go when the last map of them does, also after a kill.
"""

import contextlib
import mmap
import os
from pathlib import Path

_FOLDER = Path("/proc/self/fd")


class UnnamedFile:
    """A file of zeros that takes memory where it is written; a context manager.

    Attributes:
        descriptor: Of the open file.
        path: By which this process can open it while it is open here.
    """

    def __init__(self, descriptor: int) -> None:
        """Own an open file; `unnamed_file` makes one."""
        self.descriptor = descriptor
        self.path = _FOLDER / str(descriptor)

    def __enter__(self) -> "UnnamedFile":
        """Use as a context manager."""
        return self

    def __exit__(self, *_: object) -> None:
        """Let go of it; what others have mapped stays."""
        os.close(self.descriptor)

    def drop(self, n_bytes: int) -> None:
        """Give the memory of the first ``n_bytes`` back, but for a page that they share."""
        n_whole = n_bytes // mmap.PAGESIZE * mmap.PAGESIZE
        if n_whole:
            with (
                contextlib.suppress(OSError),  # some kernels cannot, and some limits forbid it
                mmap.mmap(self.descriptor, n_whole) as mapped,
            ):
                mapped.madvise(mmap.MADV_REMOVE)


def unnamed_file(n_bytes: int) -> UnnamedFile | None:
    """Make one, or none where the system has none or forbids it (Linux and Android have them)."""
    if not hasattr(os, "memfd_create") or not _FOLDER.is_dir():
        return None
    try:
        descriptor = os.memfd_create("edgekit")
    except OSError:
        return None
    try:
        os.ftruncate(descriptor, n_bytes)
    except OSError:  # larger than the process may write files
        os.close(descriptor)
        return None
    return UnnamedFile(descriptor)
