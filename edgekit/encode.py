"""Encode one tensor: every tier quantized on its own by ggml, every level against the tier below.

Chunks are independent, so worker threads take them (ggml, the codec and zstandard release the
interpreter lock); they are written in order, so the result does not depend on the number of
threads.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import BinaryIO, Protocol

import numpy as np
import numpy.typing as npt

from edgekit.codecs import CODECS
from edgekit.codecs.chunks import frame, row_ranges
from edgekit.errors import RefusedError, UsageError
from edgekit.kernels.ggml import TYPES, dequantize, quantize, row_bytes, type_for
from edgekit.sensitivity import Sensitivity
from edgekit.spool import TensorRecord
from edgekit.stack import SOURCE

LOSS_WEIGHTS = 1 << 16  # of a chunk; losses from all of it cost 4 % of the quantizers' own time

ByteArray = npt.NDArray[np.uint8]
F32Array = npt.NDArray[np.float32]


class Source(Protocol):
    """A tensor of a checkpoint as `edgekit.arch` maps it."""

    @property
    def name(self) -> str:
        """GGUF name."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Numpy order."""

    @property
    def source_type(self) -> str:
        """ggml type of the source tier."""

    @property
    def quantizable(self) -> bool:
        """Whether llama-quantize would quantize it."""

    def rows(self, start: int, stop: int) -> ByteArray:
        """Raw rows ``[start, stop)``, flat over experts, uint8 ``[n, row_bytes]``."""


@dataclass(frozen=True)
class Job:
    """How to encode a tensor.

    Attributes:
        tiers: Tiers asked for, lowest first, ``source`` last or absent.
        codec: Key of `CODECS`.
        chunk_weights: Upper bound of weights in a chunk.
        imatrix: float32 ``[experts, cols]``, mean square of each input column, or ``None``.
        sensitivity: What errors of the tensor cost.
    """

    tiers: tuple[str, ...]
    codec: str
    chunk_weights: int
    imatrix: F32Array | None
    sensitivity: Sensitivity


@dataclass(frozen=True)
class _Chunk:
    blobs: list[bytes]  # one per level
    errors: npt.NDArray[np.float64]  # weighted square error at each tier
    energy: float  # weighted square of the weights: the error of having none


def chain_of(source: Source, tiers: Sequence[str], has_weights: bool = True) -> tuple[str, ...]:
    """The tiers of one tensor: the asked ones, or llama-quantize's fallbacks for narrow rows.

    Without weights for its columns a tensor leaves out the tiers that ggml cannot do without.

    Raises:
        UsageError: That leaves none.
    """
    if not source.quantizable:
        return (SOURCE,)
    cols = source.shape[-1]
    types = [tier if tier == SOURCE else type_for(tier, cols) for tier in tiers]
    chain = dict.fromkeys(SOURCE if kind == source.source_type else kind for kind in types)
    kept = [t for t in chain if t != SOURCE and (has_weights or not TYPES[t].needs_imatrix)]
    if not kept and SOURCE not in chain:
        raise UsageError(
            f"the importance matrix has nothing on {source.name}, and {', '.join(chain)} cannot do "
            "without; add a tier above it"
        )
    kept.sort(key=lambda kind: row_bytes(kind, cols))  # fallbacks may come in another order
    return (*kept, SOURCE) if SOURCE in chain else tuple(kept)


def encode_tensor(
    source: Source, job: Job, file: BinaryIO, pool: Executor, ahead: int
) -> TensorRecord:
    """Write all levels of ``source`` to ``file``, chunk after chunk.

    Args:
        source: The tensor.
        job: Tiers, codec and importance of columns.
        file: Open for writing, at its start.
        pool: Runs the chunks.
        ahead: Chunks in flight; bounds memory.

    Raises:
        RefusedError: A weight is NaN or infinite.
    """
    chain = chain_of(source, job.tiers, job.imatrix is not None)
    n_experts = source.shape[0] if len(source.shape) == 3 else 1
    rows = int(np.prod(source.shape[:-1])) // n_experts
    ranges = row_ranges(rows, source.shape[-1], job.chunk_weights)
    tasks = (
        partial(
            _encode_chunk, source, job, chain, expert, expert * rows + start, expert * rows + stop
        )
        for expert in range(n_experts)
        for start, stop in ranges
    )
    sizes: list[tuple[int, ...]] = []
    errors, energy = np.zeros(len(chain)), 0.0
    for chunk in _in_order(pool, tasks, ahead):
        for blob in chunk.blobs:
            file.write(blob)
        sizes.append(tuple(len(blob) for blob in chunk.blobs))
        errors, energy = errors + chunk.errors, energy + chunk.energy
    per_expert = tuple(tuple(sizes[i : i + len(ranges)]) for i in range(0, len(sizes), len(ranges)))
    losses = tuple(float(f"{loss:.6g}") for loss in job.sensitivity.losses(errors, energy))
    return TensorRecord(source.name, chain, losses, per_expert)


def _in_order(pool: Executor, tasks: Iterable[partial[_Chunk]], ahead: int) -> Iterator[_Chunk]:
    todo = iter(tasks)
    running: deque[Future[_Chunk]] = deque(pool.submit(task) for task in islice(todo, ahead))
    try:
        while running:
            chunk = running.popleft().result()
            running.extend(pool.submit(task) for task in islice(todo, 1))
            yield chunk
    finally:
        for future in running:
            future.cancel()


def _encode_chunk(
    source: Source, job: Job, chain: tuple[str, ...], expert: int, start: int, stop: int
) -> _Chunk:
    raw = source.rows(start, stop)
    weights = dequantize(source.source_type, raw).reshape(stop - start, -1)
    if not np.isfinite(weights).all():
        rows = start + np.flatnonzero(~np.isfinite(weights).all(axis=1))
        told = f"row {rows[0]}" if len(rows) == 1 else f"rows {rows[0]} to {rows[-1]}"
        raise RefusedError(
            f"tensor {source.name} has NaN or infinite weights in {told}; repair the checkpoint"
        )
    importance = None if job.imatrix is None else job.imatrix[expert]
    sample = slice(None, None, -(-weights.size // LOSS_WEIGHTS))  # rows the losses are taken from
    weighted = job.sensitivity.weighing(expert, start, stop, sample)
    blobs, errors, below = [], np.zeros(len(chain)), None
    for i, tier in enumerate(chain):
        kind = source.source_type if tier == SOURCE else tier
        blocks = (
            raw.reshape(-1) if tier == SOURCE else quantize(kind, weights, importance).reshape(-1)
        )
        if below is None:
            blobs.append(blocks.tobytes())
        else:
            blobs.append(frame(CODECS[job.codec].encode_chunk(below[0], kind, below[1], blocks)))
        if tier != SOURCE:
            kept = dequantize(kind, blocks.reshape(len(weights), -1)[sample])
            wanted = weights[sample]
            errors[i] = weighted(kept.reshape(wanted.shape) - wanted)
        below = kind, blocks
    return _Chunk(blobs, errors, weighted(weights[sample]))
