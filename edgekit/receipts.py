"""Which bytes of an artifact were found sound before, so that they are hashed once, not every time.

A receipt names a file by path, device, inode, size, modification and change time. Any of them
differing, as after a copy, a download or an edit, makes it worthless and all is hashed again. What
it vouches for is kept as byte ranges; a part counts as checked when it lies inside one of them.
"""

import bisect
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from edgekit.cache import cache_folder, identity
from edgekit.spool import write_atomically
from edgekit.stack import Part

GAP = 64  # bytes between parts that are padding, see `edgekit.manifest.ALIGNMENT`
MAX_BYTES = 1 << 24  # of a receipt that is read
Range = tuple[int, int]


class Receipt:
    """Byte ranges of one file that were checked against their hashes; a missing one is empty."""

    def __init__(self, file: Path, sha256: str, seen: Sequence[int] | None = None) -> None:
        """Read what was kept for ``file``, which the manifest says has this hash.

        Args:
            file: By its path.
            sha256: The manifest's.
            seen: `identity` of the file that is open, where another may take its name meanwhile.
        """
        self._identity: list[object] = [sha256, *(seen or identity(file.stat()))]
        name = hashlib.sha256(os.fsencode(file.resolve())).hexdigest()[:32]
        self._path = cache_folder() / "receipts" / f"{name}.json"
        self._ranges = _read(self._path, self._identity)
        self._starts = [start for start, _ in self._ranges]

    def covers(self, part: Part) -> bool:
        """Whether every byte of ``part`` was checked before."""
        at = bisect.bisect_right(self._starts, part.offset) - 1
        return at >= 0 and part.end <= self._ranges[at][1]

    def keep(self, parts: Iterable[Part]) -> None:
        """Remember these parts too; where the cache cannot be written, nothing is remembered."""
        ranges = list(_merged([*self._ranges, *((part.offset, part.end) for part in parts)]))
        if ranges == self._ranges:
            return
        body = {"identity": self._identity, "ranges": ranges}
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_atomically(self._path, json.dumps(body).encode())
        except OSError:  # a read-only home only costs time
            return


def _read(path: Path, identity: list[object]) -> list[Range]:
    try:
        if path.stat().st_size > MAX_BYTES:
            return []
        body = json.loads(path.read_bytes())
        ranges = [(int(start), int(stop)) for start, stop in body["ranges"]]
    except (OSError, ValueError, TypeError, KeyError):
        return []  # absent or damaged: as if nothing was ever checked
    return ranges if body.get("identity") == identity else []


def _merged(ranges: Iterable[Range]) -> Iterator[Range]:
    """The ranges in order, those that touch but for padding joined."""
    current: Range | None = None
    for start, stop in sorted(ranges):
        if current is not None and start <= current[1] + GAP:
            current = current[0], max(current[1], stop)
            continue
        if current is not None:
            yield current
        current = start, stop
    if current is not None:
        yield current
