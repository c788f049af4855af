"""A tokenizer.json as a vocabulary of llama.cpp: which of its tokenizers, tokens, scores, merges.

llama.cpp has three that matter here. ``gpt2`` is BPE by a list of merges, on bytes written as
printable characters. ``llama`` is SentencePiece's BPE: it has no list of merges but joins any two
neighbours whose text is a token, the best score first; it equals a list of merges only where that
list is complete, which is checked. ``t5`` is SentencePiece's unigram model. A BPE on characters
(not bytes) whose list is not complete goes out as ``gpt2`` with the pre-tokenizer ``sarvam-moe``,
which does follow the list.
"""

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gguf import TokenType

from edgekit.errors import RefusedError, UnsupportedError
from edgekit.exporters.normalizers import SPACE, Normalization, read_normalization
from edgekit.exporters.pretokenizers import recognise

BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")
WRITTEN_SPACE = f"llama.cpp reads the character {SPACE} written in a text as a space"
UNIGRAM_BYTES = "llama.cpp's unigram tokenizer gives <unk>, not bytes, for what it has no piece of"
UNIGRAM_TIES = "of two equally likely ways to cut a word llama.cpp may take the other"
SPACE_BEHIND = "llama.cpp puts a space behind special tokens as well, not only in front of a text"
UNUSED_SCORE = -1000.0  # below every token that can be chosen; what llama.cpp's converter writes


@dataclass
class Vocabulary:
    """A vocabulary as llama.cpp reads it.

    Attributes:
        model: ``tokenizer.ggml.model``.
        pre: ``tokenizer.ggml.pre``.
        tokens: Id to text.
        kinds: Id to type; an id that is not in it is NORMAL.
        scores: Id to score; empty where the tokenizer has none.
        merges: Pairs in order of rank; empty where the tokenizer has none.
        normalization: What happens to text in front of it.
        charsmap: SentencePiece's compiled normalization rules, or ``b""``.
        differs: Reasons why llama.cpp's ids can differ from those of `tokenizers` on some text.
    """

    model: str
    pre: str
    tokens: dict[int, str]
    kinds: dict[int, TokenType]
    scores: dict[int, float] = field(default_factory=dict)
    merges: Sequence[tuple[str, str]] = ()
    normalization: Normalization = field(default_factory=Normalization)
    charsmap: bytes = b""
    differs: list[str] = field(default_factory=list)


def read_vocabulary(tokenizer: Mapping[str, Any]) -> Vocabulary:
    """Turn a tokenizer.json, as the `tokenizers` library writes it, into a vocabulary.

    Raises:
        UnsupportedError: llama.cpp has no tokenizer like it.
        RefusedError: It contradicts itself.
    """
    kind = tokenizer["model"]["type"]
    normalization = read_normalization(tokenizer)
    if kind == "BPE" and (_has_bytes_as_characters(tokenizer) or not normalization.escapes_spaces):
        vocabulary = _byte_level(tokenizer, normalization)
    elif kind == "BPE":
        vocabulary = _sentencepiece_bpe(tokenizer, normalization)
    elif kind == "Unigram":
        vocabulary = _unigram(tokenizer, normalization)
    else:
        raise UnsupportedError(
            f"tokenizer.json holds a {kind} model, needs BPE or Unigram; convert another model"
        )
    _add_added_tokens(vocabulary, tokenizer["added_tokens"])
    vocabulary.differs = list(dict.fromkeys(vocabulary.differs))
    _note_stripping(vocabulary, tokenizer["added_tokens"])
    return vocabulary


def _has_bytes_as_characters(tokenizer: Mapping[str, Any]) -> bool:
    return '"ByteLevel"' in repr(tokenizer.get("pre_tokenizer")).replace("'", '"')


def _by_id(vocab: Mapping[str, int]) -> dict[int, str]:
    """Turn the vocabulary around; of two texts with one id (Gemma's tab) the byte token stays."""
    ordered = sorted(vocab.items(), key=lambda item: bool(BYTE_TOKEN.fullmatch(item[0])))
    return {number: token for token, number in ordered}


