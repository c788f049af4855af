"""Turn documents into batches of tokens, the same ones for the same seed and step."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from .corpus import Document

BLOCK = 1024  # tokens of the longest training sequence


def pack(tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document]) -> np.ndarray:
    """All documents as one stream of uint16 ids, each one followed by the end token."""
    encoded = tokenizer([d.text for d in documents])["input_ids"]
    eos = [tokenizer.eos_token_id]
    return np.concatenate([np.array(ids + eos, dtype=np.uint16) for ids in encoded])


def batch(stream: np.ndarray, step: int, tokens: int, seed: int, bos: int | None) -> Tensor:
    """Rows of ids for one step, int64 ``[rows, length + 1]``.

    An epoch visits every block of the stream once in a random order, from a random offset. Three
    steps in four use sequences of half a block, the fourth whole blocks. With ``bos`` each row
    starts with it, as it does when the model is used.
    """
    per_step, n_blocks = tokens // BLOCK, (len(stream) - 1) // BLOCK - 1
    epoch, at = divmod(step, n_blocks // per_step)
    rng = np.random.default_rng((seed, epoch))
    offset = rng.integers(BLOCK)
    chosen = rng.permutation(n_blocks)[at * per_step : (at + 1) * per_step]
    length = BLOCK if step % 4 == 3 else BLOCK // 2
    starts = (chosen[:, None] * BLOCK + np.arange(0, BLOCK, length)).ravel() + offset
    ids = stream[starts[:, None] + np.arange(length + (bos is None))].astype(np.int64)
    rows = torch.from_numpy(ids)
    return rows if bos is None else torch.nn.functional.pad(rows, (1, 0), value=bos)
