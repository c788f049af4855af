"""Codec `nested`: the payload of one chunk of one level, and back.

A payload, all integers little-endian:

    u8          1, the format
    u32 [3]     limits of the step classes (`nested_ref.Parts.limits`)
    per stream  u8 width, u32 residuals, u32 patches, u32 bytes of its digits
    u32, u32    bytes of the patches, bytes of the rest
    then        digits of each stream, patches, rest: each a zstd frame, or nothing if empty

The patches are those of all streams: the low bytes of the gaps, the high bytes, the low bytes of
the values, the high bytes.
"""

import struct
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import zstandard

from edgekit.errors import RefusedError
from edgekit.kernels import nested
from edgekit.kernels.ggml import ByteArray
from edgekit.kernels.nested import CHILDREN, Level, Packed
from edgekit.kernels.packing_ref import digit_bytes

__all__ = ["CHILDREN", "decode_chunk", "encode_chunk"]

Compress = Callable[[ByteArray], bytes]

FORMAT = 1
# Digits repeat by chance only, and a match costs more than the digits it stands for. Strategy
# "fast" with the longest match and the smallest table finds next to none: entropy coding is left,
# 0.5 % smaller than zstd's level 1 and no slower. Level 3 finds more and is 1.6 % larger.
DIGITS = zstandard.ZstdCompressionParameters(
    strategy=zstandard.STRATEGY_FAST,
    min_match=7,
    hash_log=6,
    chain_log=6,
    search_log=1,
    window_log=20,
    write_checksum=False,
)
# Scales do repeat: 3.5 % smaller than at level 1, for 14 ms more per million weights and chain.
REST_LEVEL = 13
_HEAD = struct.Struct("<B3I")
_STREAM = struct.Struct("<BIII")
_TAIL = struct.Struct("<II")
_NO_GAPS, _NO_VALUES = np.zeros(0, np.uint16), np.zeros(0, np.int16)


def encode_chunk(parent_type: str, child_type: str, parent: ByteArray, child: ByteArray) -> bytes:
    """Encode a chunk of a tensor in ``child_type``, given the same weights in ``parent_type``.

    Args:
        parent_type: Any key of `ggml.TYPES`.
        child_type: One of `CHILDREN`.
        parent: uint8, whole blocks.
        child: uint8, whole blocks of as many weights.

    Raises:
        RefusedError: The two differ in their number of weights.
    """
    level = nested.encode(parent_type, child_type, parent, child)
    compress_digits, compress_rest = _compressors()
    frames = [compress_digits(s.digits) for s in level.streams]
    patches, rest = compress_rest(_join_patches(level.streams)), compress_rest(level.rest)
    head = _HEAD.pack(FORMAT, *level.limits.tolist()) + b"".join(
        _STREAM.pack(s.width, s.n_residuals, len(s.gaps), len(frame))
        for s, frame in zip(level.streams, frames, strict=True)
    )
    return b"".join([head, _TAIL.pack(len(patches), len(rest)), *frames, patches, rest])


def decode_chunk(
    parent_type: str,
    child_type: str,
    parent: ByteArray,
    payload: bytes | bytearray | memoryview,
    n_weights: int,
    out: ByteArray | None = None,
) -> ByteArray:
    """Decode the blocks of ``n_weights`` weights in ``child_type``, uint8, flat, into ``out``.

    Raises:
        RefusedError: The payload is corrupt, or not of this parent.
    """
    with memoryview(payload).cast("B") as view:
        header = _read_header(child_type, view, n_weights)
        *digits, patches, rest = _decompress(
            list(_frames(header, view)),
            [
                *(digit_bytes(s.width, s.n_residuals) for s in header.streams),
                4 * sum(s.n_patches for s in header.streams),
                nested.rest_bytes(child_type, n_weights),
            ],
        )
    streams = _split_patches(header.streams, digits, patches)
    level = Level(np.array(header.limits, np.uint32), streams, rest)
    return nested.decode(parent_type, child_type, parent, level, n_weights, out)


class _Stream(NamedTuple):
    width: int
    n_residuals: int
    n_patches: int
    n_bytes: int


class _Header(NamedTuple):
    limits: tuple[int, int, int]
    streams: tuple[_Stream, ...]
    sizes: tuple[int, ...]  # of all frames, in order
    end: int  # where the frames begin


