"""Room on disk, asked before work begins, and folders that one process works in at a time."""

import errno
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgekit.errors import DiskFullError, UsageError
from edgekit.sizes import format_size

# Of os.open: no link is followed, and Windows changes no line ends
PLAIN = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what an `OSError` says then
_seeking = threading.Lock()


def require_free(folder: Path, n_bytes: int, what: str) -> None:
    """Check that ``n_bytes`` fit where ``folder`` is or will be.

    Raises:
        DiskFullError: They do not.
    """
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < n_bytes:
        raise DiskFullError(
            f"{what} needs about {format_size(n_bytes)} on the disk of {place}, "
            f"{format_size(free)} are free; make room or choose another place with -o"
        )


def require_name(output: Path) -> None:
    """Check that ``output`` has a name of its own, beside which hidden ones can stand.

    Raises:
        UsageError: It is the folder we are in, or one above.
    """
    if output.name in ("", ".."):
        raise UsageError(f"{output} is no name for a new folder; choose another -o")


def require_new_folder(output: Path, force: bool, mark: str, source: Path | None = None) -> None:
    """Check that a folder may be made as ``output``, or replaced where force is on.

    Args:
        output: The folder.
        force: Whether one that is empty, or that holds the file ``mark``, may be replaced.
        mark: Name of a file by which one of ours is known.
        source: What it is made from.

    Raises:
        UsageError: It exists and may not be replaced, it is a link or a file, has no name of its
            own, or is or holds ``source``.
    """
    require_name(output)
    if output.is_symlink():
        raise UsageError(f"{output} is a link; give the folder it leads to, or choose another -o")
    if source is not None and output.resolve() in (source.resolve(), *source.resolve().parents):
        raise UsageError(f"{output} is or holds {source}, which is read; choose another -o")
    if not output.exists():
        return
    if not output.is_dir():
        raise UsageError(f"{output} is a file, not a folder to replace; choose another -o")
    if not force:
        raise UsageError(f"{output} exists; choose another -o, or replace it with --force")
    if any(output.iterdir()) and not (output / mark).is_file():
        raise UsageError(
            f"{output} holds other files and no {mark}: --force replaces what edgekit made; choose "
            "another -o, or remove it yourself"
        )


@contextmanager
def disk_full_reported(what: str, hint: str) -> Iterator[None]:
    """Turn the operating system's "no space left" into `DiskFullError`."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise DiskFullError(f"{what}: the disk is full ({error.strerror}); {hint}") from error


def temporary_folder() -> Path:
    """Where temporary files take disk and no memory, if there is such a place.

    Where ``$TMPDIR`` is set, it is that place.
    """
    usual = Path(tempfile.gettempdir())
    if os.environ.get("TMPDIR"):
        return usual
    places = (place for place in (usual, Path("/var/tmp")) if os.access(place, os.W_OK))
    return next((place for place in places if not _is_in_memory(place)), usual)


def _is_in_memory(folder: Path) -> bool:
    """Whether its file system is one that lies in memory; only Linux tells."""
    device = folder.stat().st_dev
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return False
    for line in lines:
        before, _, after = line.partition(" - ")
        major, _, minor = before.split()[2].partition(":")
        if os.makedev(int(major), int(minor)) == device:
            return after.split()[0] in ("tmpfs", "ramfs")
    return False


def try_to_lock(descriptor: int) -> bool:
    """Lock an open file until it is closed or its process ends; false where another one has it.

    Also false where files cannot be locked (Windows, some network file systems).
    """
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True


@contextmanager
def held_alone(folder: Path) -> Iterator[None]:
    """Keep other processes that ask the same out of ``folder``; a kill lets go of it.

    Raises:
        UsageError: One of them is in it.
    """
    if os.name != "posix":  # folders cannot be locked there
        yield
        return
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise UsageError(f"another edgekit works in {folder}; wait for it, or end it") from error
    finally:
        os.close(handle)


def write_at(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of ``data`` at ``offset`` of an open file; safe on several threads."""
    left, write = memoryview(data), getattr(os, "pwrite", _seek_and_write)
    while left:
        n_written = write(descriptor, left, offset)
        left, offset = left[n_written:], offset + n_written


def _seek_and_write(descriptor: int, data: memoryview, offset: int) -> int:
    """What Windows has no ``pwrite`` for."""
    with _seeking:
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.write(descriptor, data)


def folder_bytes(folder: Path) -> int:
    """Bytes of all files in a folder and those below."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and not os.path.islink(p))
