"""Perplexity of a model on a text, and its KL divergence from a reference.

Definitions are those of llama-perplexity: a text is cut into chunks of ``context`` tokens that do
not overlap, BOS in place of the first token where the model wants one, and the tokens after the
first half of each chunk are scored, so that every score has at least half a context to look at.
Two things are stricter than there: the KV cache is float32 and flash attention is off, so that the
figures are those of the weights alone, and sums are in float64. Texts given one by one (stories)
are scored whole, each behind its own BOS.
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.arch import map_checkpoint
from edgekit.checkpoint import Checkpoint
from edgekit.disk import disk_full_reported, require_free, temporary_folder
from edgekit.errors import EdgekitError, UsageError
from edgekit.llama import Context, Model, VirtualFile, open_model
from edgekit.text import token_chunks, vocabulary

F32Array = npt.NDArray[np.float32]
F64Array = npt.NDArray[np.float64]
Text = str | Sequence[str]
Source = Path | VirtualFile

CONTEXT = 512  # llama-perplexity's default
BATCH = 128  # positions whose logits are in memory at once; 64 MiB for 128 k tokens
ROWS = 16  # of them in float64 at once


@dataclass(frozen=True)
class Quality:
    """How well a model predicts a text, and how far it is from its reference.

    Attributes:
        n_tokens: Tokens scored.
        ppl: Perplexity, ``exp`` of the mean negative log likelihood of the scored tokens.
        ref_ppl: The reference's; ``None`` without a reference, as all below but the bytes.
        kl_mean: Mean over positions of KL(reference || model), nats.
        kl_p99: Its 99th percentile.
        top1_agreement: Share of positions where both find the same token most likely.
        weights_bytes: Bytes of the model's tensors.
        kl_error: Standard error of ``kl_mean``.
    """

    n_tokens: int
    ppl: float
    ref_ppl: float | None
    kl_mean: float | None
    kl_p99: float | None
    top1_agreement: float | None
    weights_bytes: int
    kl_error: float | None = None


@dataclass(frozen=True, eq=False)
class Sequences:
    """Token sequences and where scoring begins in each: the token behind position ``first``."""

    ids: tuple[npt.NDArray[np.int64], ...]
    first: tuple[int, ...]

    @property
    def targets(self) -> npt.NDArray[np.int64]:
        """The scored tokens, one after another."""
        return np.concatenate([s[n + 1 :] for s, n in zip(self.ids, self.first, strict=True)])


class Reference:
    """A model's raw logits on a text, in an unnamed temporary file; a context manager.

    Stored once, compared with many models: the reference need not be in memory beside them.

    Attributes:
        sequences: What was run.
        ppl: The reference's own perplexity.
    """

    def __init__(
        self, text: Text, context: int, n_tokens: int | None, sequences: Sequences, n_vocab: int
    ) -> None:
        """Make room for the logits; `open` fills it."""
        self.text, self.context, self.n_tokens = text, context, n_tokens
        self.sequences, self.n_vocab = sequences, n_vocab
        shape = (len(sequences.targets), n_vocab)
        folder = temporary_folder()
        require_free(folder, 4 * shape[0] * shape[1], "comparing with the reference's logits")
        self._file = tempfile.TemporaryFile(prefix="edgekit-logits-", dir=folder)  # noqa: SIM115
        self._file.truncate(4 * shape[0] * shape[1])
        self.logits: Any = np.memmap(self._file, np.float32, "r+", shape=shape)
        self.ppl = float("nan")

    @classmethod
    def open(
        cls,
        source: Source,
        text: Text,
        *,
        context: int = CONTEXT,
        n_tokens: int | None = None,
        n_threads: int | None = None,
    ) -> "Reference":
        """Run the reference.

        Args:
            source: A GGUF, or the folder of a checkpoint, which then runs in float32.
            text: One text, cut into chunks, or texts to score one by one.
            context: Tokens per chunk, and the most of each single text.
            n_tokens: Run about that many tokens, chunks taken evenly from all of the text.
            n_threads: Of llama.cpp; ``None`` takes the physical cores.

        Raises:
            UsageError: The text is too short. DiskFullError: the logits do not fit on disk.
            DoesNotFitError: The checkpoint's largest layer does not fit into memory.
        """
        if isinstance(source, Path) and source.is_dir():
            return cls._of_checkpoint(source, text, context, n_tokens)
        with open_model(source) as model:
            sequences = cut(model, text, context, n_tokens)
            reference = cls(text, context, n_tokens, sequences, model.vocab.n_tokens)
            return reference._filled(_run(model, sequences, n_threads))

    @classmethod
    def _of_checkpoint(
        cls, folder: Path, text: Text, context: int, n_tokens: int | None
    ) -> "Reference":
        try:
            from edgekit.float_model import FloatModel, check_memory
        except ImportError as error:
            raise EdgekitError(
                f"a checkpoint as reference needs {error.name}; pip install edgekit[convert]"
            ) from error
        checkpoint = Checkpoint.open(folder)
        mapping = map_checkpoint(checkpoint)
        check_memory(mapping, context, with_head=True, hint="give a GGUF as reference")
        with vocabulary(checkpoint, mapping) as vocab:
            sequences = cut(vocab, text, context, n_tokens)
        model = FloatModel(checkpoint, mapping)
        rows = (
            model.logits(ids[None])[0, first:-1]
            for ids, first in zip(sequences.ids, sequences.first, strict=True)
        )
        return cls(text, context, n_tokens, sequences, mapping.vocab_size)._filled(rows)

    def _filled(self, rows: Iterator[F32Array]) -> "Reference":
        try:
            nll, at = _Mean(), 0
            with disk_full_reported("the reference's logits", "set TMPDIR to another place"):
                for block in rows:
                    self.logits[at : at + len(block)] = block
                    nll.add(_nll(block, self.sequences.targets[at : at + len(block)]))
                    at += len(block)
            self.ppl = float(np.exp(nll.value))
        except BaseException:
            self.close()
            raise
        return self

    def __enter__(self) -> "Reference":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the disk back; twice is once."""
        self.logits = None
        self._file.close()


