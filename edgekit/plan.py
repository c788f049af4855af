"""A plan: budget and context in, the depth of every tensor out, with every byte accounted for."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgekit.artifact import Artifact
from edgekit.errors import DoesNotFitError, RefusedError, UsageError
from edgekit.kernels.ggml import TYPES, row_bytes
from edgekit.manifest import MANIFEST_NAME, Json
from edgekit.planner import Depths, fill, resident_bytes, tier_at, uniform
from edgekit.sizes import format_size

KV_TYPES = {"f16": "F16", "q8_0": "Q8_0", "q4_0": "Q4_0"}  # option -> ggml type of the cache
LEAST_KL = 1e-9  # where a measured KL is 0, so that its logarithm is a number
DEFAULT_CONTEXT = 4096  # tokens, or the model's own context when that is shorter
MAX_LAYERS, MAX_COUNT = 1 << 12, 1 << 31  # of a model's facts; no allocation follows from more
DEFAULT_BATCH = 512  # tokens computed at once; llama.cpp's own default
# Python, numpy, the command line and llama.cpp's libraries, no model; measured on x86-64 Linux
PROCESS_BYTES = 90 << 20


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
class Plan:
    """The depth of every tensor within a budget; bytes.

    Attributes:
        budget_bytes: What the process may hold resident; ``None`` where only the weights were
            limited.
        context: Tokens.
        batch: Tokens of a prompt computed at once.
        kv_type: Key of `KV_TYPES`.
        memory: Everything but weights.
        depths: Tier of every tensor.
        bits_per_weight: Of the weights in memory.
        expected_kl: Mean KL divergence to the source, interpolated from what ``convert`` measured;
            ``None`` where it measured nothing.
    """

    budget_bytes: int | None
    context: int
    batch: int
    kv_type: str
    memory: Memory
    depths: Depths
    bits_per_weight: float
    expected_kl: float | None

    @property
    def total_bytes(self) -> int:
        """Weights and everything else."""
        return self.depths.weights_bytes + self.memory.total


@dataclass(frozen=True)
class Shape:
    """The facts of a model that memory follows from.

    Attributes:
        n_layers: Blocks.
        context: Longest context the model was trained for, tokens.
        kv_elements: Elements of keys and of values per token and layer, ``[layers][2]``.
        head_sizes: Of keys and of values.
        width: Floats per token of the widest activations together.
        vocab: Rows of the output head.
    """

    n_layers: int
    context: int
    kv_elements: tuple[tuple[int, int], ...]
    head_sizes: tuple[int, int]
    width: int
    vocab: int


def shape_of(architecture: str, model: Mapping[str, Any]) -> Shape:
    """Read a `Shape` from the manifest's ``model``.

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
    return Shape(
        n_layers=layers,
        context=count("context_length"),
        kv_elements=tuple((n * head_k, n * head_v) for n in kv_heads),
        head_sizes=(head_k, head_v),
        width=4 * width + 2 * heads * (head_k + head_v) + 3 * max(feed_forward) + experts,
        vocab=_count("vocab_size", model.get("vocab_size"), MAX_COUNT),
    )


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


