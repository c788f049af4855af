"""Where the bytes of an assembled file go: an open file here, a model's memory elsewhere."""

from collections.abc import Callable
from typing import Protocol

from edgekit.disk import write_at
from edgekit.kernels.ggml import ByteArray

Report = Callable[[int], None]


class Sink(Protocol):
    """Takes the bytes of a file, in any order, from several threads."""

    def takes(self, offset: int) -> bool:
        """Whether the bytes from ``offset`` to the end of their tensor are wanted at all."""
        ...

    def room(self, offset: int, n_bytes: int) -> ByteArray | None:
        """Where these bytes will lie, uint8: made there, they are not copied. Else ``None``."""
        ...

    def put(self, offset: int, data: memoryview) -> None:
        """Take ``data``, which begins at ``offset``."""
        ...


class FileSink:
    """An open file that can be written at any offset."""

    def __init__(self, descriptor: int) -> None:
        """Write to ``descriptor``, which stays the caller's."""
        self._descriptor = descriptor

    def takes(self, offset: int) -> bool:
        """It takes everything."""
        return True

    def room(self, offset: int, n_bytes: int) -> None:
        """Bytes are copied to a file."""
        return

    def put(self, offset: int, data: memoryview) -> None:
        """Write them.

        Raises:
            OSError: There is no room for them.
        """
        write_at(self._descriptor, data, offset)
