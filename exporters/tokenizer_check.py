"""Compare a GGUF's tokenizer, run by llama.cpp, with the one it was made from.

The GGUF must be one that edgekit wrote: llama.cpp ends the process on some faulty vocabularies.
"""

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from gguf import TokenType

from edgekit.errors import RefusedError
from edgekit.exporters.gguf import Gguf, read_header
from edgekit.exporters.normalizers import TextNormalizer
from edgekit.exporters.stress import pieces_for
from edgekit.exporters.tokenizer import vocabulary_of
from edgekit.exporters.tokenizer_files import load_tokenizer, read_tokenizer_files
from edgekit.kernels.openmp import limit_spinning

MAX_DIFFERENT = 0.25  # share of stress pieces; with more a known difference explains nothing

LONG_TEXT = 1024  # characters; the frame has been compared often enough on shorter ones

Encode = Callable[[str, bool], list[int]]  # text, whether to add bos and eos


@dataclass(frozen=True)
class TokenizerCheck:
    """What the comparison found.

    Attributes:
        n_texts: Texts compared.
        n_different: Texts with other ids, possible only where a known difference explains them.
        n_unprepared: Texts that get other ids in programs that leave edgekit's text rules out.
        notices: One line for each thing a user should know.
    """

    n_texts: int
    n_different: int
    n_unprepared: int
    notices: tuple[str, ...]


def check_tokenizer(
    gguf_path: Path, folder: Path, texts: Sequence[str] | None = None
) -> TokenizerCheck:
    """Tokenize text with llama.cpp and with the folder's tokenizer, and compare the ids.

    Args:
        gguf_path: A GGUF that edgekit wrote; only its header is read.
        folder: The checkpoint it was made from.
        texts: What to tokenize; ``None`` takes the stress text.

    Raises:
        RefusedError: A text gets other ids; the message shows the first place.
    """
    header = read_header(gguf_path)
    reference = reference_encoder(folder, header)
    if texts is None:
        texts = pieces_for(_special_texts(header))
    differs = vocabulary_of(read_tokenizer_files(folder)).differs
    parse_special = (folder / "tokenizer.json").is_file()  # `sentencepiece` never does
    prepare = partial(TextNormalizer(header.metadata), parse_special=parse_special)
    faults: list[str] = []
    n_unprepared = 0
    with llama_encoder(gguf_path, parse_special) as encode:
        for text in texts:
            fault = _first_fault(text, reference, encode, prepare)
            if fault:
                faults.append(fault)
                if not differs or len(faults) > MAX_DIFFERENT * len(texts):
                    raise RefusedError(fault)
            n_unprepared += _needs_preparing(text, encode, prepare)
    notices = _notices(differs, faults, n_unprepared, len(texts))
    return TokenizerCheck(len(texts), len(faults), n_unprepared, tuple(notices))


def _first_fault(
    text: str, reference: Encode, encode: Encode, prepare: Callable[[str], str]
) -> str | None:
    """Compare with and (a short text) without bos and eos; return the first difference."""
    for add_special in (True, False) if len(text) < LONG_TEXT else (True,):
        expected, got = reference(text, add_special), encode(prepare(text), add_special)
        if expected != got:
            return _describe(text, expected, got)
    return None


def _needs_preparing(text: str, encode: Encode, prepare: Callable[[str], str]) -> bool:
    prepared = prepare(text)
    if prepared == text or len(text) >= LONG_TEXT:
        return False
    return encode(prepared, False) != encode(text, False)


def _describe(text: str, expected: Sequence[int], got: Sequence[int]) -> str:
    pairs = zip(expected, got, strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(expected), len(got)))
    shown = text if len(text) <= 80 else text[:77] + "..."
    return (
        f"tokenizer of the GGUF gives other ids for {shown!r}: from token {at} on "
        f"{list(got[at : at + 5])} in llama.cpp, {list(expected[at : at + 5])} in the checkpoint; "
        f"please report the model, its tokenizer is not converted rightly"
    )


