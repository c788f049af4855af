"""The Fisher diagonal of every weight matrix, one layer of weights in memory at a time.

The diagonal is that of the true Fisher matrix: gradients of the log likelihood of tokens that are
sampled from the model itself, not of those of the text; only then is it the curvature of the KL
divergence (Kunstner et al., arXiv 1905.12558). One backward pass per sequence, of the sum over its
tokens: tokens are sampled independently, so products of gradients of two of them have mean zero and
the square of the sum is, on average, the sum of the squares.

A sequence runs forward through all layers, which keeps the input of each; then each layer is
loaded again, last first, runs again from its input, and passes the gradient on. What is in memory
is one layer, its gradients, and the inputs of all layers for one sequence.

Where the embedding is the head too, the squares of both uses are added; the product of both, whose
sign is as often plus as minus, is left out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from edgekit.arch import Mapping, SourceTensor, map_checkpoint
from edgekit.arch.source import Piece, interleaved
from edgekit.checkpoint import Checkpoint
from edgekit.errors import RefusedError
from edgekit.float_model import FloatModel, check_memory
from edgekit.progress import Progress, Silent
from edgekit.samples import CALIBRATION_TEXT
from edgekit.sensitivity import EMBEDDING as GGUF_EMBEDDING
from edgekit.sensitivity import Fisher
from edgekit.text import read_text, token_chunks, vocabulary

Ids = npt.NDArray[np.int64]

SEQUENCE_TOKENS = 512  # as calibration's chunks
# Losses of a tensor from 8, 16 and 64 sequences differ by 4 %, the tiers chosen by 0.1 % of the KL.
# With four times the work per token as calibrating, 16 sequences cost as much as its 64 chunks.
MAX_SEQUENCES = 16
SEED = 0
HINT = "close other programs"


def collect_fisher(
    checkpoint: Checkpoint,
    text: Path | None = None,
    *,
    mapping: Mapping | None = None,
    sequence_tokens: int = SEQUENCE_TOKENS,
    max_sequences: int = MAX_SEQUENCES,
    progress: Progress | None = None,
) -> Fisher:
    """Collect the Fisher diagonal of a checkpoint over a text.

    Args:
        checkpoint: With tokenizer files in its folder.
        text: UTF-8 file; ``None`` takes the text that comes with edgekit.
        mapping: Of the checkpoint, when it is at hand.
        sequence_tokens: Tokens that attend to each other.
        max_sequences: Sequences to run; fewer when the text has fewer.
        progress: Told every sequence.

    Raises:
        DoesNotFitError: The largest layer with its gradients does not fit into free memory.
        UsageError: The text is too short. RefusedError: the gradients are not finite.
    """
    path, progress = text or CALIBRATION_TEXT, progress or Silent()
    mapping = mapping or map_checkpoint(checkpoint)
    longest = int(mapping.metadata[f"{mapping.architecture}.context_length"].value)
    sequence_tokens = min(sequence_tokens, longest)
    check_memory(mapping, sequence_tokens, with_head=True, with_gradients=True, hint=HINT)
    with vocabulary(checkpoint, mapping) as vocab:
        sequences = token_chunks(vocab, read_text(path), sequence_tokens, max_sequences, str(path))
    collector = FisherCollector(FloatModel(checkpoint, mapping))
    progress.start("sensitivity", len(sequences))
    for ids in sequences:
        collector.run(ids)
        progress.advance(1)
    return collector.fisher()


class FisherCollector:
    """Sums of squared gradients of every quantizable tensor of a `FloatModel`."""

    def __init__(self, model: FloatModel, seed: int = SEED) -> None:
        """Start at zero; ``seed`` is of the sampled tokens."""
        self._model, self._gradients = model, Gradients(model, seed)
        self._rows: dict[str, npt.NDArray[np.float64]] = {}  # [experts, rows]
        self._cols: dict[str, npt.NDArray[np.float64]] = {}  # [experts, cols]
        self._places: dict[str, list[_Place]] = {}  # checkpoint tensor -> GGUF tensors
        self._counts = (0, 0)
        for tensor in model.mapping.tensors:
            if tensor.quantizable:
                experts = tensor.shape[0] if len(tensor.shape) == 3 else 1
                self._rows[tensor.name] = np.zeros((experts, tensor.shape[-2]))
                self._cols[tensor.name] = np.zeros((experts, tensor.shape[-1]))
                self._locate(tensor)

    def run(self, ids: Ids) -> None:
        """Run a sequence ``[T]`` and add its squares.

        Raises:
            RefusedError: A gradient is not finite.
        """
        self._add_rows(self._gradients.run(ids, self._add), np.unique(ids))
        self._counts = (self._counts[0] + 1, len(ids))
        for name, sums in self._cols.items():
            if not np.isfinite(sums).all():
                raise _broken(self._model, f"the gradient of '{name}' is not finite")

    def fisher(self) -> Fisher:
        """The sums so far."""
        rows, cols = (
            {name: sums.astype(np.float32) for name, sums in kind.items()}
            for kind in (self._rows, self._cols)
        )
        return Fisher(rows, cols, *self._counts)

    def _locate(self, tensor: SourceTensor) -> None:
        """Note which rows of the checkpoint's tensors become those of a GGUF matrix."""
        at = 0
        for piece in tensor.pieces if len(tensor.shape) == 2 else ():
            order = interleaved(tensor.heads, piece.n_rows) if tensor.heads else slice(None)
            place = _Place(tensor.name, at, piece, order)
            self._places.setdefault(piece.tensor, []).append(place)
            at += piece.n_rows

    def _add(self, name: str, gradient: Any) -> None:
        """Add the square of a parameter's gradient, which is squared in place."""
        squares = gradient.square_()
        experts = self._model.expert_tensors(name)
        if experts:
            for target, part in zip(experts, squares.chunk(len(experts), dim=1), strict=True):
                self._rows[target] += _sums(part, 2)
                self._cols[target] += _sums(part, 1)
            return
        for place in self._places.get(self._model.stored_name(name), ()):
            part = squares[place.piece.first : place.piece.first + place.piece.n_rows]
            at = slice(place.at, place.at + len(part))
            self._rows[place.name][0, at] += _sums(part, 1)[place.order]
            self._cols[place.name][0] += _sums(part, 0)

    def _add_rows(self, gradient: Any, rows: Ids) -> None:
        """Add the square of the gradient of some rows of the embedding."""
        squares = gradient.square_()
        self._rows[GGUF_EMBEDDING][0, rows] += _sums(squares, 1)
        self._cols[GGUF_EMBEDDING][0] += _sums(squares, 0)


