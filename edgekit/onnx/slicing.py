"""A model's matrices as nested codes in data files, tensor by tensor, some rows at a time."""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgekit.codecs.job import Source, finite_rows
from edgekit.errors import UnsupportedError
from edgekit.exporters.onnx_blocks import planes_of
from edgekit.exporters.onnx_decoder import EMBEDDING, HEAD, STACKED, Decoder, Stacked
from edgekit.exporters.onnx_store import DEPTHS, DataFile, Plane, Planes, Stored, data_name
from edgekit.imatrix import Imatrix
from edgekit.kernels import feedback, slices
from edgekit.onnx.feedback import Feedback
from edgekit.progress import Progress

F32Array = npt.NDArray[np.float32]
U8Array = npt.NDArray[np.uint8]

CHUNK_WEIGHTS = 1 << 20  # coded by one thread at a time: 30 MiB of codes, floats and sums
SAMPLED_BLOCKS = 1 << 9  # of a chunk, whose errors are compared with dedicated codes
LEAST_IMPORTANCE = 1e-6  # of the mean; a column that no text uses still counts a little
ROTATIONS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


@dataclass(frozen=True)
class Matrix:
    """Tensors that become one: stacked, or with their rows in turns."""

    name: str
    parts: tuple[Source, ...]
    is_woven: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole."""
        *experts, _, cols = self.parts[0].shape
        return (*experts, sum(part.shape[-2] for part in self.parts), cols)

    def chunks(self) -> Iterator["Chunk"]:
        """Its rows in order, about `CHUNK_WEIGHTS` at a time."""
        n = max(1, CHUNK_WEIGHTS // self.shape[-1])
        groups = [self.parts] if self.is_woven else [(part,) for part in self.parts]
        for group in groups:
            total = int(np.prod(group[0].shape[:-1]))
            for start in range(0, total, n):
                yield Chunk(group, start, min(start + n, total))


@dataclass(frozen=True)
class Chunk:
    """Rows ``[start, stop)`` of tensors, one of each in turns."""

    parts: tuple[Source, ...]
    start: int
    stop: int

    def weights(self) -> F32Array:
        """float32 ``[rows of all parts, cols]``.

        Raises:
            RefusedError: A weight is NaN or infinite.
        """
        found = [finite_rows(part, self.start, self.stop)[1] for part in self.parts]
        return found[0] if len(found) == 1 else np.stack(found, 1).reshape(-1, found[0].shape[1])


@dataclass(frozen=True)
class Coded:
    """A chunk's planes, scales of depths 8, 4, 2, and square errors ``[joint or own, depth]``."""

    planes: tuple[U8Array, ...]
    scales: npt.NDArray[np.float16]
    errors: npt.NDArray[np.float64]
    energy: float


@dataclass(frozen=True)
class Sliced:
    """What was written.

    Attributes:
        tensors: By name.
        errors: Relative error at each depth of `DEPTHS`, of all matrices that have all of them:
            of the nested codes, and of codes that were made for that depth alone.
        files: Name, bytes and sha256 of each data file.
    """

    tensors: dict[str, Stored]
    errors: dict[int, tuple[float, float]]
    files: tuple[tuple[str, int, str], ...]


def slice_model(
    tensors: Sequence[Source],
    decoder: Decoder,
    folder: Path,
    *,
    block: int,
    imatrix: Imatrix | None,
    feedback: Feedback | None = None,
    pool: Executor,
    ahead: int,
    progress: Progress,
) -> Sliced:
    """Write the data files of a model into ``folder``.

    Args:
        tensors: Of the whole model, at tier source.
        decoder: Gives the tables of rotations.
        folder: Exists.
        block: Weights that share a scale, one of `kernels.slices.BLOCKS`.
        imatrix: Importance of columns; None: all alike.
        feedback: Carries errors on from column to column; None: each weight is rounded by itself.
        pool: Runs the chunks; ``ahead``: so many in flight, which bounds memory.
        progress: Told how far it is.
    """
    matrices, floats = divided(tensors)
    files = {depth: DataFile(folder / data_name(depth)) for depth in DEPTHS}
    found: dict[str, Stored] = {}
    sums, energy = np.zeros((2, len(DEPTHS))), 0.0
    progress.start("slice", sum(int(np.prod(m.shape)) for m in matrices))
    with files[2], files[4], files[8]:
        for name, values in (*floats.items(), *_tables(decoder)):
            found[name] = files[2].add(values)
        for matrix in matrices:
            writer = _Writer(matrix, block, files)
            rounding = _rounding(matrix, writer, imatrix, feedback)
            for coded in _coded(matrix, rounding, pool, ahead):
                if writer.lowest == DEPTHS[0]:
                    sums, energy = sums + coded.errors, energy + coded.energy
                writer.add(coded)
            found[matrix.name] = writer.end()
            progress.advance(int(np.prod(matrix.shape)))
    relative = np.sqrt(sums / max(energy, 1e-300))
    errors = {d: (float(relative[0, i]), float(relative[1, i])) for i, d in enumerate(DEPTHS)}
    records = tuple((file.path.name, file.n_bytes, file.sha256) for file in files.values())
    return Sliced(found, errors, records)


