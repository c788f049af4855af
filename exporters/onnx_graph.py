"""A graph under construction: nodes, initializers, and matrix products in every stored form."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgekit.exporters.onnx_decoder import Array, Quantized, Term

CONTRIB = "com.microsoft"
# Of MatMulNBits: activations in 8 bits. 0 computes in float, but has fast kernels for 4 bits only
FAST = 4
TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "uint8": TensorProto.UINT8,
}


class Graph:
    """Collects what a GraphProto is made of.

    Attributes:
        nodes, initializers: So far.
        accuracy_level: Of every quantized product.
        is_portable: Without attributes that onnxruntime before 1.32 refuses, as the ones of
            transformers.js 4.3 are.
    """

    def __init__(self, accuracy_level: int = FAST, *, is_portable: bool = True) -> None:
        """Begin empty."""
        self.is_portable = is_portable
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[TensorProto] = []
        self.accuracy_level = accuracy_level
        self._names: dict[object, str] = {}
        self._count = 0

    def op(
        self, kind: str, *inputs: str, n: int = 1, domain: str = "", name: str = "", **attrs: Any
    ) -> Any:
        """Append a node; give its output's name, or ``n`` names."""
        self._count += 1
        stem = name or f"{kind}_{self._count}"
        outputs = [stem] if n == 1 else [f"{stem}_{i}" for i in range(n)]
        self.nodes.append(
            helper.make_node(kind, list(inputs), outputs, f"node_{stem}", domain=domain, **attrs)
        )
        return outputs[0] if n == 1 else outputs

    def constant(self, values: Any, dtype: str) -> str:
        """A small initializer that is part of the graph's own file; equal ones are one."""
        array = np.array(values, dtype)
        key = (array.tobytes(), dtype, array.shape)
        if key not in self._names:
            self._names[key] = f"constant_{len(self._names)}"
            self.initializers.append(numpy_helper.from_array(array, self._names[key]))
        return self._names[key]

    def stored(self, name: str, array: Array, shape: Sequence[int] | None = None) -> str:
        """An initializer whose values lie in a data file, perhaps seen in another shape."""
        shape = tuple(array.shape if shape is None else shape)
        name = f"{name}:{'x'.join(map(str, shape))}" if shape != array.shape else name
        if name not in self._names:
            self._names[name] = name
            self.initializers.append(_external(name, array, shape))
        return name

    def half(self, name: str, array: Array, factor: int = 1) -> str:
        """Float16 scales as float32, times ``factor``; constant folding leaves an initializer."""
        key = ("half", name, factor)
        if key not in self._names:
            wide = self.op("Cast", self.stored(name, array), to=TensorProto.FLOAT)
            if factor != 1:
                wide = self.op("Mul", wide, self.constant(factor, "float32"))
            self._names[key] = wide
        return self._names[key]

    def linear(self, x: str, name: str, weight: Array | Quantized) -> str:
        """``x [..., cols]`` times the transpose of ``weight [rows, cols]``."""
        if isinstance(weight, Array):
            return str(
                self.op("FusedMatMul", x, self.stored(name, weight), domain=CONTRIB, transB=1)
            )
        terms = [self._product(x, name, weight, term) for term in weight.terms]
        return terms[0] if len(terms) == 1 else str(self.op("Sum", *terms))

    def _product(self, x: str, name: str, weight: Quantized, term: Term) -> str:
        rows, cols = weight.shape
        return str(
            self.op(
                "MatMulNBits",
                x,
                self.stored(_codes_name(name, term), term.codes),
                self.half(_scales_name(name, term), term.scales, term.factor),
                domain=CONTRIB,
                bits=term.bits,
                block_size=weight.block,
                K=cols,
                N=rows,
                accuracy_level=self.accuracy_level,
            )
        )

    def gathered(self, ids: str, name: str, weight: Array | Quantized) -> str:
        """Rows of ``weight [rows, cols]``: ``[..., cols]``."""
        if isinstance(weight, Array):
            return str(self.op("Gather", self.stored(name, weight), ids))
        rows, cols = weight.shape
        parts = []
        for term in weight.terms:
            n_bytes = term.codes.shape[1] * term.codes.shape[2]
            data = self.stored(_codes_name(name, term), term.codes, (rows, n_bytes))
            parts.append(
                self.op(
                    "GatherBlockQuantized",
                    data,
                    ids,
                    self.half(_scales_name(name, term), term.scales, term.factor),
                    domain=CONTRIB,
                    bits=term.bits,
                    block_size=weight.block,
                    gather_axis=0,
                    quantize_axis=1,
                )
            )
        found = parts[0] if len(parts) == 1 else str(self.op("Sum", *parts))
        padded = weight.terms[0].codes.shape[1] * weight.block
        return found if padded == cols else self.sliced(found, 0, cols)

    def whole(self, name: str, weight: Quantized) -> tuple[str, str, int]:
        """Codes, scales and bits of all experts of a matrix, ``[experts, rows, bytes of a row]``.

        An operator that takes whole codes only gets them composed of planes, when the model loads.
        """
        first, *rest = weight.terms
        codes = self._rows(name, first)
        bits = first.bits
        for term in rest:
            shared = term.bits == bits
            assert shared, "planes of a code double its bits"
            codes = self._composed(codes, self._rows(name, term), bits, term)
            bits *= 2
        scales = self.half(_scales_name(name, weight.terms[-1]), weight.terms[-1].scales)
        return codes, scales, bits

    def dequantized(self, name: str, weight: Quantized) -> str:
        """All experts in float32, computed when the model loads: to compare with, not to ship."""
        experts, rows, cols = weight.shape
        blocks = weight.terms[0].codes.shape[2]
        parts = []
        for term in weight.terms:
            fields = self._fields(self._rows(name, term), term.bits)
            codes = self.op("Sub", fields, self.constant(1 << (term.bits - 1), "int32"))
            wide = self.op("Cast", codes, to=TensorProto.FLOAT)
            wide = self.reshaped(wide, experts, rows, blocks, weight.block)
            scales = self.half(_scales_name(name, term), term.scales, term.factor)
            column = self.op("Unsqueeze", scales, self.constant([3], "int64"))
            parts.append(self.op("Mul", wide, column))
        whole = parts[0] if len(parts) == 1 else self.op("Sum", *parts)
        return self.reshaped(whole, experts, rows, cols)

    def _rows(self, name: str, term: Term) -> str:
        experts, rows, blocks, n_bytes = term.codes.shape
        return self.stored(_codes_name(name, term), term.codes, (experts, rows, blocks * n_bytes))

    def _composed(self, high: str, low: str, bits: int, term: Term) -> str:
        """Codes of ``2 * bits`` bits from two planes of ``bits`` bits, low bits first."""
        experts, rows, blocks, n_bytes = term.codes.shape
        fields = [self._fields(plane, bits) for plane in (high, low)]
        shifted = self.op("Mul", fields[0], self.constant(1 << bits, "int32"))
        code = self.op("Add", shifted, fields[1])
        code = self.op("Sub", code, self.constant(1 << (bits - 1), "int32"))
        per_byte = 8 // (2 * bits)
        width = 2 * blocks * n_bytes
        apart = self.constant([experts, rows, width, per_byte], "int64")
        code = self.op("Reshape", code, apart)
        places = self.constant([1 << (2 * bits * i) for i in range(per_byte)], "int32")
        code = self.op("Mul", code, places)
        last = self.constant([3], "int64")
        joined = self.op("ReduceSum", code, last, keepdims=0)
        return str(self.op("Cast", joined, to=TensorProto.UINT8))

    def _fields(self, plane: str, bits: int) -> str:
        """The codes in each byte, int32 ``[experts, rows, bytes, codes per byte]``."""
        wide = self.op("Cast", plane, to=TensorProto.INT32)
        column = self.op("Unsqueeze", wide, self.constant([3], "int64"))
        places = self.constant([1 << (bits * i) for i in range(8 // bits)], "int32")
        down = self.op("Div", column, places)
        return str(self.op("Mod", down, self.constant(1 << bits, "int32")))

    def sliced(self, x: str, start: int, stop: int, axis: int = -1) -> str:
        """Part of ``x`` along an axis."""
        ends = [self.constant([n], "int64") for n in (start, stop, axis)]
        return str(self.op("Slice", x, *ends))

    def reshaped(self, x: str, *shape: int) -> str:
        """``x`` in another shape; 0 keeps an extent, -1 takes the rest."""
        return str(self.op("Reshape", x, self.constant(shape, "int64")))


def _codes_name(name: str, term: Term) -> str:
    return f"{name}.codes.{term.codes.place.file}.{term.codes.place.offset}"


def _scales_name(name: str, term: Term) -> str:
    return f"{name}.scales.{term.scales.place.file}.{term.scales.place.offset}"


def _external(name: str, array: Array, shape: Sequence[int]) -> TensorProto:
    tensor = TensorProto(name=name, data_type=TYPES[array.dtype], dims=shape)
    tensor.data_location = TensorProto.EXTERNAL
    place = array.place
    for key, value in (
        ("location", place.file),
        ("offset", place.offset),
        ("length", place.n_bytes),
    ):
        tensor.external_data.add(key=key, value=str(value))
    return tensor
