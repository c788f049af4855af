"""A model's header in a file without a name, that looks as long as the model and has nothing else.

llama.cpp checks when it opens a file that all tensors lie in it. What is behind the header is a
hole, which takes no memory until somebody reads or maps it.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from edgekit.disk import write_at

_FOLDER = Path("/proc/self/fd")


@dataclass(frozen=True)
class HeaderFile:
    """An open file that begins with a header.

    Attributes:
        path: By which this process can open it while it is open here.
        cut: Ends the file behind the header; who has opened it before does not see that.
    """

    path: Path
    cut: Callable[[], None]


@contextmanager
def header_file(head: bytes, n_bytes: int) -> Iterator[HeaderFile | None]:
    """Make one of ``n_bytes``; it goes with the block.

    Yields:
        ``None`` where the system has no way to open a file that has no name, or forbids it.
    """
    descriptor = _unnamed(n_bytes) if _FOLDER.is_dir() else None
    if descriptor is None:
        yield None
        return
    try:
        write_at(descriptor, head, 0)
        yield HeaderFile(_FOLDER / str(descriptor), lambda: os.ftruncate(descriptor, len(head)))
    finally:
        os.ftruncate(descriptor, 0)  # a map of its last page, which llama.cpp leaves, would keep it
        os.close(descriptor)


def _unnamed(n_bytes: int) -> int | None:
    """A new file of zeros in memory, or on disk where the system has none in memory."""
    for make in (_in_memory, _on_disk):
        descriptor = None
        try:
            descriptor = make()
            os.ftruncate(descriptor, n_bytes)
            return descriptor
        except (AttributeError, OSError):  # no such call, forbidden, or larger than files may be
            if descriptor is not None:
                os.close(descriptor)
    return None


def _in_memory() -> int:
    return os.memfd_create("edgekit")


def _on_disk() -> int:
    descriptor, name = tempfile.mkstemp(prefix="edgekit-")
    os.unlink(name)
    return descriptor
