"""A new file that is hashed while it is written."""

import os
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, TypeVar

from edgekit.disk import PLAIN

T = TypeVar("T", bound="HashedFile")


class HashedFile:
    """Knows its length and hash; refuses to follow a link or to overwrite; a context manager.

    Attributes:
        path: Where it is.
        n_bytes: Written so far.
    """

    def __init__(self, path: Path) -> None:
        """Create ``path``."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | PLAIN
        self._file: BinaryIO = os.fdopen(os.open(path, flags, 0o644), "wb")
        self._digest = sha256()
        self.path, self.n_bytes = path, 0

    def write(self, data: bytes | memoryview) -> None:
        """Append ``data``."""
        self._file.write(data)
        self._digest.update(data)
        self.n_bytes += len(data)

    @property
    def sha256(self) -> str:
        """Of all that was written."""
        return self._digest.hexdigest()

    def __enter__(self: T) -> T:
        """Use as a context manager."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Sync and close."""
        try:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self._file.close()
