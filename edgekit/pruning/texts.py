"""Tokens to fit to, to choose by and to measure with."""

from pathlib import Path

import numpy as np

from edgekit.arch import Mapping
from edgekit.checkpoint import Checkpoint
from edgekit.float_model import batch_chunks
from edgekit.pruning.layers import Ids
from edgekit.pruning.moments import HELD_OUT
from edgekit.samples import CALIBRATION_TEXT, heldout_text
from edgekit.text import read_text, token_chunks, vocabulary

CHUNK_TOKENS = 256  # that attend to each other
PROBE_CHUNKS = 4  # that layers and shares are chosen by, and as many to measure the result with


def tokens(
    checkpoint: Checkpoint, mapping: Mapping, text: Path | None, n_tokens: int
) -> tuple[Ids, Ids, Ids]:
    """Chunks ``[B, T]`` to fit to, to choose by, and to measure with.

    Args:
        checkpoint: With tokenizer files in its folder.
        mapping: Of it.
        text: UTF-8 file for the first two; ``None`` takes the text that comes with edgekit.
        n_tokens: To fit to, about.

    Raises:
        UsageError: The text is too short. RefusedError: it is not UTF-8.
    """
    path = text or CALIBRATION_TEXT
    longest = int(mapping.metadata[f"{mapping.architecture}.context_length"].value)
    size = min(CHUNK_TOKENS, longest)
    n_fit = max(1, n_tokens // size)
    with vocabulary(checkpoint, mapping) as vocab:
        chunks = token_chunks(vocab, read_text(path), size, n_fit + PROBE_CHUNKS, str(path))
        held = token_chunks(vocab, heldout_text(), size, PROBE_CHUNKS, "the held-out text")
    if len(chunks) <= PROBE_CHUNKS:  # a short text has to serve for both
        return chunks, chunks, held
    chosen = np.linspace(0, len(chunks) - 1, PROBE_CHUNKS).round().astype(int)
    return np.delete(chunks, chosen, 0), chunks[chosen], held


def batches(ids: Ids, mapping: Mapping) -> list[Ids]:
    """Batches as large as activations allow, enough of them to hold some out."""
    step = min(batch_chunks(mapping, ids.shape[1]), max(1, len(ids) // HELD_OUT))
    return [ids[at : at + step] for at in range(0, len(ids), step)]
