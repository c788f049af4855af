"""Products of ggml's blocks with a vector or a small batch, and their dense tiles, on a GPU.

Any type of `blocks.LAYOUTS`: the planes of its codes are compiled in, its scales are read by one
small function per family of types. Bytes read per weight are those of the blocks.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from edgekit.kernels import blocks
from edgekit.kernels.bitstack_matmul import by_batch
from edgekit.kernels.ggml import TYPES, dequantize

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, eq=False)
class PackedBlocks:
    """A matrix in a type of ggml.

    Attributes:
        type_name: A key of `ggml.TYPES`.
        data: uint8 ``[rows, row_bytes]``.
    """

    type_name: str
    data: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        kind = TYPES[self.type_name]
        return self.data.shape[0], self.data.shape[1] // kind.block_bytes * kind.block


def dense_ref(matrix: PackedBlocks, dtype: torch.dtype) -> Tensor:
    """The definition: the weight, ``[rows, cols]``; through numpy, whatever the device."""
    if matrix.type_name in FLOATS:
        return matrix.data.view(FLOATS[matrix.type_name]).to(dtype)
    data, name = matrix.data.cpu().numpy(), matrix.type_name
    values = blocks.weights(name, data) if name in blocks.LAYOUTS else dequantize(name, data)
    return torch.from_numpy(values).reshape(matrix.shape).to(matrix.data.device, dtype)


def matmul_ref(matrix: PackedBlocks, x: Tensor) -> Tensor:
    """The definition of `matmul`: the dense weight, then the product, all in the type of ``x``."""
    return x @ dense_ref(matrix, x.dtype).T


def matmul(matrix: PackedBlocks, x: Tensor) -> Tensor:
    """Multiply ``x`` with the transposed weight that blocks hold.

    Args:
        matrix: On the device of ``x``.
        x: float ``[..., cols]``.

    Returns:
        ``[..., rows]`` in the type of ``x``; sums are float32.
    """
    if not x.is_cuda or matrix.type_name not in blocks.LAYOUTS:
        return matmul_ref(matrix, x)
    from edgekit.kernels.block_triton import launch_dense, launch_matmul

    fused, dense = partial(launch_matmul, matrix), partial(launch_dense, matrix, x.dtype)
    return by_batch(x, matrix.shape[0], fused, dense)