def evaluate(source: Source, reference: Reference, *, n_threads: int | None = None) -> Quality:
    """Compare a model with a reference that has run.

    Args:
        source: A GGUF, or an object that gives its bytes.
        reference: Open.
        n_threads: Of llama.cpp; ``None`` takes the physical cores.

    Raises:
        UsageError: The model has another vocabulary than the reference.
    """
    with open_model(source) as model:
        _check_same_tokens(model, reference)
        rows = _run(model, reference.sequences, n_threads)
        return compare(rows, reference, model.weights_bytes)


def compare(rows: Iterator[F32Array], reference: Reference, weights_bytes: int) -> Quality:
    """Compare logits with those of a reference that has run.

    Args:
        rows: float32 ``[n, vocab]``, some scored positions of the reference's sequences at a time,
            in order.
        reference: Open.
        weights_bytes: Of the model that gave them.
    """
    nll, kls, agree, at = _Mean(), list[F64Array](), _Mean(), 0
    for block in rows:
        theirs = reference.logits[at : at + len(block)]
        nll.add(_nll(block, reference.sequences.targets[at : at + len(block)]))
        kls.append(kl_divergence(theirs, block))
        agree.add((theirs.argmax(1) == block.argmax(1)).astype(np.float64))
        at += len(block)
    kl = np.concatenate(kls)
    return Quality(
        n_tokens=at,
        ppl=float(np.exp(nll.value)),
        ref_ppl=reference.ppl,
        kl_mean=float(kl.mean()),
        kl_p99=float(np.percentile(kl, 99)),
        top1_agreement=agree.value,
        weights_bytes=weights_bytes,
        kl_error=float(kl.std() / len(kl) ** 0.5),
    )


