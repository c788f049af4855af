"""The tokenizer of a checkpoint as GGUF metadata: ``tokenizer.*`` keys.

Key names and their meaning: ggml's ``docs/gguf.md`` and llama.cpp's ``src/llama-arch.cpp``. What a
tokenizer puts around a text is read from its post-processor, not from its family.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFValueType, TokenType

from edgekit.errors import RefusedError, UnsupportedError
from edgekit.exporters.gguf_values import Value, array, boolean, string, u32
from edgekit.exporters.normalizers import KEY, rules_value
from edgekit.exporters.sentencepiece_file import read_sentencepiece
from edgekit.exporters.tokenizer_files import TokenizerFiles, read_tokenizer_files
from edgekit.exporters.vocabulary import UNUSED_SCORE, Vocabulary, read_vocabulary

_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding"}
# where no file names them; without the key llama.cpp takes token 11 of a byte-level vocabulary
_USUAL = {
    "bos": ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>"),
    "eos": ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>"),
}
_END_OF_TURN = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|return|>", "[EOT]")


@dataclass(frozen=True)
class Frame:
    """What a tokenizer puts around a text: token ids in front and behind."""

    front: tuple[int, ...]
    behind: tuple[int, ...]


def tokenizer_metadata(
    folder: Path, config: Mapping[str, Any], vocab_size: int
) -> dict[str, Value]:
    """Return the tokenizer of a checkpoint as GGUF metadata.

    Args:
        folder: Holds tokenizer.json or tokenizer.model, and tokenizer_config.json if there is one.
        config: config.json of the model.
        vocab_size: Rows of the token embedding; the vocabulary is filled up to them with
            ``[PADn]``.

    Raises:
        UnsupportedError: llama.cpp has no such tokenizer.
        RefusedError: The files contradict each other or the model.
    """
    files = read_tokenizer_files(folder)
    vocabulary = vocabulary_of(files)
    return (
        _vocabulary_metadata(vocabulary, vocab_size)
        | _special_metadata(files, vocabulary, config, vocab_size)
        | _template_metadata(files.templates)
    )


def vocabulary_of(files: TokenizerFiles) -> Vocabulary:
    """Return the vocabulary of a folder's tokenizer files."""
    if files.tokenizer is not None:
        return read_vocabulary(files.tokenizer)
    assert files.model_file is not None, "read_tokenizer_files found one of the two"
    return read_sentencepiece(files.model_file, files.config)


def _vocabulary_metadata(vocabulary: Vocabulary, vocab_size: int) -> dict[str, Value]:
    tokens, kinds = _padded(vocabulary, vocab_size)
    values = {
        "tokenizer.ggml.model": string(vocabulary.model),
        "tokenizer.ggml.pre": string(vocabulary.pre),
        "tokenizer.ggml.tokens": array(GGUFValueType.STRING, tokens),
        "tokenizer.ggml.token_type": array(GGUFValueType.INT32, kinds),
    }
    if vocabulary.scores:
        scores = [vocabulary.scores.get(number, UNUSED_SCORE) for number in range(vocab_size)]
        values["tokenizer.ggml.scores"] = array(GGUFValueType.FLOAT32, scores)
    if vocabulary.merges:
        merges = [f"{left} {right}" for left, right in vocabulary.merges]
        values["tokenizer.ggml.merges"] = array(GGUFValueType.STRING, merges)
    if vocabulary.charsmap:
        charsmap = array(GGUFValueType.UINT8, vocabulary.charsmap)
        values["tokenizer.ggml.precompiled_charsmap"] = charsmap
    return values | _space_metadata(vocabulary)


def _space_metadata(vocabulary: Vocabulary) -> dict[str, Value]:
    normalization = vocabulary.normalization
    values: dict[str, Value] = {}
    if vocabulary.model in ("llama", "t5"):
        prefix = normalization.prefix != "never"
        values["tokenizer.ggml.add_space_prefix"] = boolean(prefix)
    trims = {"trim_spaces", "collapse_spaces"} <= set(normalization.rules)
    if vocabulary.model == "t5" and trims:
        values["tokenizer.ggml.remove_extra_whitespaces"] = boolean(True)
    rules = [
        rule
        for rule in normalization.rules
        if vocabulary.model != "t5" or rule not in ("trim_spaces", "collapse_spaces")
    ]
    if rules:
        values[KEY] = rules_value(rules)
    return values


def _padded(vocabulary: Vocabulary, vocab_size: int) -> tuple[list[str], list[int]]:
    """Return texts and types for every row; added tokens without a row are left out."""
    beyond = [n for n in vocabulary.tokens if n >= vocab_size and n not in vocabulary.kinds]
    if beyond:
        raise RefusedError(
            f"tokenizer has token {vocabulary.tokens[beyond[0]]!r} with id {beyond[0]}, the "
            f"embedding has {vocab_size} rows; use the tokenizer that belongs to the model"
        )
    tokens, kinds, seen = [], [], set(vocabulary.tokens.values())
    for number in range(vocab_size):
        text = vocabulary.tokens.get(number)
        if text is None:
            kinds.append(int(TokenType.UNUSED))
            text = _filler(number, seen)
        else:
            kinds.append(int(vocabulary.kinds.get(number, TokenType.NORMAL)))
        tokens.append(text)
    _check_texts(tokens)
    return tokens, kinds


def _filler(number: int, seen: set[str]) -> str:
    text = f"[PAD{number}]"
    while text in seen:
        text = f"[{text}]"
    return text