def _broken(model: FloatModel, what: str) -> RefusedError:
    folder = model.checkpoint.folder
    return RefusedError(f"{folder}: {what}; the weights are broken, get the checkpoint again")


@dataclass(frozen=True, eq=False)
class _Place:
    """A piece of a checkpoint's tensor is, in ``order``, rows ``at`` and on of GGUF ``name``."""

    name: str
    at: int
    piece: Piece
    order: Any


def _sums(squares: Any, axis: int) -> npt.NDArray[np.float64]:
    sums: npt.NDArray[np.float64] = squares.sum(axis, dtype=torch.float64).numpy()
    return sums


Take = Callable[[str, Any], None]  # a parameter's name, its gradient


@dataclass(frozen=True)
class _Stage:
    """A module as it was called: where its input came from, and that input cut off from there."""

    module: Any
    origin: Any
    start: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Gradients:
    """Runs sequences forward through a `FloatModel` and back, one layer in memory at a time."""

    def __init__(self, model: FloatModel, seed: int) -> None:
        """Take the model over: its ``on_load`` and calls of its layers."""
        self._model, self._inner = model, model.model.model
        self._generator = torch.Generator().manual_seed(seed)
        self._stages: list[_Stage] = []
        self._parameters: dict[str, Any] = {}
        self._goes_back = False
        model.on_load = self._loaded
        for module in (*self._inner.layers, self._inner.norm):
            module.register_forward_pre_hook(self._cut, with_kwargs=True)

    def run(self, ids: Ids, take: Take) -> Any:
        """Differentiate the log likelihood of a token sampled at every position of ``[T]``.

        Args:
            ids: One sequence.
            take: Given the gradient of every parameter but the embedding's lookup.

        Returns:
            The gradient of the rows of the embedding that ``ids`` use, in order.
        """
        self._stages.clear()
        self._goes_back = False
        placed = self._model.placed(ids[None])
        embedding = self._inner.embed_tokens.weight.requires_grad_()
        logits = self._model.model(input_ids=placed, use_cache=False).logits[0]
        *layers, head = self._stages
        self._goes_back = True
        upstream = self._back(self._loss(logits), head, None, take)
        del logits
        while layers:
            stage = layers.pop()
            origin = stage.origin
            output = stage.module(stage.start.requires_grad_(), *stage.args, **stage.kwargs)
            upstream = self._back(output, stage, upstream, take)
        return torch.autograd.grad(origin, embedding, upstream)[0]

    def _loss(self, logits: Any) -> Any:
        chances = logits.detach().softmax(-1)
        if not torch.isfinite(chances).all():
            raise _broken(self._model, "its logits are not finite")
        sampled = torch.multinomial(chances, 1, generator=self._generator)[:, 0]
        return torch.nn.functional.cross_entropy(logits, sampled, reduction="sum")

    def _cut(self, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """On the way forward, keep a module's input and let no gradient through it."""
        if self._goes_back:
            return None
        origin, *rest = args
        start = origin.detach()
        if module is self._inner.norm:  # what follows is differentiated at once
            start.requires_grad_()
        self._stages.append(_Stage(module, origin, start, tuple(rest), kwargs))
        return (start, *rest), kwargs

    def _loaded(self, name: str, parameter: Any) -> None:
        if self._goes_back or not name.startswith("model.layers."):
            self._parameters[name] = parameter.requires_grad_()

    def _back(self, output: Any, stage: _Stage, upstream: Any, take: Take) -> Any:
        """Differentiate a stage by its parameters; the gradient of its input."""
        of = [stage.start, *self._parameters.values()]
        gradient, *gradients = torch.autograd.grad(output, of, upstream)
        for name in list(self._parameters):
            take(name, gradients.pop(0))
            del self._parameters[name]
        return gradient