def _check_plain_bpe(model: Mapping[str, Any]) -> None:
    for name in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(name):
            raise UnsupportedError(
                f"tokenizer.json's BPE has {name} {model[name]!r}, which llama.cpp does not do; "
                f"convert a model without it"
            )


def _merges(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the pairs; one with a space inside can never apply, for text holds none by then."""
    pairs = ((left, right) for left, right in model["merges"])
    return [pair for pair in pairs if " " not in pair[0] and " " not in pair[1]]


# byte-level BPE


def _byte_level(tokenizer: Mapping[str, Any], normalization: Normalization) -> Vocabulary:
    model = tokenizer["model"]
    _check_plain_bpe(model)
    merges = _merges(model)
    ignores = bool(model.get("ignore_merges"))
    found = recognise(
        tokenizer.get("pre_tokenizer"), ignores, lambda: not merges_reach_every_token(model)
    )
    return Vocabulary(
        model="gpt2",
        pre=found.name,
        tokens=_by_id(model["vocab"]),
        kinds={},
        merges=merges,
        normalization=normalization,
        differs=[found.differs] if found.differs else [],
    )


def merges_reach_every_token(model: Mapping[str, Any]) -> bool:
    """Whether merging the characters of each token gives that token back."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    vocab: dict[str, int] = model["vocab"]
    merges = [(left, right) for left, right in model["merges"]]
    plain = Tokenizer(BPE(vocab=vocab, merges=merges, ignore_merges=False))
    encoded = plain.encode_batch_fast(list(vocab), add_special_tokens=False)
    return all(
        encoding.ids == [number] for encoding, number in zip(encoded, vocab.values(), strict=True)
    )


# SentencePiece-style BPE


def _sentencepiece_bpe(tokenizer: Mapping[str, Any], normalization: Normalization) -> Vocabulary:
    model = tokenizer["model"]
    _check_plain_bpe(model)
    tokens = _by_id(model["vocab"])
    if not model.get("byte_fallback") or not has_all_bytes(model["vocab"]):
        raise UnsupportedError(
            "tokenizer.json's BPE works on characters and has no <0x00> to <0xFF> tokens to fall "
            "back to, without which llama.cpp stops; convert a model with byte_fallback"
        )
    merges = _merges(model)
    scores = scores_of_merges(tokens, merges)
    vocabulary = Vocabulary(
        model="llama",
        pre="default",
        tokens=tokens,
        kinds={n: TokenType.BYTE for n, token in tokens.items() if BYTE_TOKEN.fullmatch(token)},
        scores=scores,
        normalization=normalization,
        differs=_prefix_differs(normalization),
    )
    if model.get("unk_token") in model["vocab"]:
        vocabulary.kinds[model["vocab"][model["unk_token"]]] = TokenType.UNKNOWN
    if not merges_are_complete(model["vocab"], merges):
        _follow_merges(vocabulary, merges)
    return vocabulary


def has_all_bytes(vocab: Mapping[str, int]) -> bool:
    """Whether there is a token for each of the 256 bytes."""
    return all(f"<0x{byte:02X}>" in vocab for byte in range(256))


def scores_of_merges(
    tokens: Mapping[int, str], merges: Sequence[tuple[str, str]]
) -> dict[int, float]:
    """Return minus the rank of the first merge that makes each token, 0 for one no merge makes."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    return {number: -float(ranks.get(token, 0)) for number, token in tokens.items()}


def merges_are_complete(vocab: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> bool:
    """Whether joining any two tokens whose text is a token is what the list of merges does.

    It is, if every way to cut a token into two tokens is a merge and those of one token have
    neighbouring ranks.
    """
    products = [left + right for left, right in merges]
    blocks = sum(
        this != previous for this, previous in zip(products, ["", *products], strict=False)
    )
    if blocks != len(set(products)):
        return False
    known = set(merges)
    return all(
        (token[:at], token[at:]) in known
        for token in vocab
        if not BYTE_TOKEN.fullmatch(token)
        for at in range(1, len(token))
        if token[:at] in vocab and token[at:] in vocab
    )


def _follow_merges(vocabulary: Vocabulary, merges: Sequence[tuple[str, str]]) -> None:
    if vocabulary.normalization.prefix == "never":
        vocabulary.model, vocabulary.pre = "gpt2", "sarvam-moe"
        vocabulary.merges, vocabulary.scores = merges, {}
    else:
        vocabulary.differs.append("llama.cpp joins tokens that the list of merges does not join")


def _prefix_differs(normalization: Normalization) -> list[str]:
    reasons = {
        "first": SPACE_BEHIND,
        "unless there": "llama.cpp puts a space in front of text that starts with one as well",
    }
    differs = [reasons[normalization.prefix]] if normalization.prefix in reasons else []
    if normalization.splits_words:
        differs.append("llama.cpp joins tokens across the spaces of SentencePiece")
    return differs


# unigram


def _unigram(tokenizer: Mapping[str, Any], normalization: Normalization) -> Vocabulary:
    model = tokenizer["model"]
    if not normalization.escapes_spaces:
        raise UnsupportedError(
            "tokenizer.json's Unigram model does not write spaces as '\u2581', which llama.cpp's "
            "does; convert a model with a Metaspace pre-tokenizer"
        )
    pieces = model["vocab"]
    unknown = model.get("unk_id")
    if unknown is None:
        raise UnsupportedError("tokenizer.json's Unigram model has no unk_id, llama.cpp needs one")
    differs = [UNIGRAM_TIES, *_prefix_differs(normalization)]
    if model.get("byte_fallback"):
        differs.append(UNIGRAM_BYTES)
    kinds = {
        n: TokenType.BYTE for n, (piece, _) in enumerate(pieces) if BYTE_TOKEN.fullmatch(piece)
    }
    return Vocabulary(
        model="t5",
        pre="default",
        tokens={number: piece for number, (piece, _) in enumerate(pieces)},
        kinds=kinds | {unknown: TokenType.UNKNOWN},
        scores={number: score for number, (_, score) in enumerate(pieces)},
        normalization=normalization,
        charsmap=_charsmap(tokenizer.get("normalizer")),
        differs=differs,
    )


def _charsmap(normalizer: Any) -> bytes:
    if not isinstance(normalizer, Mapping):
        return b""
    for part in normalizer.get("normalizers", [normalizer]):
        if part["type"] == "Precompiled":
            try:
                return base64.b64decode(part["precompiled_charsmap"], validate=True)
            except (binascii.Error, ValueError) as error:
                raise RefusedError(f"tokenizer.json's precompiled_charsmap: {error}") from error
    return b""


# added tokens


def _add_added_tokens(vocabulary: Vocabulary, added: Sequence[Mapping[str, Any]]) -> None:
    for entry in added:
        number, text = entry["id"], entry["content"]
        if entry["special"]:
            unknown = vocabulary.kinds.get(number) == TokenType.UNKNOWN
            kind = TokenType.UNKNOWN if unknown else TokenType.CONTROL
        elif SPACE in text and number in vocabulary.tokens:
            kind = TokenType.NORMAL  # SentencePiece's runs of spaces: merges make them
            vocabulary.differs.append(WRITTEN_SPACE)
        else:
            kind = TokenType.USER_DEFINED
        vocabulary.tokens[number] = text
        vocabulary.kinds[number] = kind
        if vocabulary.scores:
            vocabulary.scores[number] = vocabulary.scores.get(number, UNUSED_SCORE)


def _note_stripping(vocabulary: Vocabulary, added: Sequence[Mapping[str, Any]]) -> None:
    stripping = [entry["content"] for entry in added if entry["lstrip"] or entry["rstrip"]]
    if stripping:
        vocabulary.differs.append(
            f"{len(stripping)} special tokens such as {stripping[0]!r} swallow the space beside "
            f"them, which llama.cpp does only for models named phi-3"
        )
