"""Tiny checkpoints of every architecture as artifacts, with an importance matrix of random numbers.

The matrix is written by gguf's own writer, as llama-imatrix writes it, and turned into weights
here as llama-quantize does, so the oracles see none of our code.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from models import add_tokenizer, make_checkpoint

from edgekit.arch import map_checkpoint
from edgekit.checkpoint import Checkpoint
from edgekit.convert import convert
from edgekit.convert_options import DEFAULT_TIERS, Options
from edgekit.progress import Silent

F32Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Converted:
    """A checkpoint, its artifact, and what llama-quantize would weigh columns with."""

    checkpoint: Path
    artifact: Path
    weights: dict[str, F32Array] | None = None


def unmeasured(tiers: tuple[str, ...] = DEFAULT_TIERS, **options: Any) -> Options:
    return Options(tiers=tiers, measure=False, jobs=2, **options)


def plain(checkpoint: Path, artifact: Path, tiers: tuple[str, ...] = DEFAULT_TIERS) -> Converted:
    """Convert without statistics."""
    convert(checkpoint, artifact, unmeasured(tiers, statistics=False), Silent())
    return Converted(checkpoint, artifact)


def weighted(checkpoint: Path, artifact: Path, tiers: tuple[str, ...] = DEFAULT_TIERS) -> Converted:
    """Convert with random statistics of every matrix that llama-imatrix would see."""
    matrices = dict(layer_matrices(checkpoint))
    path = artifact.with_name(f"{artifact.name}.imatrix.gguf")
    weights = write_random_imatrix(path, matrices)
    convert(checkpoint, artifact, unmeasured(tiers, imatrix=path), Silent())
    return Converted(checkpoint, artifact, weights)


def layer_matrices(checkpoint: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and numpy shape of every matrix of a block."""
    for tensor in map_checkpoint(Checkpoint.open(checkpoint)).tensors:
        if tensor.name.startswith("blk.") and len(tensor.shape) > 1:
            yield tensor.name, tensor.shape


def write_random_imatrix(path: Path, matrices: dict[str, tuple[int, ...]]) -> dict[str, F32Array]:
    """Write statistics for ``matrices``; return the mean squares, float32 ``[experts, cols]``."""
    random = np.random.default_rng(7)
    writer = gguf.GGUFWriter(path, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["random"])
    writer.add_uint32("imatrix.chunk_count", 3)
    writer.add_uint32("imatrix.chunk_size", 512)
    weights = {}
    for name, shape in matrices.items():
        experts = shape[0] if len(shape) == 3 else 1
        sums = random.gamma(0.5, 100.0, (experts, shape[-1])).astype(np.float32)
        counts = random.integers(1, 2000, (experts, 1)).astype(np.float32)
        writer.add_tensor(f"{name}.in_sum2", sums)
        writer.add_tensor(f"{name}.counts", counts)
        weights[name] = sums / counts
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def tiny(folder: Path, model_type: str = "llama", **options: Any) -> Path:
    """A random-weight checkpoint with a tokenizer; options as for `models.make_checkpoint`."""
    return add_tokenizer(make_checkpoint(model_type, folder, **options))
