"""Bits per byte: how well a sample model, or a compressor, predicts the held-out text."""

import lzma
import math
from collections import Counter
from collections.abc import Iterable

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from .corpus import Document

WINDOW, STRIDE = 1024, 512  # every token but the first ones is predicted from 512 to 1023 others


@torch.inference_mode()
def model_bits(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, text: str) -> float:
    """Bits that ``model`` needs per byte of ``text``, each window after the start or end token."""
    start = tokenizer.bos_token_id if tokenizer.bos_token else tokenizer.eos_token_id
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    nats, done = 0.0, 0
    for at in range(0, len(ids), STRIDE):
        row = torch.tensor([[start, *ids[at : at + WINDOW - 1]]], device=model.device)
        logits = model(input_ids=row[:, :-1]).logits[0].float()
        new = at + row.shape[1] - 1 - done  # the last ``new`` tokens were in no window before
        nats += F.cross_entropy(logits[-new:], row[0, -new:], reduction="sum").item() if new else 0
        done = at + row.shape[1] - 1
    return nats / math.log(2) / len(text.encode())


def order0_bits(text: str) -> float:
    """The entropy of single bytes, in bits per byte."""
    data = text.encode()
    return -sum(n * math.log2(n / len(data)) for n in Counter(data).values()) / len(data)


def xz_bits(text: str, before: Iterable[Document] = ()) -> float:
    """Bits per byte of xz at its best setting, after having read the documents ``before``."""
    data = text.encode()
    known = "".join(document.text for document in before).encode()
    return 8 * (_xz_bytes(known + data) - (_xz_bytes(known) if known else 0)) / len(data)


def _xz_bytes(data: bytes) -> int:
    dictionary = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 2**26}
    return len(lzma.compress(data, filters=[dictionary]))
