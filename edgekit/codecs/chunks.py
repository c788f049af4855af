"""How a tensor is cut into independently coded chunks, and how a level's chunks lie in its part.

A chunk is whole rows of one expert, at most ``chunk_weights`` weights (one row at least). A part is
its chunks one after the other, each with its length in front: ``uint32 little-endian n_bytes,
payload``. The cuts follow from the shape alone, so all levels of a tensor are cut alike and any
chunk can be decoded without the others.
"""

import struct

from edgekit.errors import RefusedError

CHUNK_WEIGHTS = 1 << 20  # 4 MiB of float32; calls cost 0.1 ms each, four times as much at 1 << 18
_LENGTH = struct.Struct("<I")


def row_ranges(rows: int, cols: int, chunk_weights: int) -> list[tuple[int, int]]:
    """Cut ``rows`` of ``cols`` weights into ``(start, stop)`` ranges of rows."""
    step = max(1, chunk_weights // cols)
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def frame(payload: bytes) -> bytes:
    """A chunk's payload with its length in front."""
    return _LENGTH.pack(len(payload)) + payload


def split_frames(part: memoryview, n_chunks: int) -> list[memoryview]:
    """The payloads of the ``n_chunks`` chunks of a part.

    Raises:
        RefusedError: The lengths do not add up to the part.
    """
    payloads, at = [], 0
    for _ in range(n_chunks):
        if at + _LENGTH.size > len(part):
            raise RefusedError(f"a level of {len(part)} bytes ends before its {n_chunks} chunks do")
        (n_bytes,) = _LENGTH.unpack_from(part, at)
        at += _LENGTH.size
        payloads.append(part[at : at + n_bytes])
        at += n_bytes
    if at != len(part):
        raise RefusedError(f"a level has {len(part)} bytes, its {n_chunks} chunks take {at}")
    return payloads