def perplexity(
    source: Source,
    text: Text,
    *,
    context: int = CONTEXT,
    n_tokens: int | None = None,
    n_threads: int | None = None,
) -> Quality:
    """Score a text without a reference; arguments as in `Reference.open`."""
    nll, at = _Mean(), 0
    with open_model(source) as model:
        sequences = cut(model, text, context, n_tokens)
        for rows in _run(model, sequences, n_threads):
            nll.add(_nll(rows, sequences.targets[at : at + len(rows)]))
            at += len(rows)
        weights_bytes = model.weights_bytes
    return Quality(at, float(np.exp(nll.value)), None, None, None, None, weights_bytes)


def kl_divergence(reference: F32Array, logits: F32Array) -> F64Array:
    """KL(reference || model) in nats, float64 ``[n]``, of raw logits ``[n, vocab]``."""
    parts = []
    for at in range(0, len(logits), ROWS):
        log_p = _log_softmax(reference[at : at + ROWS])
        log_q = _log_softmax(logits[at : at + ROWS])
        parts.append((np.exp(log_p) * (log_p - log_q)).sum(1))
    return np.concatenate(parts)


def cut(vocab: Model, text: Text, context: int, n_tokens: int | None = None) -> Sequences:
    """Turn a text, or texts, into sequences of at most ``context`` tokens."""
    if context < 2:
        raise UsageError(f"a context of {context} scores nothing; give at least 2")
    if isinstance(text, str):
        most = 2**31 if n_tokens is None else max(1, n_tokens // context)
        chunks = token_chunks(vocab, text, context, most, "the text")
        return Sequences(tuple(chunks), (chunks.shape[1] // 2,) * len(chunks))
    found = [np.array(vocab.tokenize(one)[:context], np.int64) for one in text]
    found = [ids for ids in found if len(ids) > 1]
    if not found:
        raise UsageError("the texts hold nothing to score; give longer ones")
    return Sequences(tuple(found), (0,) * len(found))


def _run(model: Model, sequences: Sequences, n_threads: int | None) -> Iterator[F32Array]:
    """Logits of the scored positions, some rows at a time, in order."""
    longest = max(len(ids) for ids in sequences.ids)
    with Context(
        model,
        longest,
        n_batch=BATCH,
        kv_type="f32",
        n_threads=n_threads,
        n_outputs=BATCH,
        flash_attention=False,
    ) as context:
        for ids, first in zip(sequences.ids, sequences.first, strict=True):
            context.clear()
            tokens = ids[:-1].tolist()  # what follows the last token is unknown
            for at in range(0, len(tokens), BATCH):
                batch = tokens[at : at + BATCH]
                rows = context.decode(batch, range(min(max(first - at, 0), len(batch)), len(batch)))
                if len(rows):
                    yield rows


def _check_same_tokens(model: Model, reference: Reference) -> None:
    if model.vocab.n_tokens != reference.n_vocab:
        raise UsageError(
            f"the model has {model.vocab.n_tokens} tokens, its reference {reference.n_vocab}; "
            f"compare models of one vocabulary"
        )
    ours = cut(model, reference.text, reference.context, reference.n_tokens).ids
    theirs = reference.sequences.ids
    if len(ours) != len(theirs) or not all(map(np.array_equal, ours, theirs)):
        raise UsageError(
            "the model cuts the text into other tokens than its reference; "
            "compare models of one vocabulary"
        )


def _log_softmax(logits: Any) -> F64Array:
    wide = np.asarray(logits, np.float64)
    wide = wide - wide.max(1, keepdims=True)
    normal: F64Array = wide - np.log(np.exp(wide).sum(1, keepdims=True))
    return normal


def _nll(logits: F32Array, targets: npt.NDArray[np.int64]) -> F64Array:
    parts = []
    for at in range(0, len(logits), ROWS):
        log_q = _log_softmax(logits[at : at + ROWS])
        parts.append(-np.take_along_axis(log_q, targets[at : at + ROWS, None], 1)[:, 0])
    return np.concatenate(parts)


class _Mean:
    """A running mean."""

    def __init__(self) -> None:
        self._sum, self._n = 0.0, 0

    def add(self, values: F64Array) -> None:
        self._sum += float(values.sum())
        self._n += len(values)

    @property
    def value(self) -> float:
        return self._sum / self._n
