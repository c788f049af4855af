"""Second moments of every linear map's inputs, one layer of the model at a time."""

from collections.abc import Iterator
from typing import Any

from edgekit.arch import Mapping
from edgekit.checkpoint import Checkpoint
from edgekit.devices.memory import free_memory
from edgekit.errors import DoesNotFitError
from edgekit.float_model import check_memory
from edgekit.pruning.layers import Ids, Layers
from edgekit.pruning.stages import Moments
from edgekit.pruning.weights import read_layer
from edgekit.sizes import format_size

Tensor = Any


def require_memory(mapping: Mapping, ids: Ids, hint: str) -> None:
    """Compare the largest layer, its moments and the streams with what is free.

    Args:
        mapping: Of the model.
        ids: Tokens ``[B, T]`` that moments are taken from.
        hint: The next step, for the message.

    Raises:
        DoesNotFitError: More is needed than is free.
    """
    check_memory(mapping, ids.shape[1], with_head=False, hint=hint)
    width = max(t.shape[-1] for t in mapping.tensors if "ffn_down" in t.name)
    experts = max(mapping.hyper.n_experts, 1)
    moments = 4 * 8 * width**2 + 8 * experts * width**2  # a few in float64, two float32 sums each
    streams = 6 * 4 * ids.size * mapping.hyper.sizes["embd"]
    free = free_memory()
    if moments + streams > free.n_bytes:
        raise DoesNotFitError(
            f"second moments of {width} features over {ids.size} tokens need "
            f"{format_size(moments + streams)}, {format_size(free.n_bytes)} are free "
            f"({free.source}); {hint}"
        )


def layer_moments(
    checkpoint: Checkpoint, mapping: Mapping, parts: list[Ids]
) -> Iterator[tuple[int, dict[str, list[Tensor]]]]:
    """Layer by layer: GGUF name -> sum of ``x x^T`` over the inputs, one per expert.

    Args:
        checkpoint: Of the model.
        mapping: Of the checkpoint.
        parts: Batches of token ids ``[B, T]``.
    """
    layers = Layers(mapping, checkpoint.config)
    streams = [layers.start(checkpoint, ids) for ids in parts]
    for index in range(mapping.hyper.n_layers):
        weights, seen = read_layer(mapping, index), dict[str, list[Moments]]()
        for batch, hidden in enumerate(streams):
            flow = layers.run(index, weights, hidden, wants=True)
            for suffix, inputs in flow.inputs.items():
                each = inputs if isinstance(inputs, list) else [inputs]
                sums = seen.setdefault(suffix, [Moments(x.shape[-1], 0) for x in each])
                for moments, x in zip(sums, each, strict=True):
                    moments.add(batch, x)
            streams[batch] = flow.out
        names = {f"blk.{index}.{suffix}": sums for suffix, sums in seen.items()}
        quantizable = {t.name for t in mapping.tensors if t.quantizable}
        yield (
            index,
            {n: [m.gram.sum(0) for m in sums] for n, sums in names.items() if n in quantizable},
        )
