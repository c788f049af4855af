"""Codec `bitstack`: signs times small factors, level upon level, and a stock type for llama.cpp.

Level 0 is a plain stock type, the base. Above it stand the levels of one of two ladders:

- ``B1, B2, ...`` are BitStack's: the first takes the weights, each next one what is left of them
  (arXiv 2410.23918). The base is a model of its own, for readers of GGUF files and for artifacts
  that were cut; ``B`` levels do without it.
- ``R1, R2, ...`` take what the base leaves of the weights, which is more even than weights are, so
  that a sign says more: docs/bitstack.md has how much more.

A level's bytes are those of `edgekit.kernels.bitstack_level`. For llama.cpp a depth becomes, tensor
by tensor, the cheapest stock type whose error raises the total by no more than `SHARE`; the level
says which. ggml quantizes to it without an importance matrix when the depth is decoded.

``source`` is the last level or absent: what the levels leave, as the codec `nested` codes it.
"""

import re
from collections.abc import Iterator, Sequence
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
from edgekit.kernels import bitstack_level
from edgekit.kernels.bitstack_rows import add_levels
from edgekit.kernels.blocks import LAYOUTS
from edgekit.kernels.blocks import weights as weights_of
from edgekit.kernels.decompose import Settings, decompose
from edgekit.kernels.ggml import (
    TYPES,
    ByteArray,
    F32Array,
    dequantize,
    quantize,
    row_bytes,
    type_for,
)
from edgekit.spool import TensorRecord
from edgekit.stack import SOURCE, Level, Stack

F64Array = npt.NDArray[np.float64]

MAX_LEVELS = 16  # the paper's
BASE = "Q2_K"
TIERS = (BASE, *(f"B{i}" for i in range(1, 9)), SOURCE)
STEP = re.compile(r"([BR])([1-9]\d?)")
SHARE = 0.1  # a stock type may add this share of the error that a depth has anyway
LADDER = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
LOSS_WEIGHTS = 1 << 18  # of a tensor, that losses are taken from
SEARCH_WEIGHTS = 1 << 18  # of a tensor, that the exponent is searched on
EXPONENTS = (1.0, 0.75, 0.5, 0.25, 0.0)  # the first is the paper's, and taken where all are equal
SEARCH_LEVELS = 3
LEAST_WEIGHT = 1e-4  # of the mean; weights are divided by
# What levels of the samples most often become; half of it is known only when it is quantized.
EXPECTED = {"B": ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q5_K", "Q6_K"),
            "R": ("Q3_K", "Q5_K", "Q6_K", "Q8_0")}  # fmt: skip


def is_tier(name: str) -> bool:
    """Whether ``name`` is a base, a step of a ladder or ``source``."""
    return name in TYPES or name == SOURCE or _step(name) is not None


def _step(name: str) -> tuple[str, int] | None:
    """The ladder and the number of a step; ``None`` for another tier."""
    match = STEP.fullmatch(name)
    return (match[1], int(match[2])) if match and int(match[2]) <= MAX_LEVELS else None


def check_tiers(tiers: Sequence[str]) -> None:
    """Check that ``tiers`` are a base, steps of one ladder from its first, perhaps ``source``.

    Raises:
        UsageError: They are something else.
    """
    for tier in tiers:
        if not is_tier(tier):
            raise UnknownNameError("tier", tier, [*TYPES, *TIERS])
    steps = [_step(tier) for tier in tiers if tier not in TYPES and tier != SOURCE]
    ladder = steps[0][0] if steps and steps[0] else "B"
    names = [f"{ladder}{i + 1}" for i in range(len(steps))]
    if ladder == "R" and tiers[0] not in LAYOUTS:
        raise UsageError(f"R1 and on can stand on {', '.join(LAYOUTS)}, not on {tiers[0]}")
    if list(tiers) not in ([*tiers[:1], *names], [*tiers[:1], *names, SOURCE]) or not (
        steps and tiers[0] in TYPES
    ):
        raise UsageError(
            f"tiers {','.join(tiers)}: bitstack takes a base of a stock type, then B1,B2,... or "
            f"R1,R2,... up to {MAX_LEVELS}, then source or nothing; such as Q2_K,R1,R2,R3"
        )


