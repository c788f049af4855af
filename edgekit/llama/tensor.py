"""The facts of a ``ggml_tensor`` that callbacks see, read without its header.

Name, data and size come from functions of ggml; extents and strides have none that says how they
lie, so their places are found on a tensor made for it and an unknown layout is refused.
"""

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import Any

from edgekit.errors import UnsupportedError
from edgekit.kernels.ggml import library_path

_F32 = 0
_DIMS = 4  # GGML_MAX_DIMS
_PROBE = (5, 3, 2, 7)  # extents of the probe, of which none is another's multiple


class _InitParams(ctypes.Structure):
    """`struct ggml_init_params` of ggml.h."""

    _fields_ = (
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    )


@cache
def ggml() -> Any:
    """libggml-base with the functions that this package calls declared."""
    lib = ctypes.CDLL(str(library_path()))
    pointer = ctypes.c_void_p
    for name, restype, argtypes in (
        ("ggml_get_name", ctypes.c_char_p, [pointer]),
        ("ggml_get_data", pointer, [pointer]),
        ("ggml_nbytes", ctypes.c_size_t, [pointer]),
        ("ggml_tensor_overhead", ctypes.c_size_t, []),
        ("ggml_init", pointer, [_InitParams]),
        ("ggml_free", None, [pointer]),
        ("ggml_new_tensor_4d", pointer, [pointer, ctypes.c_int, *[ctypes.c_int64] * _DIMS]),
        ("ggml_backend_cpu_buffer_type", pointer, []),
        ("ggml_backend_cpu_buffer_from_ptr", pointer, [pointer, ctypes.c_size_t]),
        ("ggml_backend_buft_get_device", pointer, [pointer]),
        ("ggml_backend_buffer_get_base", pointer, [pointer]),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = restype, argtypes
    return lib


@dataclass(frozen=True)
class Layout:
    """Byte offsets of extents and strides, int64 ``[4]`` each, in a tensor."""

    extents: int
    strides: int


@cache
def layout() -> Layout:
    """Where extents and strides lie.

    Raises:
        UnsupportedError: Not where any ggml known to edgekit has them.
    """
    lib = ggml()
    overhead = lib.ggml_tensor_overhead()
    context = lib.ggml_init(_InitParams(4 * overhead, None, True))
    try:
        tensor = lib.ggml_new_tensor_4d(context, _F32, *_PROBE)
        words = (ctypes.c_int64 * 16).from_address(tensor)
        strides = [4]
        for extent in _PROBE[:-1]:
            strides.append(strides[-1] * extent)
        for at in range(16 - 2 * _DIMS + 1):
            if [*words[at : at + 2 * _DIMS]] == [*_PROBE, *strides]:
                return Layout(8 * at, 8 * (at + _DIMS))
    finally:
        lib.ggml_free(context)
    raise UnsupportedError(
        f"{library_path()} lays tensors out in a way this edgekit does not know, so routers "
        "cannot be listened to; install llama-cpp-python 0.3.36, or run with --no-pager"
    )


def name_of(tensor: int) -> str:
    """The tensor's name."""
    return str((ggml().ggml_get_name(tensor) or b"").decode("utf-8", "replace"))


def extents(tensor: int) -> tuple[int, ...]:
    """Extents, fastest first."""
    return tuple((ctypes.c_int64 * _DIMS).from_address(tensor + layout().extents))


def strides(tensor: int) -> tuple[int, ...]:
    """Bytes from one element to the next along each extent."""
    return tuple((ctypes.c_int64 * _DIMS).from_address(tensor + layout().strides))


def data_of(tensor: int) -> int:
    """Address of the first element."""
    return int(ggml().ggml_get_data(tensor) or 0)
