"""Read tokenizer.model, SentencePiece's own file, without native code.

The file is one protocol buffer message. Its wire format is five kinds of field, so the few fields
that matter are read here; no library that trusts the file is needed. Field numbers:
``sentencepiece_model.proto`` of google/sentencepiece.
"""

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gguf import TokenType

from edgekit.errors import RefusedError, UnsupportedError
from edgekit.exporters.normalizers import SPACE, Normalization
from edgekit.exporters.vocabulary import (
    SPACE_BEHIND,
    UNIGRAM_BYTES,
    UNIGRAM_TIES,
    UNUSED_SCORE,
    WRITTEN_SPACE,
    Vocabulary,
)

MAX_FILE_BYTES = 64 * 1024**2  # that of Gemma, with 262 144 pieces, has 4.7 MB
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3  # fields of ModelProto
_UNIGRAM, _BPE = 1, 2  # TrainerSpec.model_type, field 3; field 35 is byte_fallback
_KINDS = {
    1: TokenType.NORMAL,
    2: TokenType.UNKNOWN,
    3: TokenType.CONTROL,
    4: TokenType.USER_DEFINED,
    5: TokenType.UNUSED,
    6: TokenType.BYTE,
}


def read_sentencepiece(path: Path, config: Mapping[str, Any]) -> Vocabulary:
    """Read a BPE or unigram model from tokenizer.model.

    Args:
        path: The file.
        config: tokenizer_config.json; its ``added_tokens_decoder`` adds to the pieces.

    Raises:
        RefusedError: The file is no SentencePiece model.
        UnsupportedError: It is a word or character model.
    """
    if path.stat().st_size > MAX_FILE_BYTES:
        raise RefusedError(f"{path} has more than {MAX_FILE_BYTES} bytes; get the file again")
    try:
        return _read(path.read_bytes(), config)
    except (ValueError, struct.error, IndexError, TypeError) as error:
        raise RefusedError(f"{path} is no SentencePiece model: {error}") from error


def _read(data: bytes, config: Mapping[str, Any]) -> Vocabulary:
    pieces: list[tuple[str, float, TokenType]] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    for number, value in _fields(memoryview(data)):
        if number == _PIECES:
            pieces.append(_piece(value))
        elif number == _TRAINER:
            trainer = dict(_fields(value))
        elif number == _NORMALIZER:
            normalizer = dict(_fields(value))
    kind = trainer.get(3, _UNIGRAM)
    if kind not in (_UNIGRAM, _BPE) or not pieces:
        raise UnsupportedError(
            f"tokenizer.model has {len(pieces)} pieces of model type {kind}, needs BPE or unigram; "
            f"convert another model"
        )
    vocabulary = Vocabulary(
        model="llama" if kind == _BPE else "t5",
        pre="default",
        tokens={number: text for number, (text, _, _) in enumerate(pieces)},
        kinds={n: kind for n, (_, _, kind) in enumerate(pieces) if kind != TokenType.NORMAL},
        scores={number: score for number, (_, score, _) in enumerate(pieces)},
        normalization=_normalization(normalizer),
        charsmap=bytes(normalizer.get(2, b"")) if kind == _UNIGRAM else b"",
    )
    symbols = [text for text, _, kind in pieces if kind == TokenType.USER_DEFINED]
    if any(" " in text for text in symbols):
        vocabulary.differs.append(WRITTEN_SPACE)
    if symbols and vocabulary.normalization.prefix == "always":
        vocabulary.differs.append(SPACE_BEHIND)
    if kind == _UNIGRAM:
        vocabulary.differs += [UNIGRAM_TIES, *([UNIGRAM_BYTES] if trainer.get(35) else [])]
    _check_bytes(vocabulary)
    _add_from_config(vocabulary, config)
    return vocabulary


def _piece(value: Any) -> tuple[str, float, TokenType]:
    fields = dict(_fields(value))
    score = struct.unpack("<f", fields[2])[0] if 2 in fields else 0.0
    text, kind = bytes(fields[1]).decode("utf-8"), _KINDS[fields.get(3, 1)]
    if kind == TokenType.USER_DEFINED:
        text = text.replace(SPACE, " ")  # llama.cpp looks for these before it escapes spaces
    return text, score, kind


def _normalization(fields: Mapping[int, Any]) -> Normalization:
    """Read fields 3 add_dummy_prefix and 4 remove_extra_whitespaces, both true by default."""
    rules = ("trim_spaces", "collapse_spaces") if fields.get(4, 1) else ()
    return Normalization(rules, True, "always" if fields.get(3, 1) else "never")


def _check_bytes(vocabulary: Vocabulary) -> None:
    n_bytes = sum(kind == TokenType.BYTE for kind in vocabulary.kinds.values())
    if vocabulary.model == "llama" and n_bytes != 256:
        raise UnsupportedError(
            f"tokenizer.model has {n_bytes} byte pieces, llama.cpp needs all 256 to fall back to; "
            f"convert a model with byte_fallback"
        )


def _add_from_config(vocabulary: Vocabulary, config: Mapping[str, Any]) -> None:
    added = config.get("added_tokens_decoder", {})
    for key, entry in added.items():
        number, text = int(key), str(entry["content"])
        special = entry.get("special")
        known = vocabulary.kinds.get(number)
        if known is None or known == TokenType.UNUSED:
            kind = TokenType.CONTROL if special else TokenType.USER_DEFINED
            vocabulary.kinds[number] = kind
        vocabulary.tokens[number] = text
        vocabulary.scores.setdefault(number, UNUSED_SCORE)


def _fields(data: memoryview) -> Iterator[tuple[int, Any]]:
    """Yield (field number, value): an int for a varint, a memoryview for everything else."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if wire == 2:
            length, at = _varint(data, at)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire} at byte {at}")
        if length > len(data) - at:
            raise ValueError(f"a field of {length} bytes at byte {at}, only {len(data) - at} left")
        yield key >> 3, data[at : at + length]
        at += length


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError(f"a number of more than 10 bytes at byte {at}")
