"""Room on disk, asked before work begins."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgekit.errors import DiskFullError
from edgekit.sizes import format_size


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


@contextmanager
def disk_full_reported(what: str, hint: str) -> Iterator[None]:
    """Turn the operating system's "no space left" into `DiskFullError`."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise DiskFullError(f"{what}: the disk is full ({error.strerror}); {hint}") from error
