"""A model that exists nowhere: a Llama, or a mixture of experts, of any shape and one ggml type.

Its blocks are random and made while it is read; `edgekit.probe` times llama.cpp on it. Every matrix
repeats the same quantized weights, so a model of any size costs a few kilobytes.
"""

import bisect
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

from edgekit.kernels.ggml import TYPES, quantize, row_bytes
from edgekit.llama import VirtualFile

PATTERN_ROWS, PATTERN_COLS = 8, 4096  # weights that are quantized
PATTERN_BYTES = 2 << 20  # of them repeated: what one read gives at most
HEAD_SIZE = 64
N_USED = 2  # experts of a token
ROUTER = "ffn_gate_inp"
ONES = np.ones(1024, np.float32).tobytes()  # the weights of norms


@dataclass(frozen=True)
class ProbeShape:
    """A Llama with a tied head: every matrix of ggml type ``kind``; ``experts`` in each block."""

    kind: str
    layers: int
    width: int
    feed_forward: int
    vocab: int
    context: int
    experts: int = 0

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name and numpy shape of every tensor, in file order."""
        width, ffn, kv = self.width, self.feed_forward, self.width // 4
        block = {
            "attn_norm": (width,),
            "attn_q": (width, width),
            "attn_k": (kv, width),
            "attn_v": (kv, width),
            "attn_output": (width, width),
            "ffn_norm": (width,),
        }
        if self.experts:
            block[ROUTER] = (self.experts, width)
            each = {"ffn_gate": (ffn, width), "ffn_up": (ffn, width), "ffn_down": (width, ffn)}
            block |= {f"{name}_exps": (self.experts, *shape) for name, shape in each.items()}
        else:
            block |= {"ffn_gate": (ffn, width), "ffn_up": (ffn, width), "ffn_down": (width, ffn)}
        rows = {"token_embd.weight": (self.vocab, width), "output_norm.weight": (width,)}
        for layer in range(self.layers):
            rows |= {f"blk.{layer}.{name}.weight": shape for name, shape in block.items()}
        return rows

    def kind_of(self, name: str) -> str:
        """The ggml type of a tensor: norms and routers stay as they are."""
        return "F32" if "_norm." in name or ROUTER in name else self.kind

    @property
    def weights_bytes(self) -> int:
        """Bytes of all matrices: without experts what one token touches."""
        shapes = (shape for name, shape in self.tensors.items() if "_norm." not in name)
        return sum(math.prod(rows) * row_bytes(self.kind, cols) for *rows, cols in shapes)

    @property
    def prompt_weights(self) -> int:
        """Weights that each token of a prompt is multiplied with, where one gets logits.

        The last block computes keys and values for all of them, the rest for that one.
        """
        width, ffn, kv = self.width, self.feed_forward, self.width // 4
        block = 2 * width * width + 2 * kv * width + (0 if self.experts else 3 * ffn * width)
        return (self.layers - 1) * block + width * width + 2 * kv * width

    @property
    def expert_weights(self) -> int:
        """Weights of experts that each token of a prompt is multiplied with, likewise."""
        return (self.layers - 1) * self._n_used * 3 * self.feed_forward * self.width

    @property
    def used_bytes(self) -> int:
        """Bytes of the experts that a token is sent to."""
        ffn, width = self.feed_forward, self.width
        rows = 2 * ffn * row_bytes(self.kind, width) + width * row_bytes(self.kind, ffn)
        return self.layers * self._n_used * rows

    @property
    def _n_used(self) -> int:
        return N_USED if self.experts else 0

    @property
    def attention(self) -> int:
        """Elements of keys and values that a token reads for each one before it, in all heads."""
        return self.layers * 2 * self.width


class ProbeModel(VirtualFile):
    """The bytes of a GGUF of ``shape``; what `edgekit.llama.open_model` takes."""

    def __init__(self, shape: ProbeShape) -> None:
        """Quantize a few rows."""
        self.shape = shape
        self._header, self._starts, self._ends = _laid_out(shape)
        rows = np.random.default_rng(0).standard_normal((PATTERN_ROWS, PATTERN_COLS), np.float32)
        weights = np.ones(PATTERN_COLS, np.float32) if TYPES[shape.kind].needs_imatrix else None
        matrix = quantize(shape.kind, 0.02 * rows, weights).tobytes()
        repeated = matrix * (PATTERN_BYTES // len(matrix) + 1)
        routes = (0.02 * rows).tobytes()  # which send tokens to all of the experts
        self._patterns = [
            ONES if "_norm." in name else routes if ROUTER in name else repeated
            for name in shape.tensors
        ]

    @property
    def size(self) -> int:
        """Bytes in all."""
        return self._ends[-1]

    def read(self, offset: int, n: int) -> bytes:
        """Give at least one and at most ``n`` bytes from ``offset``."""
        if offset < len(self._header):
            return self._header[offset : offset + n]
        index = bisect.bisect_right(self._starts, offset) - 1
        if offset >= self._ends[index]:  # padding before the next tensor
            return bytes(min(n, self._starts[index + 1] - offset))
        pattern = self._patterns[index]
        at = (offset - self._starts[index]) % len(pattern)
        return pattern[at : at + min(n, self._ends[index] - offset)]


def _laid_out(shape: ProbeShape) -> tuple[bytes, list[int], list[int]]:
    """The header by gguf's own writer, and where each tensor starts and ends."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "probe.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        _add_facts(writer, shape)
        sizes = []
        for name, extents in shape.tensors.items():
            kind = TYPES[shape.kind_of(name)]
            sizes.append(math.prod(extents[:-1]) * row_bytes(kind.name, extents[-1]))
            raw = gguf.GGMLQuantizationType(kind.id)
            stored = (*extents[:-1], row_bytes(kind.name, extents[-1]))
            writer.add_tensor_info(name, stored, np.dtype(np.uint8), sizes[-1], raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        header = path.read_bytes()
    header += bytes(-len(header) % 32)
    starts, ends, at = [], [], len(header)
    for size in sizes:
        starts.append(at)
        ends.append(at + size)
        at += -(-size // 32) * 32
    return header, starts, ends


def _add_facts(writer: gguf.GGUFWriter, shape: ProbeShape) -> None:
    heads = shape.width // HEAD_SIZE
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads // 4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HEAD_SIZE)
    writer.add_vocab_size(shape.vocab)
    writer.add_tokenizer_model("none")
    if shape.experts:
        writer.add_expert_count(shape.experts)
        writer.add_expert_used_count(N_USED)
