"""ggml's own quantizers, through the libggml-base that llama-cpp-python ships.

Every K- and IQ-block that edgekit writes comes from `ggml_quantize_chunk`, so a tier is what
llama-quantize would have written. ggml checks its arguments with `GGML_ASSERT`, which aborts the
process; everything is checked here first.
"""

import ctypes
import sys
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgekit.errors import RefusedError, UnknownNameError, UnsupportedError, UsageError

F32Array = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class GgmlType:
    """A stored type: ``block`` weights of a row take ``block_bytes`` bytes.

    Attributes:
        name: ggml's name in capitals, as in GGUF files and in llama-quantize.
        id: The number of the type in a GGUF tensor table (`enum ggml_type`).
        block: Weights in a block; a row is whole blocks.
        block_bytes: Bytes of a block.
        needs_imatrix: ggml aborts when it is asked to quantize to this type without an imatrix.
    """

    name: str
    id: int
    block: int
    block_bytes: int
    needs_imatrix: bool = False


TYPES: dict[str, GgmlType] = {
    t.name: t
    for t in (
        GgmlType("F32", 0, 1, 4),
        GgmlType("F16", 1, 1, 2),
        GgmlType("BF16", 30, 1, 2),
        GgmlType("Q4_0", 2, 32, 18),
        GgmlType("Q4_1", 3, 32, 20),
        GgmlType("Q5_0", 6, 32, 22),
        GgmlType("Q5_1", 7, 32, 24),
        GgmlType("Q8_0", 8, 32, 34),
        GgmlType("Q2_K", 10, 256, 84),
        GgmlType("Q3_K", 11, 256, 110),
        GgmlType("Q4_K", 12, 256, 144),
        GgmlType("Q5_K", 13, 256, 176),
        GgmlType("Q6_K", 14, 256, 210),
        GgmlType("IQ1_S", 19, 256, 50, needs_imatrix=True),
        GgmlType("IQ1_M", 29, 256, 56),
        GgmlType("IQ2_XXS", 16, 256, 66, needs_imatrix=True),
        GgmlType("IQ2_XS", 17, 256, 74, needs_imatrix=True),
        GgmlType("IQ2_S", 22, 256, 82),
        GgmlType("IQ3_XXS", 18, 256, 98),
        GgmlType("IQ3_S", 21, 256, 110),
        GgmlType("IQ4_NL", 20, 32, 18),
        GgmlType("IQ4_XS", 23, 256, 136),
        GgmlType("TQ1_0", 34, 256, 54),
        GgmlType("TQ2_0", 35, 256, 66),
        GgmlType("MXFP4", 39, 32, 17),
    )
}

# What llama-quantize takes where the columns are no multiple of the block (`tensor_type_fallback`
# in llama.cpp's src/llama-quant.cpp); F16 follows where even 32 does not divide them.
FALLBACK: dict[str, str] = {
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
    "TQ1_0": "Q4_0",
    "TQ2_0": "Q4_0",
} | {name: "IQ4_NL" for name in TYPES if name.startswith("IQ") and name != "IQ4_NL"}


def ggml_type(name: str) -> GgmlType:
    """Look a type up by its name.

    Raises:
        UnknownNameError: No such type.
    """
    try:
        return TYPES[name]
    except KeyError:
        raise UnknownNameError("ggml type", name, TYPES) from None


def fitting(room: ByteArray | None, n_bytes: int) -> ByteArray:
    """``room`` if it holds ``n_bytes`` and no more than twice as many, else a new one, uint8."""
    if room is not None and n_bytes <= room.nbytes <= 2 * n_bytes:
        return room
    return np.empty(n_bytes, np.uint8)


def row_bytes(type_name: str, cols: int) -> int:
    """Count the bytes of a row of ``cols`` weights.

    Raises:
        UsageError: The row is not whole blocks.
    """
    kind = ggml_type(type_name)
    if cols <= 0 or cols % kind.block:
        raise UsageError(
            f"{kind.name} stores rows in blocks of {kind.block} weights, "
            f"got {cols} columns; type_for('{kind.name}', {cols}) names a type that fits"
        )
    return cols // kind.block * kind.block_bytes


def type_for(tier: str, cols: int) -> str:
    """Name the type that llama-quantize gives rows of ``cols`` weights when asked for ``tier``."""
    if cols % ggml_type(tier).block == 0:
        return tier
    fallback = FALLBACK.get(tier, tier)
    return fallback if cols % TYPES[fallback].block == 0 else "F16"