def _check_texts(tokens: Sequence[str]) -> None:
    """llama.cpp ends the process on two tokens with one text, and renames empty ones."""
    ids: dict[str, int] = {}
    for number, text in enumerate(tokens):
        if text in ids or not text:
            other = f"the text of token {ids[text]}" if text else "no text"
            raise RefusedError(
                f"tokenizer's token {number} ({text!r}) has {other}, llama.cpp needs one text "
                f"each; mend tokenizer.json"
            )
        ids[text] = number


# special tokens


def _special_metadata(
    files: TokenizerFiles, vocabulary: Vocabulary, config: Mapping[str, Any], vocab_size: int
) -> dict[str, Value]:
    ids = _special_ids(files, vocabulary, config)
    frame = frame_of(files, ids)
    ids |= _frame_ids(frame)
    values = {
        f"tokenizer.ggml.{_ROLES[role]}_token_id": u32(number)
        for role, number in ids.items()
        if number < vocab_size
    }
    turn = _end_of_turn(files, config, vocabulary, ids.get("eos"))
    if turn is not None and turn < vocab_size:
        values["tokenizer.ggml.eot_token_id"] = u32(turn)
    values["tokenizer.ggml.add_bos_token"] = boolean(bool(frame.front))
    values["tokenizer.ggml.add_eos_token"] = boolean(bool(frame.behind))
    return values


def _special_ids(
    files: TokenizerFiles, vocabulary: Vocabulary, config: Mapping[str, Any]
) -> dict[str, int]:
    """Return the ids of bos, eos, unk, sep, pad: named in tokenizer files, else in configs."""
    by_text = {text: number for number, text in vocabulary.tokens.items()}
    ids: dict[str, int] = {}
    for role in _ROLES:
        for names in (files.config, files.special):
            text = names.get(f"{role}_token")
            text = text.get("content") if isinstance(text, Mapping) else text
            if isinstance(text, str) and text in by_text:
                ids.setdefault(role, by_text[text])
        for source in (config, files.generation):
            number = source.get(f"{role}_token_id")
            number = number[0] if isinstance(number, list) and number else number
            if isinstance(number, int) and number in vocabulary.tokens:
                ids.setdefault(role, number)
        for text in _USUAL.get(role, ()):
            if vocabulary.kinds.get(by_text.get(text, -1)) == TokenType.CONTROL:
                ids.setdefault(role, by_text[text])
    unknown = [number for number, kind in vocabulary.kinds.items() if kind == TokenType.UNKNOWN]
    return ids | ({"unk": unknown[0]} if unknown else {})


def frame_of(files: TokenizerFiles, ids: Mapping[str, int]) -> Frame:
    """Return what the tokenizer puts around one text.

    A TemplateProcessing step says it exactly; without one, ``add_bos_token`` and
    ``add_eos_token`` of tokenizer_config.json do.

    Raises:
        UnsupportedError: It is more than one token on a side, or not the bos in front.
    """
    template = None
    if files.tokenizer is not None:
        template = next(_templates(files.tokenizer.get("post_processor")), None)
    if template is None:
        # transformers' tokenizers over a tokenizer.model put bos in front unless told otherwise
        adds_bos = files.config.get("add_bos_token", files.tokenizer is None)
        front = (ids["bos"],) if adds_bos and "bos" in ids else ()
        behind = (ids["eos"],) if files.config.get("add_eos_token") and "eos" in ids else ()
        return Frame(front, behind)
    sides: tuple[list[int], list[int]] = ([], [])
    behind_text = False
    for part in template["single"]:
        if "Sequence" in part:
            behind_text = True
        else:
            name = part["SpecialToken"]["id"]
            sides[behind_text].extend(template["special_tokens"][name]["ids"])
    frame = Frame(tuple(sides[0]), tuple(sides[1]))
    if max(len(frame.front), len(frame.behind)) > 1:
        raise UnsupportedError(
            f"tokenizer.json puts tokens {frame.front} in front of a text and {frame.behind} "
            f"behind it, llama.cpp one on each side at most; mend its post_processor"
        )
    return frame


def _templates(entry: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    if entry is None:
        return
    if entry["type"] == "Sequence":
        for part in entry["processors"]:
            yield from _templates(part)
    elif entry["type"] == "TemplateProcessing":
        yield entry


def _frame_ids(frame: Frame) -> dict[str, int]:
    """llama.cpp puts its bos and eos there, so the token that is put there is the bos or eos."""
    pairs = (("bos", frame.front), ("eos", frame.behind))
    return {role: side[0] for role, side in pairs if side}


def _end_of_turn(
    files: TokenizerFiles, config: Mapping[str, Any], vocabulary: Vocabulary, eos: int | None
) -> int | None:
    """Return a second token that ends generation, where the files list several."""
    for source in (files.generation, config):
        listed = source.get("eos_token_id")
        if isinstance(listed, list):
            others = [n for n in listed if n != eos and n in vocabulary.tokens]
            usual = [n for n in others if vocabulary.tokens[n] in _END_OF_TURN]
            if others:
                return int((usual or others)[0])
    return None


# chat templates


def _template_metadata(templates: Mapping[str, str]) -> dict[str, Value]:
    values = {}
    names = []
    for name, text in templates.items():
        if name == "default":
            values["tokenizer.chat_template"] = string(text)
        else:
            plain = re.sub(r"[^a-z0-9_]", "_", name.lower())
            names.append(plain)
            values[f"tokenizer.chat_template.{plain}"] = string(text)
    if names:
        values["tokenizer.chat_templates"] = array(GGUFValueType.STRING, names)
    return values