def memory_of(shape: Shape, context: int, kv_type: str, batch: int = DEFAULT_BATCH) -> Memory:
    """KV cache by its formula, compute buffers by an upper bound, the process by measurement.

    The compute bound counts the logits of the one position that the loader asks for and a batch of
    the widest layer's activations, in float32; llama.cpp reuses buffers and stays below it.
    """
    kind = _kv_kind(shape, kv_type)
    cells = -(-context // 256) * 256  # llama.cpp pads the cache to that
    kv = sum(cells * (row_bytes(kind, k) + row_bytes(kind, v)) for k, v in shape.kv_elements)
    tokens = min(batch, context)
    compute = 4 * (shape.vocab + tokens * shape.width) + 8 * cells * tokens
    return Memory(kv, compute, PROCESS_BYTES)


def _kv_kind(shape: Shape, kv_type: str) -> str:
    """The ggml type of the cache; llama.cpp wants whole blocks in every head."""
    if kv_type not in KV_TYPES:
        raise UsageError(f"KV type '{kv_type}' is unknown; choose {', '.join(KV_TYPES)}")
    block = TYPES[KV_TYPES[kv_type]].block
    if any(size % block for size in shape.head_sizes):
        raise UsageError(
            f"KV type {kv_type} needs heads of a multiple of {block}, this model has "
            f"{shape.head_sizes[0]} and {shape.head_sizes[1]}; choose f16"
        )
    return KV_TYPES[kv_type]


def plan_budget(
    artifact: Artifact, budget_bytes: int, context: int | None = None, kv_type: str = "f16"
) -> Plan:
    """The best depths that a process of ``budget_bytes`` can hold.

    Raises:
        DoesNotFitError: Even the lowest depth is too large; the message says what would fit.
    """
    shape = shape_of(artifact.manifest.architecture, artifact.manifest.model)
    n_tokens = _context(shape, context)
    batch = DEFAULT_BATCH
    memory = memory_of(shape, n_tokens, kv_type, batch)
    lowest = uniform(artifact.stacks, lambda stack: stack.tiers[0]).weights_bytes
    while batch > 32 and lowest + memory.total > budget_bytes:
        batch //= 2
        memory = memory_of(shape, n_tokens, kv_type, batch)
    if lowest + memory.total > budget_bytes:
        raise DoesNotFitError(
            _too_small(shape, lowest, memory, budget_bytes, n_tokens, kv_type, batch)
        )
    order = artifact.order(artifact.manifest.resident_order)
    depths = fill(artifact.stacks, order, budget_bytes - memory.total)
    return _plan(artifact, depths, memory, budget_bytes, n_tokens, batch, kv_type)


def plan_weights(artifact: Artifact, weights_bytes: int) -> Plan:
    """The best depths whose weights take at most ``weights_bytes``."""
    order = artifact.order(artifact.manifest.resident_order)
    depths = fill(artifact.stacks, order, weights_bytes)
    return _unlimited(artifact, depths)


def plan_tier(artifact: Artifact, tier: str) -> Plan:
    """Every tensor at ``tier``, as llama-quantize's pure mode would have it.

    Raises:
        UsageError: The artifact has no such tier, or not all of its levels are here.
    """
    if tier not in artifact.manifest.tiers:
        raise UsageError(
            f"{artifact.folder} has no tier {tier}; it has {', '.join(artifact.manifest.tiers)}"
        )
    return _unlimited(artifact, uniform(artifact.stacks, lambda stack: tier_at(stack, tier)))


def _unlimited(artifact: Artifact, depths: Depths) -> Plan:
    shape = shape_of(artifact.manifest.architecture, artifact.manifest.model)
    context = _context(shape, None)
    memory = memory_of(shape, context, "f16")
    return _plan(artifact, depths, memory, None, context, DEFAULT_BATCH, "f16")


def _plan(
    artifact: Artifact,
    depths: Depths,
    memory: Memory,
    budget_bytes: int | None,
    context: int,
    batch: int,
    kv_type: str,
) -> Plan:
    bits = 8 * depths.weights_bytes / artifact.manifest.n_parameters
    kl = expected_kl(artifact.manifest.quality, depths.weights_bytes)
    return Plan(budget_bytes, context, batch, kv_type, memory, depths, bits, kl)


def _context(shape: Shape, asked: int | None) -> int:
    if asked is None:
        return min(DEFAULT_CONTEXT, shape.context)
    if not 1 <= asked <= 1 << 24:
        raise UsageError(f"context {asked} is out of range; give 1 to {1 << 24} tokens")
    return asked


def _too_small(
    shape: Shape, lowest: int, memory: Memory, budget: int, context: int, kv_type: str, batch: int
) -> str:
    need = lowest + memory.total
    line = (
        f"the lowest depth needs {format_size(need)} (weights {format_size(lowest)}, KV cache "
        f"{format_size(memory.kv_bytes)}, compute {format_size(memory.compute_bytes)}, process "
        f"{format_size(memory.overhead_bytes)}), the budget is {format_size(budget)}"
    )
    for shorter in (context // 2**i for i in range(1, 16)):
        if shorter >= 128 and lowest + memory_of(shape, shorter, kv_type, batch).total <= budget:
            return f"{line}; it would fit with --context {shorter}"
    return f"{line}; give --budget {-(-need // 2**20)}MiB or more"


def expected_kl(quality: Sequence[Json], weights_bytes: int) -> float | None:
    """Interpolate the measured KL at ``weights_bytes``: log KL is close to linear in bytes.

    Below the first and above the last measured size the nearest value is given.
    """
    points = sorted((row["weights_bytes"], row["kl_mean"]) for row in quality)
    if not points:
        return None
    before = [p for p in points if p[0] <= weights_bytes] or points[:1]
    after = [p for p in points if p[0] >= weights_bytes] or points[-1:]
    (x0, y0), (x1, y1) = before[-1], after[0]
    if x1 <= x0:
        return float(y0 if x0 <= weights_bytes else y1)
    share = (weights_bytes - x0) / (x1 - x0)
    logs = (math.log(max(y, LEAST_KL)) for y in (y0, y1))
    return math.exp(sum(log * part for log, part in zip(logs, (1 - share, share), strict=True)))


def plan_json(artifact: Artifact, plan: Plan) -> Json:
    """The plan as one JSON object; sizes in bytes."""
    tensors = [
        {
            "name": s.name,
            "tier": plan.depths.tier(s.name),
            "bytes": resident_bytes(s, plan.depths.tier(s.name)),
        }
        for s in artifact.stacks
    ]
    return {
        "fits": plan.budget_bytes is None or plan.total_bytes <= plan.budget_bytes,
        "budget_bytes": plan.budget_bytes,
        "context": plan.context,
        "batch": plan.batch,
        "kv_type": plan.kv_type,
        "weights_bytes": plan.depths.weights_bytes,
        "kv_bytes": plan.memory.kv_bytes,
        "compute_bytes": plan.memory.compute_bytes,
        "overhead_bytes": plan.memory.overhead_bytes,
        "total_bytes": plan.total_bytes,
        "bits_per_weight": round(plan.bits_per_weight, 4),
        "expected_kl": plan.expected_kl,
        "tensors": tensors,
    }
