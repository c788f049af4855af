"""What a process needs besides weights: KV cache, compute buffers, the process itself.

The KV cache follows from a formula. Compute buffers are what llama.cpp itself reserved when the
artifact was made (``manifest.memory``), interpolated between contexts; where nothing was measured
an upper bound by formula stands in.
"""

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgekit.codecs.chunks import CHUNK_WEIGHTS
from edgekit.errors import RefusedError, UsageError
from edgekit.kernels.ggml import TYPES, row_bytes
from edgekit.manifest import MANIFEST_NAME, Json

KV_TYPES = {"f16": "F16", "q8_0": "Q8_0", "q4_0": "Q4_0"}  # option -> ggml type of the cache
BATCHES = (512, 256, 128, 64, 32)  # tokens computed at once; 512 is llama.cpp's own default
CELLS = 256  # llama.cpp pads caches to a multiple of that
MAX_LAYERS, MAX_COUNT = 1 << 12, 1 << 31  # of a model's facts; no allocation follows from more
# Resident without a model, measured on x86-64 Linux: Python, numpy, the command line, llama.cpp
PROCESS_BYTES = 57 << 20
# While a model loads: pages of the artifact not yet handed back, and for each thread the chunk it
# decodes and, where a stream is read, two that wait; measured on four models, 65 k to 1 M weights
# in a chunk
LOADING_BYTES = 4 << 20
BYTES_PER_CHUNK_WEIGHT = 12
DECODERS = 2  # threads that there is always room for
# llama.cpp's graph and tables of a model, and the vocabulary there and in Python: what four models
# with 4 k to 128 k tokens took, 11 to 15 bytes per byte of the GGUF's header
MODEL_BYTES = 10 << 20
BYTES_PER_HEADER_BYTE = 14


@dataclass(frozen=True)
class Memory:
    """What a process needs besides weights; bytes."""

    kv_bytes: int
    compute_bytes: int
    overhead_bytes: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.kv_bytes + self.compute_bytes + self.overhead_bytes


@dataclass(frozen=True)
class Shape:
    """The facts of a model that memory follows from.

    Attributes:
        n_layers: Blocks.
        context: Longest context the model was trained for, tokens.
        kv_elements: Elements of keys and of values per token and layer, ``[layers][2]``.
        head_sizes: Of keys and of values.
        width: Floats per token of the widest activations together.
        longest_row: Weights of the longest row that a batch is multiplied with.
        vocab: Rows of the output head.
        window: Tokens that windowed layers attend to; 0 where the model has none.
        windowed: Whether each layer attends in a window, ``[layers]``.
        header_bytes: Of the GGUF's header, nearly all of it vocabulary.
        chunk: Weights of a layer's matrices that are decoded at once, at most.
        measured: What llama.cpp reserved at conversion: the manifest's ``memory``.
    """

    n_layers: int
    context: int
    kv_elements: tuple[tuple[int, int], ...]
    head_sizes: tuple[int, int]
    width: int
    longest_row: int
    vocab: int
    window: int
    windowed: tuple[bool, ...]
    header_bytes: int
    chunk: int
    measured: Json


