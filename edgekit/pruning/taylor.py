"""First-order effects of features on the loss, for the Taylor baseline: one layer at a time.

The backward pass goes through activations only and runs each layer again, so the memory is that of
one layer and of every layer's input. Ours does without; this is what it is compared with.
"""

from collections.abc import Sequence
from typing import Any

import torch

from edgekit.checkpoint import Checkpoint
from edgekit.pruning.layers import Flow, Ids, Layers
from edgekit.pruning.stages import DOWN, EXPERT_DOWN, OUT
from edgekit.pruning.weights import read_layer

Tensor = Any
Effects = dict[str, Any]  # GGUF suffix -> ``sum of x * dL/dx`` of each feature; experts: a list


def effects(checkpoint: Checkpoint, layers: Layers, batches: Sequence[Ids]) -> list[Effects]:
    """Effects in every layer, summed over batches; L is the mean loss of a batch's next tokens."""
    found: list[Effects] = [{} for _ in range(layers.mapping.hyper.n_layers)]
    for ids in batches:
        inputs = [layers.start(checkpoint, ids)]
        for index in range(len(found)):
            out = layers.run(index, read_layer(layers.mapping, index), inputs[-1]).out
            inputs.append(out.detach())
        gradient = _of_loss(checkpoint, layers, ids, inputs.pop())
        for index in reversed(range(len(found))):
            hidden = inputs.pop().requires_grad_()
            weights = read_layer(layers.mapping, index)
            flow = layers.run(index, weights, hidden, wants=True, grad=True)
            flow.out.backward(gradient)
            gradient = hidden.grad
            _add(found[index], flow)
    return found


def _of_loss(checkpoint: Checkpoint, layers: Layers, ids: Ids, hidden: Tensor) -> Tensor:
    """Gradient of the loss with respect to the final stream."""
    hidden = hidden.requires_grad_()
    rows = hidden[:, :-1].reshape(-1, hidden.shape[-1])
    targets = torch.from_numpy(ids[:, 1:].reshape(-1).copy())
    torch.nn.functional.cross_entropy(layers.logits(checkpoint, rows), targets).backward()
    return hidden.grad


def _add(found: Effects, flow: Flow) -> None:
    for suffix in (OUT, DOWN):
        if suffix in flow.inputs:
            found[suffix] = found.get(suffix, 0.0) + _product(flow.inputs[suffix])
    experts = [_product(x) for x in flow.inputs.get(EXPERT_DOWN, [])]
    before = found.get(EXPERT_DOWN, [0.0] * len(experts))
    if experts:
        found[EXPERT_DOWN] = [a + b for a, b in zip(before, experts, strict=True)]


def _product(x: Tensor) -> Tensor:
    """``sum of x * dL/dx`` over tokens, float64 ``[n]``; 0 where no token was."""
    if x.grad is None:
        return torch.zeros(x.shape[-1], dtype=torch.float64)
    return (x * x.grad).detach().reshape(-1, x.shape[-1]).double().sum(0)