def _read_header(child_type: str, view: memoryview, n_weights: int) -> _Header:
    n_streams = nested.n_streams(child_type)
    end = _HEAD.size + n_streams * _STREAM.size + _TAIL.size
    if len(view) < end or view[0] != FORMAT:
        raise RefusedError(
            f"a level to {child_type} has {len(view)} bytes and format "
            f"{view[0] if len(view) else 'none'}; needed are {end} or more and {FORMAT}"
        )
    _, *limits = _HEAD.unpack_from(view)
    numbers = _STREAM.iter_unpack(view[_HEAD.size : end - _TAIL.size])
    streams = tuple(map(_Stream._make, numbers))
    sizes = (*(s.n_bytes for s in streams), *_TAIL.unpack_from(view, end - _TAIL.size))
    widths = nested.widths(child_type)
    if (
        any(s.width not in widths or s.n_patches > s.n_residuals for s in streams)
        or sum(s.n_residuals for s in streams) != n_weights
        or end + sum(sizes) != len(view)
    ):
        raise RefusedError(
            f"a level to {child_type} has a header that does not add up to its "
            f"{len(view)} bytes and {n_weights} weights; it is corrupt"
        )
    return _Header((limits[0], limits[1], limits[2]), streams, sizes, end)


def _frames(header: _Header, view: memoryview) -> Iterator[memoryview]:
    start = header.end
    for size in header.sizes:
        yield view[start : start + size]
        start += size


def _join_patches(packed: list[Packed]) -> ByteArray:
    if not any(len(p.gaps) for p in packed):
        return np.zeros(0, np.uint8)
    gaps = np.concatenate([p.gaps for p in packed]).astype("<u2")
    values = np.concatenate([p.values for p in packed]).astype("<i2")
    planes = [x.view(np.uint8).reshape(-1, 2).T.reshape(-1) for x in (gaps, values)]
    return np.concatenate(planes)


def _split_patches(
    streams: tuple[_Stream, ...], digits: list[ByteArray], patches: ByteArray
) -> list[Packed]:
    if not len(patches):  # often so; this saves a tenth of a small chunk's time
        return [
            Packed(s.width, s.n_residuals, data, _NO_GAPS, _NO_VALUES)
            for s, data in zip(streams, digits, strict=True)
        ]
    planes = patches.reshape(2, 2, -1).transpose(0, 2, 1).copy()
    gaps, values = planes[0].view("<u2").reshape(-1), planes[1].view("<i2").reshape(-1)
    packed, start = [], 0
    for s, data in zip(streams, digits, strict=True):
        part = slice(start, start + s.n_patches)
        packed.append(Packed(s.width, s.n_residuals, data, gaps[part], values[part]))
        start += s.n_patches
    return packed


_thread = threading.local()  # zstd contexts are not for two threads at once


def _compressors() -> tuple[Compress, Compress]:
    """For digits, and for the rest."""
    if not hasattr(_thread, "compressors"):
        _thread.compressors = (
            zstandard.ZstdCompressor(compression_params=DIGITS),
            zstandard.ZstdCompressor(level=REST_LEVEL, write_checksum=False),
        )
    digits, rest = _thread.compressors
    return partial(_compress, digits), partial(_compress, rest)


def _compress(compressor: zstandard.ZstdCompressor, data: ByteArray) -> bytes:
    return bytes(compressor.compress(data.tobytes())) if len(data) else b""


def _decompress(frames: list[memoryview], sizes: list[int]) -> list[ByteArray]:
    """Decompress frames that must hold ``sizes`` bytes; their own claims are checked first.

    One right after the other: each time other threads take Python's lock, and may keep it.
    """
    if not hasattr(_thread, "decompressor"):
        _thread.decompressor = zstandard.ZstdDecompressor()
    try:
        claims = [zstandard.frame_content_size(frame) if frame else 0 for frame in frames]
        if claims != sizes:
            claim, size = next(c for c in zip(claims, sizes, strict=True) if c[0] != c[1])
            raise RefusedError(f"a level holds a zstd frame of {claim} bytes where {size} belong")
        filled = list(map(_thread.decompressor.decompress, filter(None, frames)))
    except zstandard.ZstdError as error:
        raise RefusedError(f"a level holds a damaged zstd frame: {error}") from error
    blocks = iter(filled)
    return [np.frombuffer(next(blocks) if frame else b"", np.uint8) for frame in frames]