def shape_of(
    architecture: str,
    model: Mapping[str, Any],
    header_bytes: int = 0,
    measured: Json | None = None,
    chunk: int = CHUNK_WEIGHTS,
) -> Shape:
    """Read a `Shape` from the manifest's ``model``, ``header_bytes`` and ``memory``.

    Raises:
        RefusedError: A field is missing or no number.
    """
    prefix = f"{architecture}."

    def count(key: str, default: int | None = None, most: int = MAX_COUNT) -> int:
        return _count(prefix + key, model.get(prefix + key, default), most)

    layers = count("block_count", most=MAX_LAYERS)
    width, heads = count("embedding_length"), count("attention.head_count")
    kv_heads = _per_layer(prefix, model, "attention.head_count_kv", heads, layers)
    feed_forward = _per_layer(prefix, model, "feed_forward_length", width, layers)
    head_k = count("attention.key_length", width // heads)
    head_v = count("attention.value_length", width // heads)
    n_used = count("expert_used_count") if prefix + "expert_used_count" in model else 0
    expert_width = count("expert_feed_forward_length", max(feed_forward))
    experts = n_used * (3 * expert_width + 2 * width)  # all experts of a token at once
    windowed = _windowed(layers, measured or {})
    return Shape(
        n_layers=layers,
        context=count("context_length"),
        kv_elements=tuple((n * head_k, n * head_v) for n in kv_heads),
        head_sizes=(head_k, head_v),
        width=4 * width + 2 * heads * (head_k + head_v) + 3 * max(feed_forward) + experts,
        longest_row=max(width, *feed_forward, expert_width),
        vocab=_count("vocab_size", model.get("vocab_size"), MAX_COUNT),
        window=count("attention.sliding_window") if any(windowed) else 0,
        windowed=windowed,
        header_bytes=header_bytes,
        chunk=chunk,
        measured=measured or {},
    )


def _windowed(layers: int, measured: Json) -> tuple[bool, ...]:
    """Which layers keep a window only, as told at conversion; none where nothing was told."""
    told = measured.get("windowed", [])
    return tuple(bool(item) for item in told) if len(told) == layers else (False,) * layers


def _per_layer(
    prefix: str, model: Mapping[str, Any], key: str, default: int, layers: int
) -> list[int]:
    """A field that is one count, or a list with one for each layer."""
    value = model.get(prefix + key, default)
    values = value if isinstance(value, list) else [value] * layers
    if len(values) != layers:
        raise RefusedError(
            f"{MANIFEST_NAME}: model field {key} has {len(values)} values for {layers} layers"
        )
    return [_count(prefix + key, item, MAX_COUNT) for item in values]


def _count(key: str, value: object, most: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= most:
        raise RefusedError(
            f"{MANIFEST_NAME}: model field {key[:80]!a} is {str(value)[:40]!a}, needs 1 to {most}"
        )
    return value


def memory_of(
    shape: Shape, context: int, kv_type: str, batch: int = BATCHES[0], held: int | None = None
) -> Memory:
    """What a process needs besides weights.

    Args:
        shape: Of the model.
        context: Tokens.
        kv_type: Key of `KV_TYPES`.
        batch: Tokens of a prompt computed at once.
        held: Bytes the process holds resident before it loads; ``None`` takes `PROCESS_BYTES`.
    """
    kv = kv_bytes(shape, context, kv_type, batch)
    compute = compute_bytes(shape, context, kv_type, batch)
    process = PROCESS_BYTES if held is None else held
    model = MODEL_BYTES + BYTES_PER_HEADER_BYTE * shape.header_bytes
    loading = max(0, loading_bytes(shape, DECODERS) - kv - compute)  # over before those are there
    return Memory(kv, compute, process + model + loading)


def loading_bytes(shape: Shape, n_threads: int) -> int:
    """Bytes that loading takes for a moment when ``n_threads`` decode."""
    return LOADING_BYTES + BYTES_PER_CHUNK_WEIGHT * shape.chunk * n_threads


def decoders(shape: Shape, memory: Memory, n_threads: int) -> int:
    """How many of ``n_threads`` may decode in the place that cache and buffers will take."""
    room = memory.kv_bytes + memory.compute_bytes - LOADING_BYTES
    fitting = max(DECODERS, room // (BYTES_PER_CHUNK_WEIGHT * shape.chunk))
    return min(n_threads, fitting)


def kv_bytes(shape: Shape, context: int, kv_type: str, batch: int = BATCHES[0]) -> int:
    """Bytes of the KV cache; layers with a window keep the window and one batch."""
    kind = kv_kind(shape, kv_type)
    full = padded_cells(context)
    window = min(full, padded_cells(shape.window + min(batch, context)))
    return sum(
        (window if is_windowed else full) * (row_bytes(kind, k) + row_bytes(kind, v))
        for (k, v), is_windowed in zip(shape.kv_elements, shape.windowed, strict=True)
    )


def padded_cells(tokens: int) -> int:
    """Positions that llama.cpp makes for a context of ``tokens``."""
    return -(-tokens // CELLS) * CELLS


def kv_kind(shape: Shape, kv_type: str) -> str:
    """The ggml type of the cache.

    Raises:
        UsageError: It is unknown, or the heads are no whole blocks of it, which llama.cpp wants.
    """
    if kv_type not in KV_TYPES:
        raise UsageError(f"KV type '{kv_type}' is unknown; choose {', '.join(KV_TYPES)}")
    if kv_type not in kv_choices(shape):
        block = TYPES[KV_TYPES[kv_type]].block
        raise UsageError(
            f"KV type {kv_type} needs heads of a multiple of {block}, this model has "
            f"{shape.head_sizes[0]} and {shape.head_sizes[1]}; choose f16"
        )
    return KV_TYPES[kv_type]


def kv_choices(shape: Shape) -> tuple[str, ...]:
    """The KV types that this model's heads allow, largest first."""
    blocks = {kv_type: TYPES[kind].block for kv_type, kind in KV_TYPES.items()}
    return tuple(k for k, block in blocks.items() if not any(s % block for s in shape.head_sizes))


def compute_bytes(shape: Shape, context: int, kv_type: str, batch: int) -> int:
    """Bytes of llama.cpp's compute buffers, one position's logits included.

    The log does not tell of the rows of a batch that are quantized for a product, in eight bits.
    """
    tokens = min(batch, context)
    rows = tokens * row_bytes("Q8_0", -(-shape.longest_row // 32) * 32)
    for row in shape.measured.get("compute", ()):
        if (row["kv_type"], row["batch"]) == (kv_type, batch):
            return rows + _interpolated(row["contexts"], row["bytes"], padded_cells(context))
    return rows + 4 * (shape.vocab + tokens * shape.width) + 8 * padded_cells(context) * tokens


def _interpolated(xs: Sequence[int], ys: Sequence[int], x: int) -> int:
    """On the lines through the points, the last one going on; buffers grow convexly between."""
    i = min(max(1, bisect_left(xs, x)), len(xs) - 1)
    slope = (ys[i] - ys[i - 1]) / (xs[i] - xs[i - 1])
    return max(ys[0], math.ceil(ys[i - 1] + slope * (x - xs[i - 1])))
