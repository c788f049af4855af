"""Plans for ONNX Runtime: the depth that a budget buys, as the same object that llama.cpp's have.

Every matrix has the depth of the model, or its own lowest. Measured on x86-64 Linux with models
loaded by path: weights that a product reads are packed into memory of the process, tables of which
rows are looked up stay in the mapped file.
"""

from collections.abc import Sequence

from edgekit.errors import DoesNotFitError, UsageError
from edgekit.exporters.onnx_decoder import EMBEDDING, HEAD
from edgekit.exporters.onnx_store import DEPTHS, Planes
from edgekit.footprint import Memory
from edgekit.manifest import Json
from edgekit.onnx_part import OnnxPart
from edgekit.plan import DEFAULT_CONTEXT, LEAST_CONTEXT, Plan
from edgekit.planner import Depths
from edgekit.sizes import format_size

KV_TYPE = "f32"
BATCHES = (128, 32, 8)  # tokens of a prompt computed at once
# Resident without a model: Python, numpy, the command line, onnxruntime, tokenizers, genai
PROCESS_BYTES = 90 << 20
MODEL_BYTES = 28 << 20  # the session's graph and plans, and what allocators keep
BYTES_PER_TOKENIZER_BYTE = 10  # tables of tokenizer.json
BYTES_PER_BLOCK = 12  # its scale as an initializer, in the packed codes, and times the codes' sum
COMPUTE_FACTOR = 1.5  # of the activations that a formula counts: what stays free between them
COMPUTE_SHARE = 1 / 16  # of a budget; a larger batch reads prompts faster


def plan_onnx(
    part: OnnxPart,
    budget: int,
    context: int | None = None,
    held: int | None = None,
    depths: Sequence[int] = DEPTHS,
) -> Plan:
    """The best depth that a process of ``budget`` bytes can hold.

    Args:
        part: Of the artifact.
        budget: For the whole process.
        context: Tokens; ``None`` takes `DEFAULT_CONTEXT` or the model's own.
        held: Bytes the process holds already; ``None`` takes what one usually does.
        depths: To choose from, lowest first.

    Raises:
        DoesNotFitError: Even the lowest depth is too large; the message says what would fit.
        UsageError: More context is asked for than the model has.
    """
    n_ctx = context_of(part, context)
    for depth in reversed(depths):
        for batch in BATCHES:
            plan = plan_depth(part, depth, n_ctx, batch, held, budget)
            is_small = plan.memory.compute_bytes <= COMPUTE_SHARE * budget or batch == BATCHES[-1]
            if is_small and plan.total_bytes <= budget:
                return plan
    raise DoesNotFitError(_too_small(part, plan, held))


def plan_depth(
    part: OnnxPart,
    depth: int,
    context: int | None = None,
    batch: int = BATCHES[0],
    held: int | None = None,
    budget: int | None = None,
) -> Plan:
    """The plan of a depth, whatever the budget."""
    n_ctx = context_of(part, context)
    weights = weights_bytes(part, depth)
    bits = 8 * part.depth_bytes(depth) / part.n_weights
    tiers = {matrix.name: f"{matrix.depth(depth)}bit" for matrix in part.matrices}
    memory = memory_of(part, depth, n_ctx, batch, held)
    depths = Depths(tiers, weights)
    return Plan(budget, n_ctx, batch, KV_TYPE, memory, depths, bits, None, held)


def depth_of(plan: Plan) -> int:
    """The depth that a plan loads."""
    return min(int(tier.removesuffix("bit")) for tier in plan.depths.tiers.values())


def context_of(part: OnnxPart, asked: int | None) -> int:
    """Tokens of context.

    Raises:
        UsageError: More are asked for than there can be.
    """
    most = part.facts.context
    if asked is None:
        return min(DEFAULT_CONTEXT, most)
    if not 1 <= asked <= most:
        raise UsageError(f"context {asked} is out of range; this model has 1 to {most} tokens")
    return asked


def weights_bytes(part: OnnxPart, depth: int) -> int:
    """Resident bytes of the weights at a depth."""
    return sum(resident_bytes(part, matrix, depth) for matrix in part.matrices)


