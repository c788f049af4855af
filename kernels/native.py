"""The compiled kernels: found beside this file, loaded with ctypes, or absent.

`setup.py` compiles them at installation where there is a C compiler. Without them the numpy
references run, which give the same bytes some hundred times slower; so does EDGEKIT_NO_NATIVE=1.
EDGEKIT_NO_AVX512=1 makes the kernels do without AVX-512, as most machines must.
"""

import ctypes
import logging
import os
import threading
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.errors import RefusedError
from edgekit.kernels.ggml import TYPES, ByteArray, F32Array
from edgekit.kernels.nested_ref import FLOAT_STREAMS, FLOATS, n_streams
from edgekit.kernels.packing_ref import Level, Packed, digit_bytes

ABI = 3  # as in level.c: a library left over from other sources is not used
BAD_PATCH = 200  # as in level.c
_Pointer, _Size, _Int = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int


class _Level(ctypes.Structure):
    """`level_t` of units.h."""

    _fields_ = (
        ("digits", _Pointer * FLOAT_STREAMS),
        ("count", _Size * FLOAT_STREAMS),
        ("n_patches", _Size * FLOAT_STREAMS),
        ("gaps", _Pointer),
        ("values", _Pointer),
        ("rest", _Pointer),
        ("limits", ctypes.c_uint32 * 3),
        ("width", ctypes.c_uint8 * FLOAT_STREAMS),
        ("is_plain", ctypes.c_uint8),
    )


def native() -> "Native | None":
    """Give the compiled kernels, or None where the references are to run."""
    return None if os.environ.get("EDGEKIT_NO_NATIVE") == "1" else _load()


@cache
def _load() -> "Native | None":
    for path in sorted(Path(__file__).parent.glob("_nested*")):
        if path.suffix in (".so", ".pyd", ".dll", ".dylib"):
            try:
                library = ctypes.CDLL(str(path))
                if library.nested_abi() == ABI:
                    return Native(library)
            except (OSError, AttributeError):
                continue  # of another machine or another Python; the message follows
    logging.getLogger(__name__).warning(
        "edgekit's compiled codec is missing: tensors are coded some hundred times slower; "
        "install a C compiler and reinstall edgekit"
    )
    return None


def listener_function() -> Any:
    """``listener_eval`` of listener.c, or None where nothing is compiled."""
    kernels = native()
    return None if kernels is None else kernels.listener_function


