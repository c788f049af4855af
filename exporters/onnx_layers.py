"""The parts of a decoder as nodes: attention, feed-forward block, experts.

Operators are those that ONNX Runtime has fast kernels for on CPUs: GroupQueryAttention with its
rotation, MatMulNBits, QMoE.
"""

from dataclasses import dataclass
from typing import Any

from edgekit.exporters.onnx_decoder import Array, Decoder, Quantized, Rotation, Weights
from edgekit.exporters.onnx_graph import CONTRIB, FAST, Graph


@dataclass(frozen=True)
class Inputs:
    """Names of values that every layer reads; ``tables``: cos and sin of every rotation."""

    lengths: str
    total: str
    tables: tuple[tuple[str, str], ...]
    positions: tuple[str, ...]


class Layers:
    """Builds one layer after another into a graph."""

    def __init__(self, graph: Graph, decoder: Decoder, weights: Weights) -> None:
        """Take the graph to append to, the facts, and weights by name."""
        self.graph, self.decoder, self.weights = graph, decoder, weights

    def layer(self, x: str, index: int, inputs: Inputs) -> str:
        """Attention and feed-forward block with their norms and residuals, ``[B, S, hidden]``."""
        prefix = f"blk.{index}."
        y = self.attention(self.norm(x, f"{prefix}attn_norm"), index, inputs)
        x = self.graph.op("Add", x, self.norm(y, f"{prefix}post_attention_norm"))
        y = self.norm(x, f"{prefix}ffn_norm")
        y = self.experts(y, prefix) if self.decoder.n_used else self.feed_forward(y, prefix)
        return str(self.graph.op("Add", x, self.norm(y, f"{prefix}post_ffw_norm")))

    def norm(self, x: str, name: str) -> str:
        """RMS norm over the last axis; ``x`` itself where the model has no such norm."""
        weight = self.weights.get(f"{name}.weight")
        if weight is None:
            return x
        assert isinstance(weight, Array)
        stored = self.graph.stored(f"{name}.weight", weight)
        return str(
            self.graph.op(
                "SimplifiedLayerNormalization",
                x,
                stored,
                axis=-1,
                epsilon=self.decoder.norm_eps,
                stash_type=1,
            )
        )

    def linear(self, x: str, name: str) -> str:
        """Product with a matrix, and its bias where there is one."""
        y = self.graph.linear(x, f"{name}.weight", self.weights[f"{name}.weight"])
        bias = self.weights.get(f"{name}.bias")
        if bias is None:
            return y
        assert isinstance(bias, Array)
        return str(self.graph.op("Add", y, self.graph.stored(f"{name}.bias", bias)))

    def attention(self, x: str, index: int, inputs: Inputs) -> str:
        """Grouped-query attention over the cache and ``x``, which joins the cache."""
        d, prefix = self.decoder, f"blk.{index}."
        qkv = [self.linear(x, f"{prefix}attn_qkv"), "", ""]
        if f"{prefix}attn_q_norm.weight" in self.weights:
            qkv = self._normed(qkv[0], prefix)
        table = d.rotation_of[index]
        rotation = ["", "", ""]
        if table is not None:
            rotation = [*inputs.tables[table], inputs.positions[table]]
        context, *_ = self.graph.op(
            "GroupQueryAttention",
            *qkv,
            f"past_key_values.{index}.key",
            f"past_key_values.{index}.value",
            inputs.lengths,
            inputs.total,
            *_without_empty_end(rotation),
            n=3,
            name=f"present.{index}",
            domain=CONTRIB,
            num_heads=d.n_heads,
            kv_num_heads=d.n_kv_heads,
            scale=d.score_scale,
            softcap=d.score_cap,
            local_window_size=d.windows[index] or -1,
            do_rotary=int(table is not None),
            rotary_interleaved=int(d.is_interleaved),
        )
        self.graph.nodes[-1].output[1:] = [f"present.{index}.key", f"present.{index}.value"]
        return self.linear(context, f"{prefix}attn_output")

    def _normed(self, qkv: str, prefix: str) -> list[str]:
        """Queries, keys and values, the first two with norms per head or over all heads."""
        d = self.decoder
        sizes = [d.n_heads * d.head, d.n_kv_heads * d.head, d.n_kv_heads * d.head]
        q, k, v = self.graph.op("Split", qkv, self.graph.constant(sizes, "int64"), n=3, axis=-1)
        found = []
        for part, name, size in ((q, "attn_q_norm", sizes[0]), (k, "attn_k_norm", sizes[1])):
            weight = self.weights[f"{prefix}{name}.weight"]
            if weight.shape[0] == size:
                found.append(self.norm(part, f"{prefix}{name}"))
                continue
            heads = self.graph.reshaped(part, 0, 0, -1, d.head)
            found.append(self.graph.reshaped(self.norm(heads, f"{prefix}{name}"), 0, 0, size))
        return [*found, v]

    def feed_forward(self, x: str, prefix: str, kind: str = "") -> str:
        """``down(activation(gate(x)) * up(x))``; ``kind`` names the shared expert's matrices."""
        both = self.linear(x, f"{prefix}ffn_gate_up{kind}")
        gate, up = self.graph.op("Split", both, n=2, axis=-1, num_outputs=2)
        return self.linear(
            str(self.graph.op("Mul", self._activated(gate), up)), f"{prefix}ffn_down{kind}"
        )

    def _activated(self, x: str) -> str:
        if self.decoder.activation == "gelu":
            return str(self.graph.op("Gelu", x, approximate="tanh"))
        return str(self.graph.op("Mul", x, self.graph.op("Sigmoid", x)))

    def experts(self, x: str, prefix: str) -> str:
        """The chosen experts' weighted sum, and the shared expert's where there is one."""
        d = self.decoder
        rows = self.graph.reshaped(x, -1, d.hidden)
        scores = self.linear(rows, f"{prefix}ffn_gate_inp")
        names = [f"{prefix}ffn_gate_up_exps.weight", f"{prefix}ffn_down_exps.weight"]
        matrices = [self.weights[name] for name in names]
        attrs: dict[str, Any] = {
            "k": d.n_used,
            "activation_type": "swiglu",
            "activation_alpha": 1.0,
            "activation_beta": 0.0,
            "swiglu_fusion": 1,
            "normalize_routing_weights": 1,
        }
        if isinstance(matrices[0], Array) or self.graph.accuracy_level != FAST:
            y = self._float_experts(rows, scores, names, attrs)
        else:
            y = self._quantized_experts(rows, scores, names, attrs)
        if not d.renormalizes:
            y = self.graph.op("Mul", y, self._chosen_share(scores))
        whole = self.graph.op("Reshape", y, self.graph.op("Shape", x))
        if f"{prefix}ffn_gate_inp_shexp.weight" not in self.weights:
            return str(whole)
        gate = self.graph.op("Sigmoid", self.linear(x, f"{prefix}ffn_gate_inp_shexp"))
        shared = self.graph.op("Mul", gate, self.feed_forward(x, prefix, "_shexp"))
        return str(self.graph.op("Add", whole, shared))

    def _chosen_share(self, scores: str) -> str:
        """The probability of all chosen experts together, ``[rows, 1]``."""
        shares = self.graph.op("Softmax", scores, axis=-1)
        chosen, _ = self.graph.op(
            "TopK", shares, self.graph.constant([self.decoder.n_used], "int64"), n=2, axis=-1
        )
        return str(self.graph.op("ReduceSum", chosen, self.graph.constant([1], "int64")))

    def _float_experts(self, x: str, scores: str, names: list[str], attrs: dict[str, Any]) -> str:
        weights = [(name, self.weights[name]) for name in names]
        stored = [
            self.graph.stored(name, weight)
            if isinstance(weight, Array)
            else self.graph.dequantized(name, weight)  # QMoE rounds activations at 8 and 2 bits
            for name, weight in weights
        ]
        ends = [scores, stored[0], "", stored[1]]
        return str(self.graph.op("MoE", x, *ends, domain=CONTRIB, **attrs))

    def _quantized_experts(
        self, x: str, scores: str, names: list[str], attrs: dict[str, Any]
    ) -> str:
        inputs, bits, blocks = [], set(), set()
        for name in names:
            weight = self.weights[name]
            assert isinstance(weight, Quantized)
            codes, scales, width = self.graph.whole(name, weight)
            inputs += [codes, scales, ""]
            bits.add(width)
            blocks.add(weight.block)
        (width,), (block,) = bits, blocks
        if not self.graph.is_portable:  # experts of 4 bits are faster so
            attrs = attrs | {"accuracy_level": self.graph.accuracy_level}
        return str(
            self.graph.op(
                "QMoE",
                x,
                scores,
                *_without_empty_end(inputs),
                domain=CONTRIB,
                expert_weight_bits=width,
                block_size=block,
                **attrs,
            )
        )


def _without_empty_end(names: list[str]) -> list[str]:
    """Optional inputs that are left out at the end are not named at all."""
    while names and not names[-1]:
        names = names[:-1]
    return names


def rotation_positions(graph: Graph, rotation: Rotation, mask: str, ids: str) -> str:
    """Rows of a table with two parts for the new tokens, int64 ``[B, S]``; empty for one part."""
    if not rotation.short:
        return ""
    one = graph.constant([1], "int64")
    total = graph.op("ReduceMax", graph.op("ReduceSum", mask, one, keepdims=1), keepdims=0)
    is_long = graph.op("Greater", total, graph.constant(rotation.short, "int64"))
    first = graph.op("Where", is_long, graph.constant(rotation.short, "int64"),
                     graph.constant(0, "int64"))  # fmt: skip
    places = graph.op("CumSum", mask, graph.constant(1, "int64"))
    places = graph.op("Sub", places, graph.constant(1, "int64"))
    n_new = graph.op("Shape", ids, start=1, end=2)
    last = graph.op("Slice", places, graph.op("Neg", n_new), graph.constant([2**62], "int64"), one)
    return str(graph.op("Max", graph.op("Add", last, first), graph.constant(0, "int64")))