def resident_bytes(part: OnnxPart, matrix: Planes, depth: int) -> int:
    """Codes as they are packed, and scales."""
    if matrix.name == EMBEDDING and HEAD in part.store:
        return 2 * matrix.scale_bytes  # rows are looked up in the mapped file
    n_blocks = matrix.scale_bytes // 2
    return matrix.code_bytes(matrix.depth(depth)) + BYTES_PER_BLOCK * n_blocks


def memory_of(
    part: OnnxPart, depth: int, context: int, batch: int, held: int | None = None
) -> Memory:
    """What a process needs besides weights.

    While a model is loaded the largest matrix is there twice, mapped and packed, but cache and
    buffers are not yet.
    """
    f = part.facts
    kv = 2 * 4 * f.n_layers * f.n_kv_heads * f.head * context
    qkv = (f.n_heads + 2 * f.n_kv_heads) * f.head
    width = 4 * f.hidden + 2 * qkv + 4 * f.feed_forward  # floats per token at once
    scores = f.n_heads * min(batch, context) * context
    floats = min(batch, context) * width + 2 * f.vocab + scores
    compute = round(COMPUTE_FACTOR * 4 * floats)
    largest = max(matrix.code_bytes(matrix.depth(depth)) for matrix in part.matrices)
    process = PROCESS_BYTES if held is None else held
    tokenizer = sum(r.n_bytes for r in part.files if r.name == "tokenizer.json")
    model = MODEL_BYTES + BYTES_PER_TOKENIZER_BYTE * tokenizer
    return Memory(kv, compute, process + model + max(0, largest - kv - compute))


def _too_small(part: OnnxPart, plan: Plan, held: int | None) -> str:
    """One line: what the lowest depth needs, what there is, which budget or context would fit."""
    budget, context = plan.budget_bytes or 0, plan.context
    need, memory = plan.total_bytes, plan.memory
    hint = f"give --budget {_mib_up(need)}MiB"
    for n in _shorter(context):
        smaller = plan_depth(part, DEPTHS[0], n, BATCHES[-1], held)
        if smaller.total_bytes <= budget:
            hint += f", or --context {n}"
            break
    return (
        f"the lowest depth needs {format_size(need)} at a context of {context} "
        f"(weights {format_size(plan.depths.weights_bytes)}, KV cache "
        f"{format_size(memory.kv_bytes)}, compute {format_size(memory.compute_bytes)}, process "
        f"{format_size(memory.overhead_bytes)}), the budget is {format_size(budget)}; {hint}"
    )


def _shorter(context: int) -> Sequence[int]:
    return [n for i in range(1, 20) if (n := context >> i) >= LEAST_CONTEXT]


def _mib_up(n_bytes: int) -> int:
    return -(-n_bytes // 2**20)


def onnx_plan_json(part: OnnxPart, plan: Plan) -> Json:
    """The plan as one JSON object, with the fields of `edgekit.plan.plan_json`."""
    depth = depth_of(plan)
    tensors = [
        {
            "name": matrix.name,
            "tier": plan.depths.tier(matrix.name),
            "bytes": resident_bytes(part, matrix, depth),
        }
        for matrix in part.matrices
    ]
    return {
        "fits": plan.budget_bytes is None or plan.total_bytes <= plan.budget_bytes,
        "budget_bytes": plan.budget_bytes,
        "runtime": "onnx",
        "depth": depth,
        "context": plan.context,
        "batch": plan.batch,
        "kv_type": plan.kv_type,
        "repack": plan.repack,
        "weights_bytes": plan.depths.weights_bytes,
        "kv_bytes": plan.memory.kv_bytes,
        "compute_bytes": plan.memory.compute_bytes,
        "overhead_bytes": plan.memory.overhead_bytes,
        "total_bytes": plan.total_bytes,
        "bits_per_weight": round(plan.bits_per_weight, 4),
        "expected_kl": plan.expected_kl,
        "tensors": tensors,
    }