class Native:
    """The functions of level.c, with numpy arrays in and out."""

    def __init__(self, library: ctypes.CDLL) -> None:
        """Declare the functions of a loaded library."""
        self._library = library
        self.listener_function = library.listener_eval
        self._thread = threading.local()
        for name in ("encode", "decode"):
            getattr(library, f"nested_{name}").argtypes = [_Int, _Int, _Size, *[_Pointer] * 4]
            room = getattr(library, f"nested_{name}_room")
            room.argtypes, room.restype = [_Int, _Size], _Size
        # called once for each size: every call lets other threads take Python's lock
        self._decode_room = lru_cache(maxsize=64)(library.nested_decode_room)
        library.bitstack_add.argtypes = [*[_Size] * 4, *[_Pointer] * 4]
        library.bitstack_add.restype = None
        library.slices_encode.argtypes = [_Size, _Int, _Int, _Size, *[_Pointer] * 5]

    def encode(
        self, parent_type: str, child_type: str, parent: ByteArray, child: ByteArray, n_rest: int
    ) -> Level:
        """Do `nested_ref.split` and pack the streams."""
        kind = TYPES[child_type]
        n = child.nbytes // kind.block_bytes * kind.block
        digits = np.empty((2 * n if child_type in FLOATS else n) + 64, np.uint8)
        gaps, values = np.empty(n // 256 + 64, np.uint16), np.empty(n // 256 + 64, np.int16)
        rest = np.empty(n_rest, np.uint8)
        level = _Level()
        level.digits[0] = digits.ctypes.data
        level.gaps, level.values = gaps.ctypes.data, values.ctypes.data
        level.rest, level.is_plain = rest.ctypes.data, _is_plain()
        failed = self._library.nested_encode(
            TYPES[parent_type].id, kind.id, n, parent.ctypes.data, child.ctypes.data,
            ctypes.byref(level), self._room(self._library.nested_encode_room(kind.id, n)),
        )  # fmt: skip
        assert not failed, f"{parent_type} to {child_type} is not compiled"
        streams, at, patch = [], 0, 0
        for width, count, n_patches in zip(
            level.width[: n_streams(child_type)], level.count, level.n_patches, strict=False
        ):
            end, patch_end = at + digit_bytes(width, count), patch + n_patches
            streams.append(
                Packed(width, count, digits[at:end], gaps[patch:patch_end], values[patch:patch_end])
            )
            at, patch = end, patch_end
        return Level(np.array(level.limits, np.uint32), streams, rest)

    def decode(
        self, parent_type: str, child_type: str, parent: ByteArray, packed: Level, child: ByteArray
    ) -> None:
        """Unpack the streams and do `nested_ref.join` into ``child``, uint8, contiguous."""
        assert child.flags.c_contiguous and child.dtype == np.uint8
        kind = TYPES[child_type]
        n = child.nbytes // kind.block_bytes * kind.block
        keep, level = self._level(packed)
        failed = self._library.nested_decode(
            TYPES[parent_type].id, kind.id, n, parent.ctypes.data, child.ctypes.data,
            ctypes.byref(level), self._room(self._decode_room(kind.id, n)),
        )  # fmt: skip
        del keep
        if failed >= BAD_PATCH:
            raise RefusedError(
                f"a level patches a residual beyond the end of its stream {failed - BAD_PATCH}; "
                "it is corrupt"
            )
        if failed:
            raise RefusedError(
                f"stream {failed - 1} of a level does not have the residuals that its parent "
                "asks for; the level is corrupt or belongs to another parent"
            )

    def add_signed_product(
        self,
        left: F32Array,
        right: F32Array,
        signs: ByteArray,
        out: F32Array,
        *,
        rank: int,
        group: int,
    ) -> None:
        """Add one level to ``out`` ``[rows, cols]``, which is C-contiguous, as all others become.

        Args:
            left: float32 ``[rows, groups * rank]``.
            right: float32 ``[rank, cols]``.
            signs: uint8 ``[rows, ceil(cols / 8)]``.
            out: float32, changed in place.
            rank: Of each group's factors.
            group: Columns of a group.
        """
        assert out.flags.c_contiguous and out.dtype == np.float32
        left, right, signs = map(np.ascontiguousarray, (left, right, signs))
        pointers = (array.ctypes.data for array in (left, right, signs, out))
        self._library.bitstack_add(*out.shape, rank, group, *pointers)

    def slices(
        self, weights: F32Array, importance: F32Array, tries: F32Array, low_bits: int
    ) -> tuple[npt.NDArray[np.int8], F32Array]:
        """Do `slices_ref.encode` for the scales to try; the lower scales come unrounded."""
        n_blocks, size = weights.shape
        arrays = [np.ascontiguousarray(a, np.float32) for a in (weights, importance, tries)]
        codes, scales = np.empty((n_blocks, size), np.int8), np.empty((3, n_blocks), np.float32)
        failed = self._library.slices_encode(
            n_blocks, size, low_bits, len(tries), *(a.ctypes.data for a in arrays),
            codes.ctypes.data, scales.ctypes.data,
        )  # fmt: skip
        assert not failed, f"blocks of {size} with a depth of {low_bits} bits are not compiled"
        return codes, scales

    def _level(self, packed: Level) -> tuple[object, _Level]:
        """The struct, and the arrays that it points to."""
        streams = packed.streams
        gaps = np.concatenate([s.gaps for s in streams], dtype=np.uint16)
        values = np.concatenate([s.values for s in streams], dtype=np.int16)
        rest = np.ascontiguousarray(packed.rest)
        level = _Level(
            tuple(s.digits.__array_interface__["data"][0] for s in streams),
            tuple(s.n_residuals for s in streams),
            tuple(len(s.gaps) for s in streams),
            gaps.ctypes.data, values.ctypes.data, rest.ctypes.data,
            tuple(packed.limits.tolist()),
            tuple(s.width for s in streams),
            _is_plain(),
        )  # fmt: skip
        return (gaps, values, rest, streams), level

    def _room(self, n_bytes: int) -> int:
        """Address of scratch memory that this thread keeps: fresh pages cost as much as the work.

        It is only as large as the largest chunk needs.
        """
        room = getattr(self._thread, "room", None)
        if room is None or room.nbytes < n_bytes:
            room = self._thread.room = np.empty(n_bytes, np.uint8)
        return int(room.ctypes.data)


def _is_plain() -> bool:
    return os.environ.get("EDGEKIT_NO_AVX512") == "1"
