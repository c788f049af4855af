"""The dense and the pruned model side by side, layer by layer, on the same tokens."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from edgekit.checkpoint import Checkpoint
from edgekit.pruning.cut import Cut, cut_config
from edgekit.pruning.layers import Ids, Layers
from edgekit.pruning.stages import Goal, Recipe, prune_layer
from edgekit.pruning.taylor import Effects
from edgekit.pruning.weights import Layer, read_layer

Tensor = Any
Streams = list[Tensor]  # hidden states of every batch, float32 [B, T, hidden]


@dataclass(frozen=True, eq=False)
class State:
    """Where a walk stands.

    Attributes:
        position: Layers of the pruned model that are done.
        dense: The dense stream in front of the next layer that stays, batch by batch.
        pruned: The pruned one.
        others: Streams that only follow the pruned layers, to measure with.
    """

    position: int
    dense: Streams
    pruned: Streams
    others: Streams

    def arrays(self) -> dict[str, npt.NDArray[np.float32]]:
        """For a file; `with_arrays` is the way back."""
        named = {"dense": self.dense, "pruned": self.pruned, "others": self.others}
        return {f"{k}{i}": x.numpy() for k, xs in named.items() for i, x in enumerate(xs)}

    def with_arrays(self, position: int, arrays: Any) -> "State":
        """The same batches as they are after ``position`` layers."""
        return State(
            position,
            *(
                [torch.from_numpy(arrays[f"{key}{i}"]) for i in range(len(getattr(self, key)))]
                for key in ("dense", "pruned", "others")
            ),
        )


class Walk:
    """Prunes layer after layer to one cut."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        dense: Layers,
        cut: Cut,
        recipe: Recipe,
        effects: Sequence[Effects] = (),
    ) -> None:
        """Build the pruned configuration; ``effects`` are for Taylor."""
        self.checkpoint, self.cut, self.recipe, self.effects = checkpoint, cut, recipe, effects
        config = cut_config(dict(checkpoint.config), dense.mapping, cut)
        self.dense, self.pruned = dense, Layers(dense.mapping, config)

    def start(self, batches: Sequence[Ids], others: Sequence[Ids] = ()) -> State:
        """In front of the first layer that stays; those removed before it are run."""
        first = [self.dense.start(self.checkpoint, ids) for ids in batches]
        for ids in batches:
            self.pruned.start(self.checkpoint, ids)
        other = [self.pruned.start(self.checkpoint, ids) for ids in others]
        ahead = first
        for index in range(self.cut.layers[0]):
            ahead = self._through(index, read_layer(self.dense.mapping, index), ahead)
        return State(0, ahead, first, other)

    def run(self, state: State) -> Iterator[tuple[int, Layer, State]]:
        """Prune what is left: index of each layer in the dense model, its weights, the state."""
        for position in range(state.position, len(self.cut.layers)):
            index = self.cut.layers[position]
            layer, dense = self._prune(position, state)
            follow = (self._after(position, layer, xs) for xs in (state.pruned, state.others))
            state = State(position + 1, dense, *follow)
            yield index, layer, state
            del layer, dense  # the next layer needs their room

    def finish(self, batches: Sequence[Ids], others: Sequence[Ids] = ()) -> State:
        """Prune all layers, keeping none; the streams at the end."""
        state = self.start(batches, others)
        for done in self.run(state):
            state = done[-1]
            del done
        return state

    def _prune(self, position: int, state: State) -> tuple[Layer, Streams]:
        """The layer at ``position``, and the dense stream in front of the next that stays."""
        index, weights = self.cut.layers[position], self._weights(position)
        goal, behind = Goal.of(self.dense, weights, index, state.dense)
        for removed in range(index + 1, self._next(position)):
            behind = self._through(removed, read_layer(self.dense.mapping, removed), behind)
        if goal.is_residual:
            flat = [x.reshape(-1, x.shape[-1]) for x in behind]
            goal = replace(goal, feed_forward=flat)
        layers, places = (self.dense, self.pruned), (index, position)
        seen = self.effects[index] if self.effects else None
        args = (layers, places, weights, goal, state.pruned, self.cut, self.recipe, seen)
        return prune_layer(*args), behind

    def _weights(self, position: int) -> Layer:
        return read_layer(self.dense.mapping, self.cut.layers[position])

    def _next(self, position: int) -> int:
        """Index of the next layer that stays, or the number of layers."""
        after = self.cut.layers[position + 1 :]
        return after[0] if after else self.dense.mapping.hyper.n_layers

    def _through(self, index: int, weights: Layer, streams: Streams) -> Streams:
        return [self.dense.run(index, weights, hidden).out for hidden in streams]

    def _after(self, position: int, layer: Layer, streams: Streams) -> Streams:
        return [self.pruned.run(position, layer, hidden).out for hidden in streams]
