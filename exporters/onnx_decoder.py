"""A decoder as plain facts and weights: what an ONNX graph is built from.

Which parts a layer has (norms before or behind, biases, norms of queries and keys, experts) follows
from the names of its tensors, which are llama.cpp's; `Decoder` has what names do not tell.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

F32Array = npt.NDArray[np.float32]

EMBEDDING, HEAD = "token_embd.weight", "output.weight"


@dataclass(frozen=True, eq=False)
class Rotation:
    """A table of rotations.

    Attributes:
        cos, sin: float32 ``[positions, rotated // 2]``.
        short: Not 0: the first ``short`` rows hold for contexts of up to that many tokens, the
            rows behind them for longer ones.
    """

    cos: F32Array
    sin: F32Array
    short: int = 0


@dataclass(frozen=True, eq=False)
class Decoder:
    """What a graph computes, weights aside.

    Attributes:
        n_layers, n_heads, n_kv_heads, head, hidden, vocab, context: Counts; ``head`` is a head's
            width, ``context`` the most tokens that the tables of rotations hold.
        norm_eps: Epsilon of the RMS norms.
        rotations: Tables; ``rotation_of``: for each layer the one it uses, None where it has none.
        is_interleaved: Neighbouring values of a head rotate together, else its two halves.
        windows: Tokens that each layer attends to; 0: all.
        score_scale: Factor on the attention's scores.
        score_cap, logit_cap: Soft bounds ``cap * tanh(x / cap)``; 0: none.
        embedding_scale: Factor on the embedding.
        activation: ``silu`` or ``gelu`` (its tanh form).
        n_used: Experts of a token; 0 without experts.
        renormalizes: The chosen experts' weights sum to one.
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    head: int
    hidden: int
    vocab: int
    context: int
    norm_eps: float
    rotations: tuple[Rotation, ...]
    rotation_of: tuple[int | None, ...]
    is_interleaved: bool
    windows: tuple[int, ...]
    score_scale: float
    score_cap: float = 0.0
    logit_cap: float = 0.0
    embedding_scale: float = 1.0
    activation: str = "silu"
    n_used: int = 0
    renormalizes: bool = True


@dataclass(frozen=True)
class Place:
    """Bytes of a data file; ``file`` is a plain name beside the graph."""

    file: str
    offset: int
    n_bytes: int


@dataclass(frozen=True)
class Array:
    """Values in a data file; ``dtype`` is numpy's name."""

    shape: tuple[int, ...]
    dtype: str
    place: Place


@dataclass(frozen=True)
class Term:
    """``factor * scale * code`` for every weight.

    Attributes:
        bits: Of a code: 2, 4 or 8, stored plus ``2**(bits - 1)``.
        codes: uint8 ``[..., rows, blocks, size * bits / 8]``, low bits first.
        scales: float16 ``[..., rows, blocks]``.
        factor: On the scales.
    """

    bits: int
    codes: Array
    scales: Array
    factor: int = 1


@dataclass(frozen=True)
class Quantized:
    """A matrix as the sum of terms.

    Attributes:
        shape: ``(rows, cols)`` or ``(experts, rows, cols)``.
        block: Weights that share a scale; the last block of a row may be padded with zeros.
        terms: At least one.
    """

    shape: tuple[int, ...]
    block: int
    terms: tuple[Term, ...]


Weights = Mapping[str, Array | Quantized]  # by llama.cpp's names, and those of `STACKED`


@dataclass(frozen=True)
class Stacked:
    """Matrices of one input that are stored, and multiplied with, as one.

    Attributes:
        name: Of the whole, within a layer.
        parts: Rows of which tensors, in order.
        is_woven: Rows of the parts alternate, as ONNX Runtime's experts want gate and up.
    """

    name: str
    parts: tuple[str, ...]
    is_woven: bool = field(default=False)


STACKED = (
    Stacked("attn_qkv", ("attn_q", "attn_k", "attn_v")),
    Stacked("ffn_gate_up", ("ffn_gate", "ffn_up")),
    Stacked("ffn_gate_up_shexp", ("ffn_gate_shexp", "ffn_up_shexp")),
    Stacked("ffn_gate_up_exps", ("ffn_gate_exps", "ffn_up_exps"), is_woven=True),
)
