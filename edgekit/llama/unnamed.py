"""A file in memory without a name: written once, where its bytes stay, then mapped by llama.cpp.

Its pages are anonymous memory to the kernel: they count against the process's group while they are
there, are swapped and not dropped, and go when the last map of them does, also after a kill.
"""

import mmap
import os
from pathlib import Path

_FOLDER = Path("/proc/self/fd")


def has_unnamed_files() -> bool:
    """Whether this platform has them (Linux and Android, unless /proc is missing)."""
    return hasattr(os, "memfd_create") and _FOLDER.is_dir()


class UnnamedFile:
    """A file of ``n_bytes`` zeros that takes memory where it is written; a context manager.

    Attributes:
        descriptor: Of the open file.
        path: By which this process can open it while it is open here.
    """

    def __init__(self, n_bytes: int) -> None:
        """Make it."""
        self._n_bytes = n_bytes
        self.descriptor = os.memfd_create("edgekit")
        self.path = _FOLDER / str(self.descriptor)
        os.ftruncate(self.descriptor, n_bytes)

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
            with mmap.mmap(self.descriptor, self._n_bytes) as mapped:
                mapped.madvise(mmap.MADV_REMOVE, 0, n_whole)
