"""Compile the kernels for two GPUs without having one; print which instructions they use.

Products of tiles on tensor cores, and rounding of float32 to bfloat16.
"""

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from edgekit.kernels import bitstack_triton, block_triton

LEVELS = {"table": "*i64", "gains": "*fp32", "n_levels": "i32", "group": "i32", "n_groups": "i32"}
SIZES = {"rows": "i32", "cols": "i32"}
PRODUCT = {"x_ptr": "*bf16", "y_ptr": "*fp32", "batch": "i32"}
SLAB = {"out_ptr": "*bf16", "first": "i32", "last": "i32"}
BLOCKS = {"data": "*u8", "row_bytes": "i32"}
PACKED = {"FACTOR": tl.int8, "RANK": 20, "PADDED": 32, "IS_I8": True, "UNIT": 0.0, "BM": 32,
          "BN": 128}  # fmt: skip
TILE = {"BM": 16, "BN": 256}
BATCH = {"BB": 16, "PRECISION": "tf32"}


def ptx(kernel, types, constants, arch):
    """The assembly of a kernel."""
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32)).asm["ptx"]


for arch in (80, 90):
    facts = block_triton._facts("Q4_K")
    products = [
        ptx(bitstack_triton._matmul_kernel, LEVELS | SIZES | PRODUCT, PACKED | BATCH, arch),
        ptx(block_triton._matmul_kernel, BLOCKS | SIZES | PRODUCT, facts | TILE | BATCH, arch),
    ]
    levels = ptx(bitstack_triton._dense_kernel, LEVELS | SIZES | SLAB, PACKED, arch)
    blocks = ptx(block_triton._dense_kernel, BLOCKS | SIZES | SLAB, facts | TILE, arch)
    used = {"mma": [*products, levels], "cvt.rn.bf16": [levels, blocks]}
    print(arch, *(word for word, texts in used.items() if all(word in text for text in texts)))
