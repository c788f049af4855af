"""Text as chunks of token ids, by the vocabulary of a model in llama.cpp."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgekit.arch import Mapping
from edgekit.checkpoint import Checkpoint
from edgekit.errors import RefusedError, UsageError
from edgekit.exporters.gguf import header_bytes
from edgekit.exporters.tokenizer import tokenizer_metadata
from edgekit.llama import MemoryFile, Model, open_model

Ids = npt.NDArray[np.int64]

MAX_BYTES = 1 << 22  # of a text; 4 MiB are a million tokens, more than anyone waits for
LEAST_TOKENS = 16  # llama-imatrix ignores batches below


def read_text(path: Path) -> str:
    """Read a UTF-8 file, its first 4 MiB at most.

    Raises:
        UsageError: It is no file. RefusedError: it is not UTF-8.
    """
    if not path.is_file():
        raise UsageError(f"{path} is no file; give a UTF-8 text")
    with path.open("rb") as file:
        data = file.read(MAX_BYTES)
    try:  # a character cut by the limit is dropped, another fault is not
        cut = len(data) == MAX_BYTES
        return data.decode("utf-8", "strict") if not cut else _decoded_prefix(data)
    except UnicodeDecodeError as error:
        raise RefusedError(f"{path} is not UTF-8 (byte {error.start}); convert it first") from error


def _decoded_prefix(data: bytes) -> str:
    for n in range(4):
        try:
            return data[: len(data) - n].decode("utf-8")
        except UnicodeDecodeError as error:
            if error.start < len(data) - 4:
                raise
    return data.decode("utf-8")


def vocabulary(checkpoint: Checkpoint, mapping: Mapping) -> Model:
    """Open the checkpoint's tokenizer in llama.cpp, as its GGUF will have it."""
    tokens = tokenizer_metadata(checkpoint.folder, checkpoint.config, mapping.vocab_size)
    header = header_bytes({**mapping.metadata, **tokens}, [])
    return open_model(MemoryFile(header), vocab_only=True)


def token_chunks(vocab: Model, text: str, size: int, most: int, name: str) -> Ids:
    """Cut a text into whole chunks of ``size`` tokens, at most ``most``, evenly from all of it.

    Every chunk begins with BOS in place of its first token where the model wants one, as in
    llama-imatrix and llama-perplexity. A text shorter than a chunk is one shorter chunk.

    Returns:
        int64 ``[chunks, tokens]``.

    Raises:
        UsageError: The text, called ``name``, has fewer than 16 tokens.
    """
    ids = np.array(vocab.tokenize(text), np.int64)
    if len(ids) < LEAST_TOKENS:
        raise UsageError(
            f"{name} has {len(ids)} tokens, at least {LEAST_TOKENS} are needed; give a longer text"
        )
    size = min(size, len(ids))
    n_whole = len(ids) // size
    taken = np.linspace(0, n_whole - 1, min(n_whole, most)).round().astype(np.int64)
    chunks = ids[: n_whole * size].reshape(n_whole, size)[taken]
    if vocab.vocab.adds_bos and vocab.vocab.bos is not None:
        chunks[:, 0] = vocab.vocab.bos
    return chunks
