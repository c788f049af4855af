"""A decoder's whole graph; inputs and outputs as genai, Optimum and transformers.js have them."""

import onnx
from onnx import TensorProto, helper

from edgekit.exporters.onnx_decoder import EMBEDDING, HEAD, Array, Decoder, Weights
from edgekit.exporters.onnx_graph import CONTRIB, FAST, Graph
from edgekit.exporters.onnx_layers import Inputs, Layers, rotation_positions

OPSET, IR_VERSION = 21, 10
KEEP = "num_logits_to_keep"
CACHE = ("batch_size", "past_sequence_length", "total_sequence_length")


def build(
    decoder: Decoder,
    weights: Weights,
    accuracy_level: int = FAST,
    *,
    is_portable: bool = True,
    has_keep: bool = False,
) -> onnx.ModelProto:
    """Build the graph; its weights are references into the data files.

    Args:
        decoder: Facts.
        weights: Every tensor by name, and ``rotation.N.cos`` and ``.sin`` for its tables.
        accuracy_level: 4 multiplies with activations in 8 bits, which is what has fast kernels;
            0 in float32.
        is_portable: For onnxruntime from 1.28 on, else from 1.32, whose experts are faster.
        has_keep: With an input ``num_logits_to_keep``: the head runs for so many positions from
            the end only. transformers.js knows it, genai does not.
    """
    graph = Graph(accuracy_level, is_portable=is_portable)
    layers = Layers(graph, decoder, weights)
    inputs = _inputs(graph, decoder, weights)
    x = graph.gathered("input_ids", EMBEDDING, weights[EMBEDDING])
    if decoder.embedding_scale != 1.0:
        x = graph.op("Mul", x, graph.constant(decoder.embedding_scale, "float32"))
    for index in range(decoder.n_layers):
        x = layers.layer(x, index, inputs)
    x = layers.norm(_kept(graph, x) if has_keep else x, "output_norm")
    name = HEAD if HEAD in weights else EMBEDDING
    logits = graph.linear(x, name, weights[name])
    if decoder.logit_cap:
        cap = graph.constant(decoder.logit_cap, "float32")
        logits = graph.op("Mul", graph.op("Tanh", graph.op("Div", logits, cap)), cap)
    graph.op("Identity", logits, name="logits")
    return _model(graph, decoder, has_keep)


def _kept(graph: Graph, x: str) -> str:
    """The last positions only, as many as ``num_logits_to_keep`` says."""
    ends = graph.constant([2**62], "int64"), graph.constant([1], "int64")
    return str(graph.op("Slice", x, graph.op("Neg", graph.reshaped(KEEP, 1)), *ends))


def _inputs(graph: Graph, decoder: Decoder, weights: Weights) -> Inputs:
    one = graph.constant([1], "int64")
    counts = graph.op("ReduceSum", "attention_mask", one, keepdims=0)
    lengths = graph.op("Cast", graph.op("Sub", counts, one), to=TensorProto.INT32)
    total = graph.op("Shape", "attention_mask", start=1, end=2)
    scalar = graph.op("Squeeze", total, graph.constant([0], "int64"))
    tables, positions = [], []
    for i, rotation in enumerate(decoder.rotations):
        names = f"rotation.{i}.cos", f"rotation.{i}.sin"
        arrays = [weights[name] for name in names]
        assert isinstance(arrays[0], Array) and isinstance(arrays[1], Array)
        tables.append((graph.stored(names[0], arrays[0]), graph.stored(names[1], arrays[1])))
        positions.append(rotation_positions(graph, rotation, "attention_mask", "input_ids"))
    return Inputs(
        lengths, graph.op("Cast", scalar, to=TensorProto.INT32), tuple(tables), tuple(positions)
    )


def _model(graph: Graph, decoder: Decoder, has_keep: bool) -> onnx.ModelProto:
    batch, past, total = CACHE
    ints, floats = TensorProto.INT64, TensorProto.FLOAT
    value = helper.make_tensor_value_info
    inputs = [
        value("input_ids", ints, [batch, "sequence_length"]),
        value("attention_mask", ints, [batch, total]),
    ]
    length = "logits_length" if has_keep else "sequence_length"
    outputs = [value("logits", floats, [batch, length, decoder.vocab])]
    heads, width = decoder.n_kv_heads, decoder.head
    for layer in range(decoder.n_layers):
        for part in ("key", "value"):
            before: list[str | int | None] = [batch, heads, past, width]
            after: list[str | int | None] = [batch, heads, total, width]
            inputs.append(value(f"past_key_values.{layer}.{part}", floats, before))
            outputs.append(value(f"present.{layer}.{part}", floats, after))
    if has_keep:
        inputs.append(value(KEEP, ints, []))
    made = helper.make_graph(graph.nodes, "decoder", inputs, outputs, graph.initializers)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
    return helper.make_model(
        made, opset_imports=opsets, ir_version=IR_VERSION, producer_name="edgekit"
    )
