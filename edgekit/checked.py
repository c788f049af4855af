"""A file that comes from its start on, checked part by part against hashes known beforehand."""

import hashlib
from collections.abc import Iterable, Iterator

from edgekit.errors import RefusedError
from edgekit.stack import Part

MAX_PADDING = 4096  # bytes of zeros between two parts; artifacts have 63 at most


class MismatchError(RefusedError):
    """The bytes of ``part`` do not have its hash; all before it are sound."""

    def __init__(self, part: Part) -> None:
        """Remember the part."""
        super().__init__(f"bytes {part.offset} to {part.end} have another sha256")
        self.part = part


class Checker:
    """Follows a file's bytes and hashes them part by part; padding between parts must be zeros.

    Attributes:
        stop: The file's end, or that of the beginning of it that is looked at.
        n_bytes: How many came.
    """

    def __init__(self, parts: Iterable[Part], stop: int) -> None:
        """Begin at the file's start.

        Raises:
            RefusedError: Two parts overlap, or there is a hole between them.
        """
        self.stop, self._parts = stop, list(_without_gaps(parts, stop))
        self.rewind(0)

    def rewind(self, offset: int) -> None:
        """Go on at ``offset``, where a part begins."""
        self.n_bytes, self._digest = offset, hashlib.sha256()
        ahead = (i for i, part in enumerate(self._parts) if part.offset >= offset)
        self._at = next(ahead, len(self._parts))

    def feed(self, block: bytes) -> None:
        """Take the bytes that follow, none of them beyond ``stop``.

        Raises:
            MismatchError: A part that ends in them has another hash.
        """
        view = memoryview(block)
        while view:
            part = self._parts[self._at]
            piece = view[: part.end - self.n_bytes]
            view = view[len(piece) :]
            self._digest.update(piece)
            self.n_bytes += len(piece)
            if self.n_bytes < part.end:
                return
            if self._digest.hexdigest() != part.sha256:
                raise MismatchError(part)
            self._at, self._digest = self._at + 1, hashlib.sha256()


def _without_gaps(parts: Iterable[Part], stop: int) -> Iterator[Part]:
    """The parts in order, what lies between them as parts of zeros."""
    end = 0
    for part in sorted(parts, key=lambda part: part.offset):
        if part.end > stop:
            break
        yield from _padding(end, part.offset)
        yield part
        end = part.end
    yield from _padding(end, stop)


def _padding(start: int, stop: int) -> Iterator[Part]:
    if not 0 <= stop - start <= MAX_PADDING:
        raise RefusedError(f"parts overlap or leave a hole between bytes {start} and {stop}")
    if stop > start:
        zeros = bytes(stop - start)
        yield Part(start, stop - start, hashlib.sha256(zeros).hexdigest())
