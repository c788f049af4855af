"""A trace: which experts every token chose in every layer, with where it came from.

The file is an uncompressed-size-checked ``.npz`` that numpy opens: ``experts`` (uint8 or uint16
``[tokens, layers, used]``, the heaviest first), ``weights`` (float16 of the same shape, or empty),
``starts`` (int64, first token of each sequence), ``layers`` (int64, block numbers), ``n_experts``,
and ``provenance``, JSON as bytes.
"""

import io
import json
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.errors import RefusedError, UsageError
from edgekit.spool import write_atomically

Ids = npt.NDArray[np.unsignedinteger[Any]]
Json = dict[str, Any]
MAX_BYTES = 1 << 31  # of a trace in memory: 100 M tokens of a small model
MAX_EXPERTS = 1 << 16
# What numpy, zipfile, zlib and json raise on bytes that lie
UNREADABLE: tuple[type[Exception], ...] = (
    *(ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, OSError),
    *(RuntimeError, TypeError, ValueError, zipfile.BadZipFile, zlib.error),
)
ARRAYS = ("experts", "weights", "starts", "layers", "n_experts", "provenance")


@dataclass(frozen=True, eq=False)
class Trace:
    """Choices of routers.

    Attributes:
        experts: uint8 or uint16 ``[tokens, layers, used]``, the heaviest first.
        n_experts: Experts of a layer.
        starts: First token of each sequence, increasing from 0.
        layers: Block number of each layer.
        weights: float16 of the shape of ``experts``: what each one's output is multiplied with;
            ``None`` where nobody wrote it down.
        provenance: Model, text, runtime: where it came from.
    """

    experts: Ids
    n_experts: int
    starts: tuple[int, ...]
    layers: tuple[int, ...]
    weights: npt.NDArray[np.float16] | None = None
    provenance: Json = field(default_factory=dict)

    @property
    def n_tokens(self) -> int:
        """Tokens of all sequences."""
        return len(self.experts)

    @property
    def n_used(self) -> int:
        """Experts that a token takes in a layer."""
        return int(self.experts.shape[2])

    def sequences(self) -> Iterator[Ids]:
        """``experts`` of one sequence after the other."""
        for start, stop in pairwise((*self.starts, self.n_tokens)):
            yield self.experts[start:stop]

    def spread(self, n_tokens: int) -> "Trace":
        """At most ``n_tokens`` of it: whole sequences evenly from all of it, the last one cut."""
        stride = -(-self.n_tokens // n_tokens)
        bounds = list(pairwise((*self.starts, self.n_tokens)))[::stride]
        taken = np.concatenate([np.arange(*bound) for bound in bounds])[:n_tokens]
        starts = np.cumsum([0] + [stop - start for start, stop in bounds[:-1]])
        return Trace(
            self.experts[taken],
            self.n_experts,
            tuple(int(start) for start in starts if start < len(taken)),
            self.layers,
            None if self.weights is None else self.weights[taken],
            self.provenance,
        )


def trace_of(
    experts: npt.NDArray[Any],
    n_experts: int,
    starts: tuple[int, ...] = (0,),
    layers: tuple[int, ...] | None = None,
    weights: npt.NDArray[Any] | None = None,
    provenance: Json | None = None,
) -> Trace:
    """Make a trace of arrays, checked.

    Raises:
        RefusedError: Ids are no integers or out of range, a token has one twice, shapes do not fit,
            or a weight is no finite float16.
    """
    layers = tuple(range(experts.shape[1])) if layers is None else layers
    kind = np.uint8 if n_experts <= 256 else np.uint16
    if experts.dtype.kind not in "iu":
        raise RefusedError(f"a trace has ids of {experts.dtype}, needed are whole numbers")
    with np.errstate(over="ignore"):  # what overflows is refused
        kept = None if weights is None else weights.astype(np.float16)
    trace = Trace(experts.astype(kind), n_experts, starts, layers, kept, dict(provenance or {}))
    if experts.size and not 0 <= experts.min() <= experts.max() < n_experts:
        raise RefusedError(f"a trace has ids up to {experts.max()} for {n_experts} experts")
    _check(trace, "a trace")
    return trace


def write_trace(trace: Trace, path: Path) -> None:
    """Write ``path``, which appears when it is whole."""
    buffer = io.BytesIO()
    empty = np.zeros(0, np.float16)
    np.savez_compressed(
        buffer,
        experts=trace.experts,
        weights=empty if trace.weights is None else trace.weights,
        starts=np.array(trace.starts, np.int64),
        layers=np.array(trace.layers, np.int64),
        n_experts=np.array(trace.n_experts, np.int64),
        provenance=np.frombuffer(json.dumps(trace.provenance).encode(), np.uint8),
    )
    write_atomically(path, buffer.getvalue())


def read_trace(path: Path) -> Trace:
    """Read a trace: our own form, or lines of JSON as published for Mixtral.

    A line has ``layer``, ``token_idx``, ``experts`` and perhaps ``gating_probs``; ``dataset`` and
    ``problem_id`` tell the sequences apart.

    Raises:
        UsageError: There is no such file.
        RefusedError: It is no trace.
    """
    if not path.is_file():
        raise UsageError(f"{path} is no file; make a trace with: edgekit trace")
    try:
        if zipfile.is_zipfile(path):
            return _read_npz(path)
        return _read_lines(path)
    except UNREADABLE as error:
        reason = str(error) or type(error).__name__
        raise RefusedError(f"{path} is no trace: {reason}; make one with: edgekit trace") from error


def _read_npz(path: Path) -> Trace:
    with zipfile.ZipFile(path) as archive:
        size = sum(item.file_size for item in archive.infolist())
        if size > MAX_BYTES:
            raise RefusedError(f"{path} unpacks to {size} bytes, the most are {MAX_BYTES}")
    with np.load(path, allow_pickle=False) as data:
        arrays = {name: data[name] for name in ARRAYS}
    experts, weights = arrays["experts"], arrays["weights"]
    if experts.dtype not in (np.uint8, np.uint16) or experts.ndim != 3:
        raise RefusedError(f"{path}: experts are {experts.dtype} {experts.shape}")
    provenance = json.loads(arrays["provenance"].tobytes())
    if not isinstance(provenance, dict):
        raise RefusedError(f"{path}: provenance is no object")
    trace = Trace(
        experts,
        int(arrays["n_experts"]),
        tuple(int(n) for n in arrays["starts"]),
        tuple(int(n) for n in arrays["layers"]),
        weights.astype(np.float16) if weights.size else None,
        provenance,
    )
    _check(trace, str(path))
    return trace


def _read_lines(path: Path) -> Trace:
    """A line per token and layer, in any order."""
    if path.stat().st_size > MAX_BYTES:
        raise RefusedError(f"{path} has {path.stat().st_size} bytes, the most are {MAX_BYTES}")
    rows: dict[tuple[str, int], dict[int, Mapping[str, Any]]] = {}
    with path.open(encoding="utf-8") as file:
        for line in filter(str.strip, file):
            row = json.loads(line)
            sequence = f"{row.get('dataset', '')}/{row.get('problem_id', 0)}"
            rows.setdefault((sequence, int(row["token_idx"])), {})[int(row["layer"])] = row
    if not rows:
        raise RefusedError(f"{path} is empty")
    layers = sorted({layer for row in rows.values() for layer in row})
    keys = sorted(key for key, row in rows.items() if len(row) == len(layers))
    starts = [i for i, key in enumerate(keys) if i == 0 or key[0] != keys[i - 1][0]]
    experts = np.array([[rows[key][layer]["experts"] for layer in layers] for key in keys])
    has_weights = all("gating_probs" in row for token in rows.values() for row in token.values())
    weights = (
        np.array([[rows[key][layer]["gating_probs"] for layer in layers] for key in keys])
        if has_weights
        else None
    )
    n_experts = 1 << int(experts.max()).bit_length()  # the lines do not tell; all published: 2**n
    source = {"runtime": "lines of JSON", "file": path.name, "n_incomplete": len(rows) - len(keys)}
    return trace_of(experts, n_experts, tuple(starts), tuple(layers), weights, source)


def _check(trace: Trace, name: str) -> None:
    experts, n = trace.experts, trace.n_experts
    n_tokens, n_layers, n_used = experts.shape
    if not 0 < n <= MAX_EXPERTS or not n_tokens or len(trace.layers) != n_layers or n_used > n:
        raise RefusedError(f"{name} has experts {experts.shape} for {n} experts, {trace.layers}")
    if int(experts.max()) >= n:
        raise RefusedError(f"{name} has expert {experts.max()} of {n}")
    ordered = np.sort(experts, axis=2)
    if n_used > 1 and (ordered[:, :, 1:] == ordered[:, :, :-1]).any():
        raise RefusedError(f"{name} has a token that takes one expert twice")
    starts = trace.starts
    if not starts or starts[0] or any(a >= b for a, b in pairwise((*starts, n_tokens))):
        raise RefusedError(f"{name} has sequences that begin at {str(starts)[:80]}")
    if trace.weights is not None and trace.weights.shape != experts.shape:
        raise RefusedError(f"{name} has weights {trace.weights.shape} for {experts.shape}")
    if trace.weights is not None and not np.isfinite(trace.weights).all():
        raise RefusedError(f"{name} has weights that are no finite float16")
