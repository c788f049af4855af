"""llama.cpp's own quantizer, through the C API of llama-cpp-python: the oracle of many tests."""

import ctypes
import os
from collections.abc import Mapping
from pathlib import Path

import llama_cpp
import numpy as np
import numpy.typing as npt

Weights = Mapping[str, npt.NDArray[np.float32]]


def quantize(
    source: Path, target: Path, ftype: str, *, weights: Weights | None = None, pure: bool = True
) -> Path:
    """Quantize to ``ftype`` ("Q4_K_M") with ``weights``: name -> float32 ``[experts, cols]``."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{ftype}")
    params.nthread, params.pure = 1, pure
    data = _imatrix_data(weights or {})
    if weights is not None:
        params.imatrix = data
    status = llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), params)
    assert status == 0, f"llama_model_quantize to {ftype} failed"
    return target


def _imatrix_data(weights: Weights) -> "ctypes.Array[ctypes.Structure]":
    rows = (llama_cpp.llama_model_imatrix_data * (len(weights) + 1))()  # the last stays NULL
    for row, (name, values) in zip(rows, weights.items(), strict=False):
        flat = np.ascontiguousarray(values, np.float32).reshape(-1)
        row.name, row.size = name.encode(), flat.size
        row.data = (ctypes.c_float * flat.size)(*flat)
    return rows
