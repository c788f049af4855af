"""Codec `nested`: every tier quantized on its own by ggml, every level against the tier below."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from edgekit.codecs.chunks import frame, row_ranges, split_frames
from edgekit.codecs.job import (
    Chunk,
    Codec,
    InOrder,
    Job,
    Opened,
    Source,
    base_blocks,
    finite_rows,
    n_experts_of,
    n_rows_of,
    rounded,
)
from edgekit.codecs.nested import CHILDREN, decode_chunk, encode_chunk
from edgekit.errors import UnknownNameError, UsageError
from edgekit.kernels.ggml import (
    TYPES,
    ByteArray,
    dequantize,
    fitting,
    quantize,
    row_bytes,
    type_for,
)
from edgekit.spool import TensorRecord
from edgekit.stack import SOURCE, Level, Stack

TIERS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0", SOURCE)
SIZE_BOUND = 1.02  # an artifact takes 0.94 to 0.97 of a BF16 checkpoint
LOSS_WEIGHTS = 1 << 16  # of a chunk; losses from all of it cost 4 % of the quantizers' own time


def check_tiers(tiers: Sequence[str]) -> None:
    """Check that ``tiers`` are a chain that the codec can build.

    Raises:
        UsageError: A tier is unknown, stands twice, is out of order, or cannot follow another.
    """
    for tier in tiers:
        if not is_tier(tier):
            raise UnknownNameError("tier", tier, [*TYPES, SOURCE])
    if not tiers or len(set(tiers)) != len(tiers) or SOURCE in tiers[:-1]:
        raise UsageError(f"tiers {','.join(tiers)}: name each tier once, lowest first, source last")
    for tier in tiers[1:]:
        if tier != SOURCE and tier not in CHILDREN:
            raise UsageError(
                f"tier {tier} can only come first in a chain; tiers above another: "
                f"{', '.join(CHILDREN)}"
            )
    bits = [row_bytes(tier, 256) for tier in tiers if tier != SOURCE]
    if bits != sorted(bits):
        raise UsageError(f"tiers {','.join(tiers)}: order them from few bits to many")


def is_tier(name: str) -> bool:
    """Whether ``name`` is a ggml type or ``source``."""
    return name in TYPES or name == SOURCE


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


@dataclass(frozen=True)
class _Encoded:
    """One chunk: a blob per level, weighted square errors per tier, and that of having none."""

    blobs: list[bytes]
    errors: npt.NDArray[np.float64]
    energy: float


def encode(source: Source, job: Job, file: BinaryIO, in_order: InOrder) -> TensorRecord:
    """Write all levels of ``source`` to ``file``, chunk after chunk; see `Codec.encode`."""
    chain = chain_of(source, job.tiers, job.imatrix is not None)
    rows = n_rows_of(source)
    ranges = row_ranges(rows, source.shape[-1], job.chunk_weights)
    tasks = (
        partial(
            _encode_chunk, source, job, chain, expert, expert * rows + start, expert * rows + stop
        )
        for expert in range(n_experts_of(source))
        for start, stop in ranges
    )
    sizes: list[tuple[int, ...]] = []
    errors, energy = np.zeros(len(chain)), 0.0
    for chunk in in_order(tasks):
        file.writelines(chunk.blobs)
        sizes.append(tuple(len(blob) for blob in chunk.blobs))
        errors, energy = errors + chunk.errors, energy + chunk.energy
    per_expert = tuple(tuple(sizes[i : i + len(ranges)]) for i in range(0, len(sizes), len(ranges)))
    losses = rounded(job.sensitivity.losses(errors, energy))
    return TensorRecord(source.name, chain, losses, per_expert, ("",) * len(chain))


def _encode_chunk(
    source: Source, job: Job, chain: tuple[str, ...], expert: int, start: int, stop: int
) -> _Encoded:
    raw, weights = finite_rows(source, start, stop)
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
            blobs.append(frame(encode_chunk(below[0], kind, below[1], blocks)))
        if tier != SOURCE:
            kept = dequantize(kind, blocks.reshape(len(weights), -1)[sample])
            wanted = weights[sample]
            errors[i] = weighted(kept.reshape(wanted.shape) - wanted)
        below = kind, blocks
    return _Encoded(blobs, errors, weighted(weights[sample]))


def gives(stack: Stack, level: Level) -> bool:
    """Whether the codec leads to the level's type."""
    return not level.type and stack.type_at(level.tier) in CHILDREN


def open_part(part: memoryview, stack: Stack, depth: int, n_chunks: int) -> list[memoryview]:
    """The payloads of a part's chunks."""
    return split_frames(part, n_chunks)


def decode(chunk: Chunk, opened: Opened, out: ByteArray) -> None:
    """Lift the chunk's base blocks level by level; see `Codec.decode`."""
    blocks, stack = base_blocks(chunk, opened), chunk.stack
    if chunk.depth == 1:
        out[:] = blocks
    for depth in range(1, chunk.depth):
        payloads = opened(depth)
        assert isinstance(payloads, list)
        parent, child = (stack.type_at(level.tier) for level in stack.levels[depth - 1 : depth + 1])
        room = out if depth == chunk.depth - 1 else _room(depth % 2, chunk.rows_bytes(child))
        blocks = decode_chunk(parent, child, blocks, payloads[chunk.index], chunk.n_weights, room)


_thread = threading.local()


def _room(which: int, n_bytes: int) -> ByteArray:
    """Memory for the blocks of a tier on the way, one of two that this thread keeps.

    Fresh pages for every chunk would take a fifth of the time of loading.
    """
    rooms: list[ByteArray | None] = _thread.__dict__.setdefault("rooms", [None, None])
    room = rooms[which] = fitting(rooms[which], n_bytes)
    return room[:n_bytes]


NESTED = Codec(
    tiers=TIERS,
    is_tier=is_tier,
    check_tiers=check_tiers,
    chain_of=chain_of,
    expected_type=lambda tier, cols: tier,
    size_bound=lambda tiers: SIZE_BOUND,
    encode=encode,
    tensors_at_once=2,
    gives=gives,
    open=open_part,
    decode=decode,
    held=lambda stack, depth: (),
)
