"""Second moments of every linear map's inputs, one layer of the model at a time."""

from collections.abc import Iterator
from typing import Any

from edgekit.arch import Mapping
from edgekit.checkpoint import Checkpoint
from edgekit.pruning.layers import Ids, Layers
from edgekit.pruning.stages import Moments
from edgekit.pruning.weights import read_layer

Tensor = Any


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