def quantize(type_name: str, rows: F32Array, imatrix: F32Array | None = None) -> ByteArray:
    """Quantize rows with ggml's quantizer.

    Args:
        type_name: A key of `TYPES`.
        rows: float32 ``[n, cols]``, finite; ``cols`` a multiple of the type's block.
        imatrix: float32 ``[cols]``, importance of each column, or None.

    Returns:
        uint8 ``[n, row_bytes]``, the blocks as a GGUF file holds them.

    Raises:
        UsageError: Shapes do not fit, or the type needs an imatrix and there is none.
        RefusedError: A weight or importance is NaN or infinite, or the type cannot hold them.
    """
    if rows.ndim != 2:
        raise UsageError(f"rows to quantize must be [n, cols], got shape {list(rows.shape)}")
    n, cols = rows.shape
    out = np.empty((n, row_bytes(type_name, cols)), np.uint8)
    kind = ggml_type(type_name)
    weights = _checked_imatrix(kind, imatrix, cols)
    rows = np.ascontiguousarray(rows, np.float32)
    _require_finite(kind, rows)
    if n:
        lib = _library()
        _check_layout(kind)
        lib.ggml_quantize_chunk(
            kind.id, rows.ctypes.data, out.ctypes.data, 0, n, cols,
            None if weights is None else weights.ctypes.data,
        )  # fmt: skip
        if not lib.ggml_validate_row_data(kind.id, out.ctypes.data, out.nbytes):
            raise RefusedError(
                f"{kind.name} cannot hold these weights: its scales overflow float16 "
                f"(largest |weight| is {np.abs(rows).max():.3g}); use tier source"
            )
    return out


def dequantize(type_name: str, blocks: ByteArray) -> F32Array:
    """Turn blocks into weights with ggml's own ``to_float``.

    Args:
        type_name: A key of `TYPES`.
        blocks: uint8 of any shape, whole blocks.

    Returns:
        float32 ``[n_weights]``, flat, in the order of the file.

    Raises:
        UsageError: The bytes are not whole blocks.
    """
    kind = ggml_type(type_name)
    blocks = np.ascontiguousarray(blocks, np.uint8)
    n_blocks, rest = divmod(blocks.nbytes, kind.block_bytes)
    if rest:
        raise UsageError(
            f"{kind.name} blocks have {kind.block_bytes} bytes each, got {blocks.nbytes} bytes"
        )
    if kind.name == "F32":  # ggml has no to_float for it
        return blocks.reshape(-1).view(np.float32).copy()
    out = np.empty(n_blocks * kind.block, np.float32)
    if n_blocks:
        _check_layout(kind).to_float(blocks.ctypes.data, out.ctypes.data, out.size)
    return out


def _checked_imatrix(kind: GgmlType, imatrix: F32Array | None, cols: int) -> F32Array | None:
    if imatrix is None:
        if kind.needs_imatrix:
            raise UsageError(
                f"{kind.name} cannot be quantized without an importance matrix; "
                "calibrate or give --imatrix FILE"
            )
        return None
    if imatrix.shape != (cols,):
        raise UsageError(
            f"an imatrix for rows of {cols} columns needs shape [{cols}], got {list(imatrix.shape)}"
        )
    imatrix = np.ascontiguousarray(imatrix, np.float32)
    if not np.isfinite(imatrix).all() or (imatrix < 0).any():
        raise RefusedError("the imatrix has a value that is negative, NaN or infinite")
    return imatrix


def _require_finite(kind: GgmlType, rows: F32Array) -> None:
    finite = np.isfinite(rows)
    if not finite.all():
        row, col = np.argwhere(~finite)[0]
        raise RefusedError(
            f"row {row}, column {col} is {rows[row, col]}: {kind.name} holds finite weights only"
        )


_ToFloat = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


class _Traits(ctypes.Structure):
    """The head of `struct ggml_type_traits` in ggml.h."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", _ToFloat),
    )


@cache
def _check_layout(kind: GgmlType) -> _Traits:
    """Refuse a library whose idea of the type, or of its own struct, is not ours."""
    traits: _Traits = _library().ggml_get_type_traits(kind.id).contents
    theirs = (traits.blck_size, traits.type_size)
    name = (traits.type_name or b"").decode(errors="replace")
    if theirs != (kind.block, kind.block_bytes) or name.upper() != kind.name:
        raise UnsupportedError(
            f"{library_path()} describes type {kind.id} as '{name}' with {theirs[0]} weights in "
            f"{theirs[1]} bytes, expected {kind.name} with {kind.block} in {kind.block_bytes}; "
            "install llama-cpp-python >= 0.3.36"
        )
    return traits


@cache
def library_path() -> Path:
    """Find libggml-base beside llama_cpp, without importing llama_cpp.

    Raises:
        UnsupportedError: llama-cpp-python is not installed, or has no libggml-base.
    """
    spec = find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        raise UnsupportedError("llama-cpp-python is not installed; pip install llama-cpp-python")
    folder = Path(spec.submodule_search_locations[0]) / "lib"
    name = {"win32": "ggml-base.dll", "darwin": "libggml-base.dylib"}.get(
        sys.platform, "libggml-base.so"
    )
    if not (folder / name).exists():
        raise UnsupportedError(
            f"{folder} has no {name}; reinstall llama-cpp-python with its default build"
        )
    return folder / name


@cache
def _library() -> ctypes.CDLL:
    lib = ctypes.CDLL(str(library_path()))
    pointer, i64 = ctypes.c_void_p, ctypes.c_int64
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    lib.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, i64, i64, i64, pointer]
    lib.ggml_validate_row_data.restype = ctypes.c_bool
    lib.ggml_validate_row_data.argtypes = [ctypes.c_int, pointer, ctypes.c_size_t]
    lib.ggml_get_type_traits.restype = ctypes.POINTER(_Traits)
    lib.ggml_get_type_traits.argtypes = [ctypes.c_int]
    return lib