def chain_of(source: Source, tiers: Sequence[str], has_weights: bool = True) -> tuple[str, ...]:
    """The tiers of one tensor: those asked for, on the base that suits its width.

    Without weights for its columns a base that ggml cannot do without becomes `BASE`.
    """
    if not source.quantizable:
        return (SOURCE,)
    cols = source.shape[-1]
    base = type_for(tiers[0], cols)
    if TYPES[base].needs_imatrix and not has_weights:
        base = type_for(BASE, cols)
    if base == source.source_type:  # nothing is smaller: rows that no block divides
        return (SOURCE,)
    return (base, *tiers[1:])


def expected_type(tier: str, cols: int) -> str:
    """The type that rows of ``cols`` weights most often have at ``tier`` on the samples."""
    step = _step(tier)
    if step is None:
        return tier
    row = EXPECTED[step[0]]
    return type_for(row[min(step[1], len(row)) - 1], cols)


def size_bound(tiers: Sequence[str]) -> float:
    """Most bytes of an artifact over those of a BF16 checkpoint."""
    base = 8 * TYPES[tiers[0]].block_bytes / TYPES[tiers[0]].block
    return (base + 1.7 * (len(tiers) - 1) + (8 if SOURCE in tiers else 0)) / 16


def encode(source: Source, job: Job, file: BinaryIO, in_order: InOrder) -> TensorRecord:
    """Write all levels of ``source`` to ``file``, expert after expert; see `Codec.encode`.

    Each expert is one chunk, and runs on the calling thread.
    """
    chain = chain_of(source, job.tiers, job.imatrix is not None)
    n_experts, kinds = n_experts_of(source), _kinds(source)
    steps = [tier for tier in chain if _step(tier)]
    totals = np.zeros((1 + len(steps), 1 + len(kinds)))  # of the base and each step, as each type
    sizes, energy = [], 0.0
    for expert in range(n_experts):
        work = _Expert(source, job, chain, expert, LOSS_WEIGHTS // n_experts)
        here = []
        for blob in work.blobs(totals, kinds):
            file.write(blob)
            here.append(len(blob))
        sizes.append((tuple(here),))
        energy += work.energy
    if not steps:
        return TensorRecord(source.name, chain, (0.0,), tuple(sizes), ("",))
    chosen = [_cheapest(row, kinds) for row in totals[1:]]
    errors = [
        totals[0, 0],
        *(row[1 + kinds.index(k)] for row, k in zip(totals[1:], chosen, strict=True)),
    ]
    losses = rounded(job.sensitivity.losses(np.array(errors), energy))
    n_rest = int(chain[-1] == SOURCE)
    types = ("", *chosen, *("",) * n_rest)
    return TensorRecord(source.name, chain, losses + (0.0,) * n_rest, tuple(sizes), types)


def _kinds(source: Source) -> list[str]:
    """Types that a depth may become, cheapest first, the source's own last."""
    cols = source.shape[-1]
    kinds = dict.fromkeys(type_for(kind, cols) for kind in LADDER)
    kinds.pop(source.source_type, None)
    return [*sorted(kinds, key=lambda kind: row_bytes(kind, cols)), source.source_type]


def _cheapest(errors: F64Array, kinds: list[str]) -> str:
    """The first type with at most `SHARE` more error than the levels alone; else the best."""
    as_kind = errors[1:]
    enough = np.flatnonzero(as_kind <= (1 + SHARE) * errors[0])
    return kinds[int(enough[0]) if len(enough) else int(np.argmin(as_kind))]


class _Expert:
    """One matrix on its way into levels."""

    def __init__(
        self, source: Source, job: Job, chain: tuple[str, ...], expert: int, n_sampled: int
    ) -> None:
        rows = n_rows_of(source)
        self.source, self.job, self.chain, self.expert = source, job, chain, expert
        self.start, self.stop = expert * rows, (expert + 1) * rows
        self.raw, self.weights = finite_rows(source, self.start, self.stop)
        step = max(1, -(-self.weights.size // max(n_sampled, 8 * self.weights.shape[1])))
        self.sample = slice(None, None, step)
        self.wanted = self.weights[self.sample].copy()
        self.weighted = job.sensitivity.weighing(expert, self.start, self.stop, self.sample)
        self.energy = self.weighted(self.wanted)

    def blobs(self, totals: F64Array, kinds: list[str]) -> Iterator[bytes]:
        """The bytes of every level, in order; errors are added to ``totals``."""
        base = self.chain[0]
        if base == SOURCE:
            yield self.raw.tobytes()
            return
        importance = None if self.job.imatrix is None else self.job.imatrix[self.expert]
        blocks = quantize(base, self.weights, importance)
        yield blocks.tobytes()
        values = _base_values(base, blocks).reshape(self.weights.shape)
        totals[0, 0] += self.weighted(values[self.sample] - self.wanted)
        if not self.chain[1].startswith("R"):
            values[:] = 0
        residual = self.weights
        residual -= values
        n_steps = sum(_step(tier) is not None for tier in self.chain)
        for i, level in enumerate(self._levels(residual, n_steps), 1):
            add_levels([level], values)
            totals[i] += self._errors(values[self.sample], kinds)
            yield bitstack_level.to_bytes(level)
        if self.chain[-1] == SOURCE:
            yield self._rest(values)

    def _levels(self, residual: F32Array, n_steps: int) -> Iterator[bitstack_level.Level]:
        settings = Settings(group=self.job.column_group)
        sensitivity, at = self.job.sensitivity, slice(self.start, self.stop)
        rows, cols = _even(sensitivity.rows[at]), _even(sensitivity.cols[self.expert])
        exponent = best_exponent(residual, rows, cols, settings)
        scales = _power(rows, exponent), _power(cols, exponent)
        return decompose(residual, n_steps, settings, *scales, overwrite=True)

    def _errors(self, values: F32Array, kinds: list[str]) -> list[float]:
        """The weighted square error of sampled rows as they are, then as each type."""
        errors = [self.weighted(values - self.wanted)]
        for kind in kinds:
            kept = dequantize(kind, quantize(kind, values)).reshape(values.shape)
            errors.append(self.weighted(kept - self.wanted))
        return errors

    def _rest(self, values: F32Array) -> bytes:
        """What is left of the source, chunk after chunk."""
        cols, kind = self.weights.shape[1], self.source.source_type
        raw = self.raw.reshape(len(values), -1)
        return b"".join(
            frame(
                encode_chunk(
                    "F32", kind, _bytes_of(values[start:stop]), raw[start:stop].reshape(-1)
                )
            )
            for start, stop in row_ranges(len(values), cols, self.job.chunk_weights)
        )


def _bytes_of(values: F32Array) -> ByteArray:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)


def _even(weights: F32Array) -> F32Array:
    """Positive weights with mean 1."""
    mean = weights.mean(dtype=np.float64) or 1.0
    return np.maximum(weights / np.float32(mean), np.float32(LEAST_WEIGHT))


def _power(weights: F32Array, exponent: float) -> F32Array:
    """What a row or column is multiplied by: the root of its weight, to the exponent."""
    return np.power(weights, np.float32(exponent / 2))


def best_exponent(
    weights: F32Array, row_weights: F32Array, col_weights: F32Array, settings: Settings
) -> float:
    """The exponent of the scaling whose error after some levels costs least, on some rows.

    With 1 each level is the best for the weighted error that it alone leaves; with less, what it
    leaves to the next ones is more even.
    """
    step = max(1, weights.size // SEARCH_WEIGHTS)
    some, rows = weights[::step], row_weights[::step]
    if np.ptp(rows) == 0 and np.ptp(col_weights) == 0:
        return EXPONENTS[0]

    def cost(exponent: float) -> float:
        left = some.copy()
        scales = _power(rows, exponent), _power(col_weights, exponent)
        for _ in decompose(left, SEARCH_LEVELS, settings, *scales, overwrite=True):
            pass  # what they leave is what counts
        return float(rows @ np.einsum("ij,ij,j->i", left, left, col_weights))

    return min(EXPONENTS, key=cost)


def gives(stack: Stack, level: Level) -> bool:
    """Whether the level is the next step of its stack's ladder, or ``source`` on top of it.

    A step becomes what ggml quantizes to without an importance matrix.
    """
    depth = stack.tiers.index(level.tier)
    if level.tier == SOURCE:
        return not level.type and stack.source_type in CHILDREN
    step, first = _step(level.tier), _step(stack.tiers[1])
    is_next = step is not None and first is not None and step == (first[0], depth)
    return is_next and level.type in TYPES and not TYPES[level.type].needs_imatrix


def open_part(part: memoryview, stack: Stack, depth: int, n_chunks: int) -> object:
    """A level of the whole matrix; the payloads of ``source``."""
    if stack.tiers[depth] == SOURCE:
        return split_frames(part, n_chunks)
    return bitstack_level.from_bytes(part, stack.n_rows, stack.cols)


def decode(chunk: Chunk, opened: Opened, out: ByteArray) -> None:
    """The chunk in the stock type of its depth; see `Codec.decode`."""
    stack, tier = chunk.stack, chunk.stack.tiers[chunk.depth - 1]
    if chunk.depth == 1:
        out[:] = base_blocks(chunk, opened)
        return
    values = _values(chunk, opened)
    if tier != SOURCE:
        out[:] = quantize(stack.type_at(tier), values).reshape(-1)
        return
    payloads = opened(chunk.depth - 1)
    assert isinstance(payloads, list)
    payload, kind = payloads[chunk.index], stack.source_type
    decode_chunk("F32", kind, _bytes_of(values), payload, chunk.n_weights, out)


def held(stack: Stack, depth: int) -> tuple[int, ...]:
    """All levels that a depth is a sum of; none where it is blocks alone."""
    if depth == 1 or stack.tiers[depth - 1] == SOURCE:
        return ()
    return tuple(range(0 if stack.tiers[1].startswith("R") else 1, depth))


def _values(chunk: Chunk, opened: Opened) -> F32Array:
    """The weights that the levels up to the chunk's depth give, float32 ``[rows, cols]``."""
    stack, n_rows = chunk.stack, chunk.stop - chunk.start
    values = np.zeros((n_rows, stack.cols), np.float32)
    if stack.tiers[1].startswith("R"):
        blocks = base_blocks(chunk, opened)
        values = _base_values(stack.tiers[0], blocks).reshape(n_rows, stack.cols)
    for depth in range(1, chunk.depth):
        level = opened(depth)
        if isinstance(level, bitstack_level.Level):
            add_levels([level.rows(chunk.start, chunk.stop)], values)
    return values


def _base_values(kind: str, blocks: ByteArray) -> F32Array:
    """What ``R`` levels stand on: the same bits on every machine, for the types they can follow."""
    return weights_of(kind, blocks) if kind in LAYOUTS else dequantize(kind, blocks)


BITSTACK = Codec(
    tiers=TIERS,
    is_tier=is_tier,
    check_tiers=check_tiers,
    chain_of=chain_of,
    expected_type=expected_type,
    size_bound=size_bound,
    encode=encode,
    tensors_at_once=0,
    gives=gives,
    open=open_part,
    decode=decode,
    held=held,
)