def divided(tensors: Sequence[Source]) -> tuple[list[Matrix], dict[str, F32Array]]:
    """Matrices to code, stacked where they have one input, and the other tensors in float32."""
    by_name = {t.name: t for t in tensors if t.name not in ROTATIONS}
    matrices, floats = [], dict[str, F32Array]()
    for tensor in by_name.values():
        prefix, stack, is_first = _stack_of(tensor.name, by_name)
        if not is_first:
            continue
        suffix = tensor.name.rpartition(".")[2]
        names = [f"{prefix}{part}.{suffix}" for part in stack.parts] if stack else [tensor.name]
        parts = tuple(by_name[name] for name in names if name in by_name)
        name = f"{prefix}{stack.name}.{suffix}" if stack else tensor.name
        if tensor.quantizable:
            matrices.append(Matrix(name, parts, bool(stack and stack.is_woven)))
        elif stack:
            floats[name] = _stacked_bias(prefix, stack.parts, by_name)
        else:
            values = _floats(tensor).reshape(tensor.shape)
            is_row = tensor.name.endswith("ffn_gate_inp_shexp.weight")
            floats[name] = values[None] if is_row else values
    return matrices, floats


def _stack_of(name: str, by_name: Mapping[str, Source]) -> tuple[str, Stacked | None, bool]:
    """Prefix, stack and whether ``name`` is its first tensor that is there."""
    stem, _, suffix = name.rpartition(".")
    prefix, _, role = stem.rpartition(".")
    prefix = f"{prefix}." if prefix else ""
    for stack in STACKED:
        if role in stack.parts:
            there = [p for p in stack.parts if f"{prefix}{p}.{suffix}" in by_name]
            return prefix, stack, there[0] == role
    return prefix, None, True


def _stacked_bias(prefix: str, parts: Sequence[str], by_name: Mapping[str, Source]) -> F32Array:
    """Biases of stacked matrices; zeros for one that has none."""
    found = []
    for part in parts:
        weight, bias = by_name[f"{prefix}{part}.weight"], by_name.get(f"{prefix}{part}.bias")
        n_rows = weight.shape[-2]
        found.append(np.zeros(n_rows, np.float32) if bias is None else _floats(bias).reshape(-1))
    return np.concatenate(found)


def _floats(tensor: Source) -> F32Array:
    """All rows, float32 ``[n, cols]``."""
    return finite_rows(tensor, 0, int(np.prod(tensor.shape[:-1])))[1]


def _tables(decoder: Decoder) -> Iterator[tuple[str, F32Array]]:
    for i, rotation in enumerate(decoder.rotations):
        yield f"rotation.{i}.cos", rotation.cos
        yield f"rotation.{i}.sin", rotation.sin


def block_for(shape: tuple[int, ...], asked: int, name: str) -> int:
    """Weights that share a scale: those asked for; experts' rows must be whole blocks.

    Raises:
        UnsupportedError: No block that ONNX Runtime knows fits an expert's rows.
    """
    if len(shape) < 3:
        return asked
    for block in sorted({asked, *slices.BLOCKS}, reverse=True):
        if block <= asked and shape[-1] % block == 0:
            return block
    raise UnsupportedError(
        f"experts {name} have rows of {shape[-1]}, no multiple of {min(slices.BLOCKS)}; "
        "ONNX Runtime's operator for experts needs that: use --format gguf"
    )


def lowest_depth(name: str) -> int:
    """Bits of a matrix's lowest depth: two cost the embedding and the head too much."""
    return 4 if name in (EMBEDDING, HEAD) else 2


class _Writer:
    """Appends one matrix to the data files, chunk after chunk."""

    def __init__(self, matrix: Matrix, block: int, files: Mapping[int, DataFile]) -> None:
        self.name, self.shape = matrix.name, matrix.shape
        self.block = block_for(matrix.shape, block, matrix.name)
        self.lowest = lowest_depth(matrix.name)
        self.depths = tuple(depth for depth in DEPTHS if depth >= self.lowest)
        self._files = {d: files[2 if d == self.lowest else d] for d in self.depths}
        self._starts = {d: file.begin() for d, file in self._files.items()}
        self._scales: list[npt.NDArray[np.float16]] = []

    def add(self, coded: Coded) -> None:
        for depth, plane in zip(self.depths, coded.planes, strict=True):
            self._files[depth].append(plane)
        self._scales.append(coded.scales)

    def end(self) -> Planes:
        scales = np.concatenate(self._scales, 1)
        codes = {d: file.end(self._starts[d]) for d, file in self._files.items()}
        planes = []
        for depth in self.depths:
            row = (8, 4, 2).index(depth)
            stored = self._files[depth].add(scales[row])
            planes.append(Plane(depth, codes[depth], stored.place))
        return Planes(self.name, self.shape, self.block, tuple(planes))


