"""Single layers run by transformers with weights that are handed in; see what flows inside them.

The model is built on the meta device by `edgekit.float_model`; it gives the arithmetic, the masks
and the rotary embeddings. The streams of hidden states live with the caller, so a dense and a
pruned model can walk side by side with one layer each in memory.
"""

from collections.abc import Callable, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from edgekit.arch import Mapping as TensorMapping
from edgekit.arch.source import widened
from edgekit.checkpoint import Checkpoint
from edgekit.float_model import EMBEDDING, HEAD, LinearInputs, build
from edgekit.pruning.weights import SHIFT, Layer, parameters

Tensor = Any
Ids = npt.NDArray[np.int64]
EXPERTS = {  # 3-D parameters, and the tensors of the GGUF that have the same input
    "mlp.experts.gate_up_proj": ("ffn_gate_exps.weight", "ffn_up_exps.weight"),
    "mlp.experts.down_proj": ("ffn_down_exps.weight",),
}
HEAD_ROWS = 1 << 14  # of the output head in float32 at a time: 128 MiB at a width of 2048


@dataclass
class Flow:
    """What one batch did inside one layer; tokens of the batch one after another.

    Attributes:
        attention, feed_forward: Output of the two blocks, ``[N, hidden]``, before any norm.
        out: The layer's output, ``[B, T, hidden]``.
        inputs: GGUF suffix -> input of that linear map, ``[n, cols]``; experts: a list. For a
            backward pass as it is in the graph, ``[B, T, cols]``.
        rows: Of each expert, the tokens its inputs belong to.
        shares: Of each expert, the router's weight of those tokens.
        gate: The shared expert's gate, ``[N, 1]``.
    """

    attention: Tensor = None
    feed_forward: Tensor = None
    out: Tensor = None
    inputs: dict[str, Any] = field(default_factory=dict)
    rows: list[Tensor] = field(default_factory=list)
    shares: list[Tensor] = field(default_factory=list)
    gate: Tensor = None


