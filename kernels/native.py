"""The compiled kernels: found beside this file, loaded with ctypes, or absent.

`setup.py` compiles them at installation where there is a C compiler. Without them the numpy
references run, which give the same bytes some fifty times slower; so does EDGEKIT_NO_NATIVE=1.
"""

import ctypes
import logging
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

from edgekit.errors import RefusedError
from edgekit.kernels.ggml import TYPES, ByteArray
from edgekit.kernels.nested_ref import CODE_STREAMS, FLOAT_STREAMS, FLOATS, I16Array, Parts
from edgekit.kernels.packing_ref import FARTHEST, PATCHED_SHARE, Packed, digit_bytes

ABI = 1  # as in nested.c: a library left over from other sources is not used
_Pointer, _Size, _Int = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int


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
        "edgekit's compiled codec is missing: tensors are coded some fifty times slower; "
        "install a C compiler and reinstall edgekit"
    )
    return None


class Native:
    """The functions of nested.c and packing.c, with numpy arrays in and out."""

    def __init__(self, library: ctypes.CDLL) -> None:
        """Declare the functions of a loaded library."""
        self._library = library
        for name in ("split_codes", "split_float", "join_codes", "join_float"):
            getattr(library, f"nested_{name}").argtypes = [_Int, _Int, _Size, *[_Pointer] * 6]
        library.packing_outside.argtypes = [_Pointer, _Size, _Pointer]
        library.packing_outside.restype = None
        library.packing_pack.argtypes = [
            _Pointer, _Size, _Int, _Pointer, _Pointer, _Pointer, _Size, _Int,
        ]  # fmt: skip
        library.packing_pack.restype = _Size
        library.packing_unpack.argtypes = [
            _Pointer, _Size, _Int, _Pointer, _Pointer, _Size, _Pointer,
        ]  # fmt: skip

    def split(
        self, parent_type: str, child_type: str, parent: ByteArray, child: ByteArray, n_rest: int
    ) -> Parts:
        """Do `nested_ref.split`."""
        n = child.nbytes // TYPES[child_type].block_bytes * TYPES[child_type].block
        n_streams = FLOAT_STREAMS if child_type in FLOATS else CODE_STREAMS
        room = np.empty((n_streams, n + 16), np.int16)  # touched only where residuals go
        counts, limits = np.zeros(n_streams, np.uintp), np.zeros(3, np.uint32)
        rest = np.empty(n_rest, np.uint8)
        starts = _pointers(list(room))
        lib = self._library
        split = lib.nested_split_float if child_type in FLOATS else lib.nested_split_codes
        failed = split(
            TYPES[parent_type].id, TYPES[child_type].id, n, parent.ctypes.data, child.ctypes.data,
            limits.ctypes.data, starts, counts.ctypes.data, rest.ctypes.data,
        )  # fmt: skip
        assert not failed, f"{parent_type} to {child_type} is not compiled"
        streams = [r[:c] for r, c in zip(room, counts.tolist(), strict=True)]
        return Parts(limits, streams, rest)

    def join(
        self, parent_type: str, child_type: str, parent: ByteArray, parts: Parts, n: int
    ) -> ByteArray:
        """Do `nested_ref.join`."""
        kind = TYPES[child_type]
        child = np.empty(n // kind.block * kind.block_bytes, np.uint8)
        counts = np.array([len(s) for s in parts.streams], np.uintp)
        rest = np.ascontiguousarray(parts.rest)
        streams = [np.ascontiguousarray(s, np.int16) for s in parts.streams]
        lib = self._library
        join = lib.nested_join_float if child_type in FLOATS else lib.nested_join_codes
        failed = join(
            TYPES[parent_type].id, kind.id, n, parent.ctypes.data, child.ctypes.data,
            parts.limits.ctypes.data, _pointers(streams), counts.ctypes.data, rest.ctypes.data,
        )  # fmt: skip
        if failed:
            raise RefusedError(
                f"stream {failed - 1} of a level does not have the residuals that its parent "
                "asks for; the level is corrupt or belongs to another parent"
            )
        return child

    def pack(self, residuals: I16Array) -> Packed:
        """Do `packing_ref.pack` at the width of `packing_ref.choose_width`."""
        n = len(residuals)
        outside = np.zeros(3, np.uintp)
        self._library.packing_outside(residuals.ctypes.data, n, outside.ctypes.data)
        n_outside = dict(zip((2, 4, 8), outside.tolist(), strict=True)) | {16: 0}
        width = next(w for w, count in n_outside.items() if PATCHED_SHARE * count <= n)
        digits = np.empty(digit_bytes(width, n), np.uint8)
        room = n_outside[width] + n // FARTHEST
        gaps, values = np.empty(room, np.uint16), np.empty(room, np.int16)
        n_patches = self._library.packing_pack(
            residuals.ctypes.data, n, width, digits.ctypes.data,
            gaps.ctypes.data, values.ctypes.data, room, n_outside[width] > 0,
        )  # fmt: skip
        return Packed(width, n, digits, gaps[:n_patches], values[:n_patches])

    def unpack(self, packed: Packed) -> I16Array:
        """Do `packing_ref.unpack`."""
        residuals = np.empty(packed.count, np.int16)
        gaps = np.ascontiguousarray(packed.gaps)
        values = np.ascontiguousarray(packed.values)
        failed = self._library.packing_unpack(
            packed.digits.ctypes.data, packed.count, packed.width,
            gaps.ctypes.data, values.ctypes.data, len(gaps), residuals.ctypes.data,
        )  # fmt: skip
        if failed:
            raise RefusedError(
                f"a level patches a residual beyond a stream of {packed.count}; it is corrupt"
            )
        return residuals


def _pointers(arrays: Sequence[I16Array]) -> ctypes.Array[ctypes.c_void_p]:
    return (_Pointer * len(arrays))(*(a.ctypes.data for a in arrays))
