"""Second moments of what linear maps read: of one map, and of all, layer by layer."""

from collections.abc import Iterator
from typing import Any

import torch

from edgekit.arch import Mapping
from edgekit.checkpoint import Checkpoint
from edgekit.devices.memory import free_memory
from edgekit.errors import DoesNotFitError
from edgekit.float_model import check_memory
from edgekit.pruning.layers import Ids, Layers
from edgekit.pruning.solve import checked_refit
from edgekit.pruning.weights import read_layer
from edgekit.sizes import format_size

Tensor = Any

HELD_OUT = 8  # one batch in so many checks the fit


class Moments:
    """Running sums over tokens, in place: features with themselves, and with a target.

    Every `HELD_OUT`-th batch is kept apart, to check what the others are fitted to.
    """

    def __init__(self, n_features: int, n_rows: int) -> None:
        """Start at zero."""
        self.n = [0, 0]
        self._gram = [torch.zeros(n_features, n_features) for _ in self.n]
        self._cross = [torch.zeros(n_rows, n_features) for _ in self.n]
        self.total = torch.zeros(n_features, dtype=torch.float64)

    @classmethod
    def like(cls, weight: Tensor) -> "Moments":
        """For the features of a linear map ``[rows, n]``."""
        return cls(weight.shape[1], weight.shape[0])

    def add(self, batch: int, x: Tensor, target: Tensor | None = None) -> None:
        """Add features ``[N, n]`` of a batch and what they should give, ``[N, rows]``."""
        part = int(batch % HELD_OUT == HELD_OUT - 1)
        self.n[part] += len(x)
        self._gram[part].addmm_(x.T, x)
        self.total += x.sum(0)
        if target is not None:
            self._cross[part].addmm_(target.T, x)

    def gram(self) -> Tensor:
        """The sum of ``x x^T`` over all tokens, ``[n, n]``."""
        return self._gram[0] + self._gram[1]

    def refit(self, weight: Tensor, kept: Tensor) -> Tensor:
        """``weight`` ``[rows, kept]``, tuned to give the target from the ``kept`` features.

        The sums are let go one by one: solving needs their room.
        """
        seen, held = (self._take(kept) for _ in self.n)
        if not self.n[0]:
            return weight
        fitted = as_moment(seen[0], self.n[0]), as_moment(seen[1], self.n[0])
        del seen
        return checked_refit(weight, fitted, held if self.n[1] else None).float()

    def _take(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        """The next part's sums over ``kept`` features; this has them no more."""
        gram, cross = self._gram.pop(0), self._cross.pop(0)
        return gram[kept[:, None], kept], cross[:, kept]


def as_moment(total: Tensor, n: int) -> Tensor:
    """A sum over ``n`` tokens as a mean, float64."""
    return total.to(torch.float64, copy=True).div_(max(n, 1))


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
            {n: [m.gram() for m in sums] for n, sums in names.items() if n in quantizable},
        )
