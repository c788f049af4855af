"""What a tokenizer.json does to text before it splits it, and the part llama.cpp leaves to us.

llama.cpp replaces spaces and puts one in front by itself. Unicode normalization and the removal of
spaces it does not do for these tokenizers, so edgekit does it before it hands text over; the GGUF
says so under `KEY`, which other programs ignore.
"""

import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from gguf import GGUFValueType, TokenType

from edgekit.errors import UnsupportedError
from edgekit.exporters.gguf_values import Value, array

KEY = "edgekit.tokenizer.normalizers"
SPACE = "\u2581"  # how SentencePiece writes a space

_WRITTEN_KINDS = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)

# name in the GGUF: what it does to text between special tokens
RULES: dict[str, Callable[[str], str]] = {
    "nfc": partial(unicodedata.normalize, "NFC"),
    "nfd": partial(unicodedata.normalize, "NFD"),
    "nfkc": partial(unicodedata.normalize, "NFKC"),
    "nfkd": partial(unicodedata.normalize, "NFKD"),
    "lowercase": str.lower,
    "trim_spaces": lambda text: text.strip(" "),
    "collapse_spaces": lambda text: re.sub(" {2,}", " ", text),
}
_REPLACED = {
    (r"\A +| +\z", ""): "trim_spaces",
    ("^ +| +$", ""): "trim_spaces",
    (" {2,}", " "): "collapse_spaces",
}


@dataclass(frozen=True)
class Normalization:
    """What happens to text in front of the model.

    Attributes:
        rules: Names in `RULES`, in order, for edgekit to apply.
        escapes_spaces: Every space becomes `SPACE`, as SentencePiece does.
        prefix: When a space is put in front: ``"never"``, ``"always"``, ``"unless there"`` (not
            where the text starts with one), ``"first"`` (only at the start of the whole text).
        splits_words: Merges stop at each `SPACE`.
    """

    rules: tuple[str, ...] = ()
    escapes_spaces: bool = False
    prefix: str = "never"
    splits_words: bool = False


def read_normalization(tokenizer: Mapping[str, Any]) -> Normalization:
    """Read the normalizer, and the Metaspace pre-tokenizer if there is one, of a tokenizer.json.

    Raises:
        UnsupportedError: A step is one that neither llama.cpp nor edgekit does.
    """
    steps = list(_steps(tokenizer.get("normalizer")))
    rules = tuple(step for step in steps if step in RULES)
    prefix = "always" if "prefix" in steps else "never"
    escapes, splits = "escape" in steps, False
    for part in _parts(tokenizer.get("pre_tokenizer"), "pretokenizers"):
        if part["type"] == "Metaspace":
            escapes, splits = True, bool(part.get("split", True))
            scheme = part.get("prepend_scheme", "always")
            prefix = "unless there" if scheme == "always" else scheme
    return Normalization(rules, escapes, prefix, splits)


def _parts(entry: Mapping[str, Any] | None, inner: str) -> Iterator[Mapping[str, Any]]:
    if entry is None:
        return
    if entry["type"] == "Sequence":
        for part in entry[inner]:
            yield from _parts(part, inner)
    else:
        yield entry


def _steps(entry: Mapping[str, Any] | None) -> Iterator[str]:
    for part in _parts(entry, "normalizers"):
        yield _step(part)


def _step(part: Mapping[str, Any]) -> str:
    kind = part["type"]
    if kind in ("NFC", "NFD", "NFKC", "NFKD", "Lowercase"):
        return str(kind).lower()
    if kind == "Prepend" and part["prepend"] == SPACE:
        return "prefix"
    if kind == "Precompiled":
        return "charsmap"
    if kind == "Replace":
        pattern = part["pattern"]
        what = (pattern.get("Regex", pattern.get("String")), part["content"])
        if what == (" ", SPACE):
            return "escape"
        if what in _REPLACED:
            return _REPLACED[what]
    shown = {key: value for key, value in part.items() if key != "precompiled_charsmap"}
    raise UnsupportedError(
        f"tokenizer.json normalizes text by {shown}, which llama.cpp does not do; "
        f"remove the step if the model works without it"
    )


class TextNormalizer:
    """Applies the rules a GGUF asks for to the text between its special tokens."""

    def __init__(self, metadata: Mapping[str, Value]) -> None:
        """Take the rules, and the special tokens if there are rules, from a GGUF's metadata.

        Raises:
            UnsupportedError: A rule is not known.
        """
        value = metadata.get(KEY)
        names: Sequence[str] = value.value if value is not None else ()
        unknown = [name for name in names if name not in RULES]
        if unknown:
            raise UnsupportedError(
                f"GGUF asks for the text rule '{unknown[0]}', known are {', '.join(RULES)}; "
                f"update edgekit"
            )
        self._rules = [RULES[name] for name in names]
        written, always = _WRITTEN_KINDS, (TokenType.USER_DEFINED,)
        self._special = {
            parse_special: re.compile(_special_pattern(metadata, kinds))
            for parse_special, kinds in ((True, written), (False, always))
            if names
        }

    def __call__(self, text: str, parse_special: bool = True) -> str:
        """Return the text as llama.cpp should get it.

        Args:
            text: Any text.
            parse_special: Whether llama.cpp will read the texts of special tokens as such.
        """
        if not self._special:
            return text
        parts = self._special[parse_special].split(text)
        return "".join(part if at % 2 else self._normalize(part) for at, part in enumerate(parts))

    def _normalize(self, text: str) -> str:
        for rule in self._rules:
            text = rule(text)
        return text


def _special_pattern(metadata: Mapping[str, Value], kinds: Sequence[TokenType]) -> str:
    pairs = zip(
        metadata["tokenizer.ggml.tokens"].value,
        metadata["tokenizer.ggml.token_type"].value,
        strict=True,
    )
    special = sorted((token for token, kind in pairs if kind in kinds), key=len, reverse=True)
    return f"({'|'.join(map(re.escape, special))})" if special else "(?!)()"


def rules_value(rules: Sequence[str]) -> Value:
    """Return the metadata value that `TextNormalizer` reads."""
    return array(GGUFValueType.STRING, rules)