class Layers:
    """The layers of one configuration, without weights of their own."""

    def __init__(self, mapping: TensorMapping, config: Mapping[str, Any]) -> None:
        """Build for ``config``, of the same architecture as ``mapping``."""
        self.mapping = mapping
        self.model = build(mapping.arch.class_name, config)
        self._calls: dict[tuple[int, ...], list[dict[str, Any]]] = {}

    def start(self, checkpoint: Checkpoint, ids: Ids) -> Tensor:
        """The first layer's input for token ids ``[B, T]``, float32 ``[B, T, hidden]``."""
        used, places = np.unique(ids, return_inverse=True)
        is_bf16 = checkpoint.tensors[EMBEDDING].dtype == "BF16"
        rows = np.array(widened(checkpoint.read(EMBEDDING)[used], is_bf16))
        weights = {"embed_tokens.weight": torch.from_numpy(rows)}
        calls, inputs = [], list[Tensor]()

        def record(_: object, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
            inputs.append(args[0] if args else kwargs["hidden_states"])
            calls.append({k: v for k, v in kwargs.items() if k != "hidden_states"})

        model = self.model.model
        model.embed_tokens.padding_idx = None
        layers = list(model.layers)
        hooks = [x.register_forward_pre_hook(record, with_kwargs=True) for x in layers]
        try:
            with _passing_through(layers), torch.no_grad():
                given = {"input_ids": torch.from_numpy(places.reshape(ids.shape))}
                weights["norm.weight"] = torch.ones(self.mapping.hyper.sizes["embd"])
                torch.func.functional_call(model, weights, (), given | {"use_cache": False})
        finally:
            for hook in hooks:
                hook.remove()
        self._calls[ids.shape] = calls
        return inputs[0]

    def run(
        self, index: int, layer: Layer, hidden: Tensor, *, wants: bool = False, grad: bool = False
    ) -> Flow:
        """Run layer ``index`` on ``hidden`` ``[B, T, hidden]`` of a batch shape that was started.

        Args:
            index: Of the layer in this configuration.
            layer: Its weights.
            hidden: Its input.
            wants: Also keep the inputs of every linear map.
            grad: Record for a backward pass.
        """
        flow, module = Flow(), self.model.model.layers[index]
        weights = parameters(layer, self.mapping)
        experts = {w.data_ptr() for name in EXPERTS for w in weights.get(name, ())}
        names = {value.data_ptr(): suffix for suffix, value in layer.items() if value.ndim == 2}
        taken: dict[int, Tensor] = {}  # by the address of an expert's matrix

        def take(address: int, inputs: Tensor) -> None:
            if address in experts:
                taken[address] = inputs
            elif address in names:
                flow.inputs[names[address]] = inputs if grad else _rows(inputs)
            if inputs.requires_grad:
                inputs.retain_grad()

        with _watched(module, flow, layer), LinearInputs(take) if wants else nullcontext():  # noqa: SIM117
            with torch.enable_grad() if grad else torch.no_grad():
                call = self._calls[tuple(hidden.shape[:2])][index]
                flow.out = torch.func.functional_call(module, weights, (hidden,), call)
        for name, suffixes in EXPERTS.items() if wants and experts else ():
            empty = torch.zeros(0, weights[name].shape[-1])  # for an expert without a token
            seen = [taken.get(w.data_ptr(), empty) for w in weights[name]]
            flow.inputs |= dict.fromkeys(suffixes, seen)
        return flow

    def logits(self, checkpoint: Checkpoint, hidden: Tensor) -> Tensor:
        """Logits ``[n, vocab]`` of rows ``[n, hidden]``; the head is read some rows at a time."""
        norm = self._outside(checkpoint, "model.norm.weight")
        hidden = torch.func.functional_call(self.model.model.norm, {"weight": norm}, (hidden,))
        name = HEAD if self._has_head() else EMBEDDING
        n_rows = self.mapping.vocab_size
        cuts = (slice(at, at + HEAD_ROWS) for at in range(0, n_rows, HEAD_ROWS))
        parts = [hidden @ self._outside(checkpoint, name, rows).T for rows in cuts]
        logits = torch.cat(parts, 1)
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def _has_head(self) -> bool:
        pieces = [t.pieces[0].tensor for t in self.mapping.tensors if t.name == "output.weight"]
        return HEAD in pieces

    def _outside(self, checkpoint: Checkpoint, name: str, rows: slice | None = None) -> Tensor:
        is_bf16 = checkpoint.tensors[name].dtype == "BF16"
        return torch.from_numpy(np.array(widened(checkpoint.read(name, rows), is_bf16)))


@contextmanager
def _passing_through(layers: list[Any]) -> Any:
    """Inside, every layer gives back what it got."""
    for layer in layers:
        layer.forward = lambda hidden_states, **_: hidden_states
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


@contextmanager
def _watched(module: Any, flow: Flow, layer: Layer) -> Any:
    """Inside, the outputs of attention, feed-forward and router go into ``flow``."""
    hooks = []
    for name, owner in (("attn_output", module.self_attn), ("ffn_down", module.mlp)):
        shift = layer.get(f"{name}.{SHIFT}")
        if shift is not None:
            linear = owner.o_proj if name == "attn_output" else owner.down_proj
            hooks.append(linear.register_forward_hook(partial(_shifted, shift)))
    hooks += [_hook(module.self_attn.o_proj, lambda out: _keep(flow, "attention", out))]
    hooks.append(_hook(module.mlp, lambda out: _keep(flow, "feed_forward", out)))
    if hasattr(module.mlp, "experts"):
        hooks.append(_hook(module.mlp.gate, lambda out: _route(flow, out)))
    if hasattr(module.mlp, "shared_expert_gate"):
        hooks.append(_hook(module.mlp.shared_expert_gate, lambda out: _keep(flow, "gate", out)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _shifted(shift: Tensor, _module: object, _inputs: object, out: Tensor) -> Tensor:
    return out + shift


def _hook(module: Any, take: Callable[[Any], None]) -> Any:
    return module.register_forward_hook(lambda _, __, out: take(out))


def _keep(flow: Flow, name: str, out: Tensor) -> None:
    setattr(flow, name, _rows(out))


def _rows(values: Tensor) -> Tensor:
    return values.reshape(-1, values.shape[-1])


def _route(flow: Flow, out: tuple[Tensor, Tensor, Tensor]) -> None:
    """Tokens of each expert in the order in which transformers gathers them."""
    _, shares, chosen = out
    n_experts = out[0].shape[-1]
    for expert in range(n_experts):
        place, token = torch.where((chosen == expert).T)
        flow.rows.append(token)
        flow.shares.append(shares[token, place])