def _notices(
    differs: Sequence[str], faults: Sequence[str], n_unprepared: int, n_texts: int
) -> Iterator[str]:
    if faults:
        yield (
            f"{len(faults)} of {n_texts} test texts get other ids in llama.cpp than in the "
            f"checkpoint: {'; '.join(differs)}"
        )
    if n_unprepared:
        yield (
            f"{n_unprepared} of {n_texts} test texts get other ids in programs other than edgekit, "
            f"because llama.cpp does not normalize text as this tokenizer does"
        )


def _special_texts(header: Gguf) -> tuple[str, ...]:
    kinds = header.metadata["tokenizer.ggml.token_type"].value
    tokens = header.metadata["tokenizer.ggml.tokens"].value
    special = (TokenType.CONTROL, TokenType.USER_DEFINED)
    return tuple(text for text, kind in zip(tokens, kinds, strict=True) if kind in special)


# the two sides


def reference_encoder(folder: Path, header: Gguf) -> Encode:
    """Return the folder's own tokenizer as a function: `tokenizers`, else `sentencepiece`.

    Raises:
        RefusedError: It cannot be loaded.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return _sentencepiece_encoder(folder / "tokenizer.model", header)
    tokenizer = load_tokenizer(path)
    adds_itself = bool(tokenizer.encode("", add_special_tokens=True).ids)

    def encode(text: str, add_special: bool) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=add_special).ids
        return ids if adds_itself or not add_special else _framed(ids, header)

    return encode


def _framed(ids: list[int], header: Gguf) -> list[int]:
    """Put bos and eos around, as tokenizer_config.json asks and the header says."""
    get = header.get
    front = [get("tokenizer.ggml.bos_token_id")] if get("tokenizer.ggml.add_bos_token") else []
    behind = [get("tokenizer.ggml.eos_token_id")] if get("tokenizer.ggml.add_eos_token") else []
    return front + ids + behind


def _sentencepiece_encoder(path: Path, header: Gguf) -> Encode:
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=str(path))

    def encode(text: str, add_special: bool) -> list[int]:
        ids: list[int] = processor.encode(text)
        return _framed(ids, header) if add_special else ids

    return encode


@contextmanager
def llama_encoder(gguf_path: Path, parse_special: bool = True) -> Iterator[Encode]:
    """Load only the vocabulary of a GGUF into llama.cpp and yield its tokenizer.

    Args:
        gguf_path: A GGUF whose header `read_header` has accepted.
        parse_special: Read the texts of special tokens as such, as `tokenizers` does.

    Raises:
        RefusedError: llama.cpp does not load the vocabulary.
    """
    limit_spinning()
    from llama_cpp import llama_cpp as lib

    lines: list[str] = []
    with _quiet(lib, lines):
        lib.llama_backend_init()
        params = lib.llama_model_default_params()
        params.vocab_only, params.n_gpu_layers = True, 0
        model = lib.llama_model_load_from_file(str(gguf_path).encode(), params)
        if not model:
            why = next((line.strip() for line in reversed(lines) if "error" in line), "no reason")
            raise RefusedError(f"llama.cpp does not load the vocabulary of {gguf_path}: {why}")
        try:
            vocab = lib.llama_model_get_vocab(model)
            yield partial(_encode, lib, vocab, parse_special)
        finally:
            lib.llama_model_free(model)


def _encode(lib: Any, vocab: Any, parse_special: bool, text: str, add_special: bool) -> list[int]:
    data = text.encode("utf-8")
    size = len(data) + 16  # no more tokens than bytes, and what is put around
    ids = (ctypes.c_int32 * size)()
    n = lib.llama_tokenize(vocab, data, len(data), ids, size, add_special, parse_special)
    assert n >= 0, "a text has no more tokens than bytes"
    return list(ids[:n])


@contextmanager
def _quiet(lib: Any, lines: list[str]) -> Iterator[None]:
    """Keep llama.cpp's log in ``lines``; whoever listened before listens again afterwards."""
    before = lib.llama_log_callback()
    data = ctypes.c_void_p()
    lib.llama_log_get(ctypes.byref(before), ctypes.byref(data))

    def listen(level: int, text: bytes, _: Any) -> None:
        lines.append(text.decode("utf-8", "replace"))

    callback = lib.llama_log_callback(listen)  # kept alive here: llama.cpp holds the pointer
    lib.llama_log_set(callback, ctypes.c_void_p(0))
    try:
        yield
    finally:
        lib.llama_log_set(before, data)