@dataclass(frozen=True)
class Rounding:
    """How a matrix is rounded.

    Attributes:
        block: Weights that share a scale.
        lowest: Bits of the lowest depth.
        importance: Of columns, float32 ``[experts, cols]``; None: all alike.
        expert_rows: Rows of an expert in each part of the matrix; 0: it has no experts.
        factors: Of error feedback, ``[cols, cols]`` each, one per expert; none: without it.
        carried: Weights of the errors at 8, 4 and 2 bits in it.
    """

    block: int
    lowest: int
    importance: F32Array | None
    expert_rows: int
    factors: tuple[F32Array, ...] = ()
    carried: tuple[float, float, float] = (0.0, 0.0, 0.0)


def _rounding(
    matrix: Matrix, writer: _Writer, imatrix: Imatrix | None, feedback: Feedback | None
) -> Rounding:
    rows = matrix.shape[-2] if len(matrix.shape) == 3 else 0  # of an expert
    per_turn = len(matrix.parts) if matrix.is_woven else 1
    importance = _importance(matrix, imatrix)
    plain = Rounding(writer.block, writer.lowest, importance, rows // per_turn)
    if feedback is None:
        return plain
    factors = feedback.factors(matrix.parts[0].name)
    return replace(plain, factors=factors, carried=feedback.carried)


def _coded(matrix: Matrix, rounding: Rounding, pool: Executor, ahead: int) -> Iterator[Coded]:
    """Chunks in order, some of them in flight."""
    tasks = iter(matrix.chunks())
    running = deque(pool.submit(_code, chunk, rounding) for chunk in islice(tasks, ahead))
    try:
        while running:
            coded = running.popleft().result()
            running.extend(pool.submit(_code, chunk, rounding) for chunk in islice(tasks, 1))
            yield coded
    finally:
        for future in running:
            future.cancel()


def _importance(matrix: Matrix, imatrix: Imatrix | None) -> F32Array | None:
    """Of columns, float32 ``[experts, cols]``."""
    if imatrix is None:
        return None
    experts = matrix.shape[0] if len(matrix.shape) == 3 else 1
    found = imatrix.weights_for(matrix.parts[0].name, experts, matrix.shape[-1])
    if found is None:
        return None
    mean = found.mean(1, keepdims=True)
    scaled: F32Array = (found / np.where(mean > 0, mean, 1)).clip(LEAST_IMPORTANCE, None)
    return scaled


def _code(chunk: Chunk, rounding: Rounding) -> Coded:
    weights = chunk.weights()
    (n, cols), block = weights.shape, rounding.block
    blocks = -(-cols // block)
    turns = np.arange(chunk.start, chunk.stop).repeat(n // (chunk.stop - chunk.start))
    experts = turns // (rounding.expert_rows or chunk.stop)
    weighing = np.ones((n, cols), np.float32)
    if rounding.importance is not None:
        weighing = rounding.importance[experts]
    padding = ((0, 0), (0, blocks * block - cols))
    padded = np.pad(weights, padding)
    weighing = np.pad(weighing, padding, constant_values=1.0)
    found = _encoded(padded, weighing, experts, rounding)
    codes = found.codes.reshape(n, blocks, block)
    padded, weighing = padded.reshape(-1, block), weighing.reshape(-1, block)
    sample = slice(None, None, -(-len(padded) // SAMPLED_BLOCKS))
    few = slices.Slices(found.codes[sample], found.scales[:, sample])
    errors = slices.compared(padded[sample], weighing[sample], few)
    share = len(padded) / len(few.codes)
    energy = float((weighing[sample] * padded[sample] ** 2).sum(dtype=np.float64))
    scales = found.scales.astype(np.float16).reshape(3, n, blocks)
    return Coded(planes_of(codes, rounding.lowest), scales, errors * share, energy * share)


def _encoded(
    weights: F32Array, importance: F32Array, experts: npt.NDArray[np.intp], rounding: Rounding
) -> slices.Slices:
    """Codes of whole rows; ``experts`` says whose each row is, in ascending order."""
    block, lowest = rounding.block, rounding.lowest
    if not rounding.factors:
        return slices.encode(weights.reshape(-1, block), importance.reshape(-1, block), lowest)
    found = []
    for expert in np.unique(experts):
        rows = slice(*np.searchsorted(experts, (expert, expert + 1)))
        cols, factor = weights.shape[1], rounding.factors[expert]
        whole = np.eye(cols, dtype=np.float32)  # what is padded follows from nothing
        whole[: len(factor), : len(factor)] = factor
        found.append(
            feedback.encode(weights[rows], importance[rows], whole, block, rounding.carried)
        )
    codes = np.concatenate([part.codes for part in found])
    return slices.Slices(codes, np.concatenate([part.scales for part in found], 1))
