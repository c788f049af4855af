"""Low-rank repair: what quantization lost, as an ordinary llama.cpp adapter.

The error ``E = W - Q(W)`` of a matrix matters where its inputs are. With the inputs' second moment
``G = V diag(l) V^T`` and ``S = V diag(sqrt(l))``, the best correction of rank r is that of ``E S``:

    E S = U diag(s) Z^T,   B = U_r diag(sqrt(s_r)),   A = diag(sqrt(s_r)) Z_r^T S^-1

so that ``y = Q(W) x + B A x`` has the least mean square error over calibration tokens (EoRA, arXiv
2410.21271; from its equation, not its code). Departure: eigenvalues below `FLOOR` of the largest
are raised to it, else ``S^-1`` would amplify directions that no token had.

A pruned layer needs no adapter of its own: after tuning its error is orthogonal to its features, so
a linear map of them can give nothing back. What an adapter repairs is the tier it is stored in.
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from edgekit.arch import Mapping, SourceTensor, map_checkpoint
from edgekit.calibration import calibrate
from edgekit.checkpoint import Checkpoint
from edgekit.errors import UsageError
from edgekit.exporters.gguf import TensorInfo, write_gguf
from edgekit.exporters.gguf_values import Value, f32, string
from edgekit.imatrix import Imatrix
from edgekit.kernels.ggml import dequantize, ggml_type, quantize, type_for
from edgekit.progress import Progress, Silent
from edgekit.pruning.moments import layer_moments
from edgekit.pruning.texts import batches, tokens
from edgekit.spool import replacing

Tensor = Any
F32Array = npt.NDArray[np.float32]

FLOOR = 1e-6  # of the largest eigenvalue
N_TOKENS = 1 << 13


def low_rank(error: Tensor, gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The correction of an error that is best over inputs of second moment ``gram``.

    Args:
        error: ``[rows, cols]``.
        gram: ``E[x x^T]``, ``[cols, cols]``.
        rank: 1 up to the smaller side.

    Returns:
        ``B`` ``[rows, rank]`` and ``A`` ``[rank, cols]``, float64.

    Raises:
        UsageError: ``rank`` is out of range; an adapter of rank 0 ends llama.cpp's process.
    """
    if not 1 <= rank <= min(error.shape):
        raise UsageError(
            f"a repair of rank {rank} is out of range for a matrix of {list(error.shape)}; "
            f"give --repair-rank 1 to {min(error.shape)}"
        )
    values, vectors = torch.linalg.eigh(gram.double())
    least = torch.clamp(FLOOR * values[-1], min=torch.finfo(values.dtype).tiny)
    roots = torch.clamp(values, min=least).sqrt()
    u, s, z = torch.linalg.svd(error.double() @ (vectors * roots), full_matrices=False)
    half = s[:rank].sqrt()
    return u[:, :rank] * half, half[:, None] * ((z[:rank] / roots) @ vectors.T)


def repair(
    folder: Path,
    path: Path,
    tier: str,
    rank: int,
    *,
    text: Path | None = None,
    n_tokens: int = N_TOKENS,
    progress: Progress | None = None,
) -> int:
    """Write an adapter of ``rank`` for the matrices of a checkpoint's layers at ``tier``.

    The error is that of the tier as ``edgekit convert`` writes it, calibrated on the same text.

    Args:
        folder: Of the checkpoint.
        path: Of the adapter, a GGUF that any llama.cpp app loads beside the model.
        tier: ggml type.
        rank: Of every matrix; smaller where a side is smaller.
        text: To calibrate on; ``None`` takes the text that comes with edgekit.
        n_tokens: Of it to take second moments from.
        progress: Told every layer.

    Returns:
        Bytes of the adapter.

    Raises:
        UsageError: ``rank`` is below 1, or ``tier`` is no ggml type.
    """
    if rank < 1:
        raise UsageError(f"a repair of rank {rank} repairs nothing; give --repair-rank 1 or more")
    ggml_type(tier)
    checkpoint, progress = Checkpoint.open(folder), progress or Silent()
    mapping = map_checkpoint(checkpoint)
    imatrix = calibrate(checkpoint, text, mapping=mapping, progress=progress)
    fit, _, _ = tokens(checkpoint, mapping, text, n_tokens)
    progress.start("repair", mapping.hyper.n_layers)
    factors: dict[str, F32Array] = {}
    for index, grams in layer_moments(checkpoint, mapping, batches(fit, mapping)):
        for name, gram in grams.items():
            tensor = next(t for t in mapping.tensors if t.name == name)
            factors |= _factors(tensor, gram, imatrix, tier, rank)
        progress.advance(1)
        del grams, index
    return write_adapter(path, mapping, factors, rank)


def write_adapter(path: Path, mapping: Mapping, factors: dict[str, F32Array], rank: int) -> int:
    """Write factors as float16; the file is there whole or not at all.

    Args:
        path: Of the GGUF.
        mapping: Of the model the adapter is for.
        factors: ``NAME.lora_a`` ``[.., rank, cols]`` and ``NAME.lora_b`` ``[.., rows, rank]``.
        rank: Stored as alpha, so that llama.cpp scales by 1.

    Raises:
        UsageError: A factor has rank 0, which would end llama.cpp's process.
    """
    for name, values in factors.items():
        if 0 in values.shape:
            raise UsageError(f"adapter tensor '{name}' is {list(values.shape)}; no rank may be 0")
    metadata: dict[str, Value] = {
        "general.architecture": string(mapping.architecture),
        "general.type": string("adapter"),
        "adapter.type": string("lora"),
        "adapter.lora.alpha": f32(float(rank)),
    }
    infos = [TensorInfo(name, "F16", values.shape) for name, values in factors.items()]
    data = ([np.ascontiguousarray(values, np.float16)] for values in factors.values())
    with replacing(path) as file:
        return write_gguf(file, metadata, infos, data)


def _factors(
    tensor: SourceTensor, grams: list[Tensor], imatrix: Imatrix, tier: str, rank: int
) -> dict[str, F32Array]:
    """Both factors of a tensor, rows in the order of the GGUF; stacked over experts."""
    n_experts, cols = len(grams), tensor.shape[-1]
    kind, n_rows = type_for(tier, cols), tensor.n_rows // n_experts
    weights = imatrix.weights_for(tensor.name, n_experts, cols)
    a, b = [], []
    for expert, gram in enumerate(grams):
        raw = tensor.rows(expert * n_rows, (expert + 1) * n_rows)
        exact = dequantize(tensor.source_type, raw).reshape(n_rows, cols)
        importance = None if weights is None else weights[expert]
        stored = dequantize(kind, quantize(kind, exact, importance)).reshape(n_rows, cols)
        error = torch.from_numpy(exact - stored)
        left, right = low_rank(error, gram, min(rank, n_rows, cols))
        b.append(left.float().numpy())
        a.append(right.float().numpy())
    if n_experts == 1 and len(tensor.shape) == 2:
        return {f"{tensor.name}.lora_a": a[0], f"{tensor.name}.lora_b": b[0]}
    return {f"{tensor.name}.lora_a": np.stack(a), f"{tensor.name}.lora_b": np.stack(b)}
