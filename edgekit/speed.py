"""How fast a depth runs on a device: bytes touched per token over bandwidth, plus fixed costs.

A token reads every weight that it uses once, and the keys and values of all tokens before it. The
seconds of a token are those bytes over what the device decodes per second, plus a cost per token
and per layer, which small models feel. A prompt is limited by arithmetic: two operations for every
weight and token, the output head's for its last position only; and each batch of it reads all
weights once, at a rate of its own where the profile has one.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from edgekit.catalog import Catalog
from edgekit.devices.profile import Device
from edgekit.footprint import CELLS, Shape
from edgekit.plan import EMBEDDING, OUTPUT, Plan, shape_in
from edgekit.planner import resident_bytes

PROMPT_TOKENS = 512  # of the prompt that a speed is given for

# All that the last block computes for tokens without logits
_FIRST = re.compile(r"attn_(q|k|v|qkv)\.")


@dataclass(frozen=True)
class Work:
    """What a token costs at one depth.

    Attributes:
        weight_bytes: Of the weights that a token reads, by ggml type.
        head: The output head's ggml type, and its bytes, which ``weight_bytes`` has too.
        prompt_weights: Number of weights that every token of a prompt is multiplied with, by type,
            those of experts aside.
        expert_weights: Those of the experts that a token is sent to.
        attention: Elements of keys and values that a token reads for each one before it, in all
            heads: of layers that attend to everything, and of those with a window.
        window: Tokens that the latter attend to.
        layers: Blocks.
        batch: Tokens of a prompt computed at once.
        model_bytes: Of all weights in memory.
    """

    weight_bytes: Mapping[str, int]
    head: tuple[str, int]
    prompt_weights: Mapping[str, int]
    expert_weights: Mapping[str, int]
    attention: tuple[int, int]
    window: int
    layers: int
    batch: int
    model_bytes: int

    def attended(self, n_before: int) -> int:
        """Elements that attention reads for a token behind ``n_before`` others.

        llama.cpp computes whole groups of cells, one at least.
        """
        full, windowed = self.attention
        cells = max(CELLS, -(-n_before // CELLS) * CELLS)
        return full * cells + windowed * min(cells, self.window)


def work_of(catalog: Catalog, plan: Plan) -> Work:
    """What a token costs under ``plan``; of experts only those that a token is sent to."""
    shape = shape_in(catalog)
    names = {stack.name for stack in catalog.stacks}
    head = OUTPUT if OUTPUT in names else EMBEDDING
    last = f"blk.{shape.n_layers - 1}."
    n_bytes, prompt, experts = Counter[str](), Counter[str](), Counter[str]()
    for stack in catalog.stacks:
        if stack.name == EMBEDDING != head:  # one row of it
            continue
        tier = plan.depths.tier(stack.name)
        is_expert = "_exps." in stack.name
        used = _expert_share(catalog) if is_expert else 1.0
        n_bytes[stack.type_at(tier)] += round(used * resident_bytes(stack, tier))
        is_late = stack.name.startswith(last) and not _FIRST.search(stack.name)
        if len(stack.shape) > 1 and stack.name != head and not is_late:
            counted = experts if is_expert else prompt
            counted[stack.type_at(tier)] += round(used * stack.n_weights)
    return Work(
        weight_bytes=dict(n_bytes),
        head=_head(catalog, plan, head),
        prompt_weights=dict(prompt),
        expert_weights=dict(experts),
        attention=_attention(catalog, shape),
        window=shape.window,
        layers=shape.n_layers,
        batch=plan.batch,
        model_bytes=plan.depths.weights_bytes,
    )


def _head(catalog: Catalog, plan: Plan, name: str) -> tuple[str, int]:
    stack = next(stack for stack in catalog.stacks if stack.name == name)
    tier = plan.depths.tier(name)
    return stack.type_at(tier), resident_bytes(stack, tier)


def _attention(catalog: Catalog, shape: Shape) -> tuple[int, int]:
    heads = catalog.manifest.model[f"{catalog.manifest.architecture}.attention.head_count"]
    per_layer, n_windowed = int(heads) * sum(shape.head_sizes), sum(shape.windowed)
    return per_layer * (shape.n_layers - n_windowed), per_layer * n_windowed


def _expert_share(catalog: Catalog) -> float:
    """Experts that a token is sent to, as a share of all."""
    model, prefix = catalog.manifest.model, f"{catalog.manifest.architecture}."
    used, n = model.get(f"{prefix}expert_used_count"), model.get(f"{prefix}expert_count")
    return used / n if used and n else 1.0


def token_seconds(device: Device, work: Work, n_before: int = 0) -> float:
    """Seconds of one token behind ``n_before`` others."""
    rates = device.decode_rates(work.model_bytes)
    weights = sum(n / rates.of(kind) for kind, n in work.weight_bytes.items())
    attention = work.attended(n_before) / device.attention_per_s.value
    return _fixed_seconds(device, work) + weights + attention


def prompt_seconds(device: Device, work: Work, n_tokens: int) -> float:
    """Seconds until a prompt of ``n_tokens`` is read, attention to its own tokens included."""
    rates, experts = device.prompt_rates(work.model_bytes), device.expert_rates(work.model_bytes)
    per_token = sum(2 * n / rates.of(kind) for kind, n in work.prompt_weights.items())
    per_token += sum(2 * n / experts.of(kind) for kind, n in work.expert_weights.items())
    per_token += work.layers * device.prompt_layer_seconds.value
    starts = range(0, n_tokens, work.batch)
    ends = [min(start + work.batch, n_tokens) for start in starts]
    pairs = zip(starts, ends, strict=True)
    first = work.attended(0)  # is in the rates, which a first group of cells was timed for
    attended = sum((end - start) * (work.attended(end) - first) for start, end in pairs)
    attention = attended / device.attention_per_s.value
    return n_tokens * per_token + attention + _batches_seconds(device, work, len(ends))


def _batches_seconds(device: Device, work: Work, n: int) -> float:
    """What ``n`` batches cost whatever their tokens; the last one computes the output head too."""
    rates = device.batch_rates(work.model_bytes)
    kind, head = work.head
    weights = sum(n_bytes / rates.of(k) for k, n_bytes in work.weight_bytes.items())
    weights -= head / rates.of(kind)
    attention = work.attended(0) / device.attention_per_s.value
    last = head / device.decode_rates(work.model_bytes).of(kind)
    return n * (_fixed_seconds(device, work) + weights + attention) + last


def _fixed_seconds(device: Device, work: Work) -> float:
    return device.token_seconds.value + work.layers * device.layer_seconds.value


@dataclass(frozen=True)
class Prediction:
    """How fast a plan is on a device.

    Attributes:
        decode_tokens_per_s: At the start of a conversation.
        late_tokens_per_s: With the context full.
        prompt_tokens_per_s: Of a prompt of `PROMPT_TOKENS`.
        read_seconds: To read what the plan needs of the artifact, cold; decoding comes on top.
    """

    decode_tokens_per_s: float
    late_tokens_per_s: float
    prompt_tokens_per_s: float
    read_seconds: float


def predict(device: Device, catalog: Catalog, plan: Plan) -> Prediction:
    """Everything about speed that follows from a profile and a plan."""
    work, prompt = work_of(catalog, plan), min(PROMPT_TOKENS, plan.context)
    return Prediction(
        decode_tokens_per_s=1 / token_seconds(device, work),
        late_tokens_per_s=1 / token_seconds(device, work, plan.context - 1),
        prompt_tokens_per_s=prompt / prompt_seconds(device, work, prompt),
        read_seconds=stored_bytes(catalog, plan) / device.storage_bytes_per_s.value,
    )


def stored_bytes(catalog: Catalog, plan: Plan) -> int:
    """Bytes of the artifact that a plan needs: the base, and the levels up to its depths."""
    depths = ((stack, stack.depth_of(plan.depths.tier(stack.name))) for stack in catalog.stacks)
    levels = (level.n_bytes for stack, depth in depths for level in stack.levels[1:depth])
    return catalog.manifest.base.n_bytes + sum(levels)
