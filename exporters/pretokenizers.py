# ruff: noqa: RUF001 (the patterns hold the characters of many scripts)
"""Which of llama.cpp's pre-tokenizers splits text as a tokenizer.json does.

llama.cpp knows pre-tokenizers by name (``tokenizer.ggml.pre``); each name stands for a list of
regular expressions, applied one after the other, and a few flags (``src/llama-vocab.cpp``). A
tokenizer.json spells the same list out. So the name is found by comparing the steps themselves: a
model with a vocabulary of its own is recognised as long as it splits text in a known way.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from edgekit.errors import UnsupportedError

GPT2 = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # ByteLevel's own
)
_CASELESS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"|\s+(?!\S)|\s+"
_LINES = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+" + _TAIL
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
LLAMA3 = _CASELESS + "|" + _WORDS + r"|\p{N}{1,3}|" + _LINES
QWEN2 = _CASELESS + "|" + _WORDS + r"|\p{N}|" + _LINES
_QWEN35 = (
    _CASELESS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_HEAD = r"[^\r\n\p{L}\p{N}]?"
_PATHS = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+" + _TAIL
_TEKKEN = f"{_HEAD}{_UPPER}*{_LOWER}+|{_HEAD}{_UPPER}+{_LOWER}*|\\p{{N}}{_PATHS}"
_CASED = f"{_HEAD}{_UPPER}*{_LOWER}+{_CASELESS}?|{_HEAD}{_UPPER}+{_LOWER}*{_CASELESS}?"
GPT4O = _CASED + r"|\p{N}{1,3}" + _PATHS
_PUNCTUATED = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CJK = "[一-龥\u3040-ゟ゠-ヿ]+"  # U+3040 is unassigned, DeepSeek's range starts there all the same
_BLOOM = " ?[^(\\s|[.,!?…。，、।۔،])]+"
_DEEPSEEK_WORDS = (
    "\\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-"
    "ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼ"
    "ℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚ"
    "ａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+"
)
_DEEPSEEK_PUNCTUATION = "\\s?[!-/:-~！-／：-～‘-‟\u3000-。]+"
_DEEPSEEK_CJK = "[一-龥ࠀ-一가-\ud7ff]+"
_DEEPSEEK_LLM = (r"[\r\n]", _DEEPSEEK_WORDS, _DEEPSEEK_PUNCTUATION, r"\s+$", _DEEPSEEK_CJK)
_JAIS_SPACES = "|".join(rf"\s{{{2**n}}}(?!\S)" for n in range(9, 1, -1)) + r"|\s{1,2}(?!\S)|\s{1}"
_YOUTU_CJK = "[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|[一-龥\u3040-ゟ゠-ヿ]+"
_DIGIT, _DIGITS = r"\p{N}", r"\p{N}+"


@dataclass(frozen=True)
class PreTokenizer:
    """One of llama.cpp's pre-tokenizers.

    Attributes:
        name: Its ``tokenizer.ggml.pre``.
        ignore_merges: Whether llama.cpp takes a whole word that is a token without merging.
        differs: Why some text splits differently in llama.cpp, or ``""``.
    """

    name: str
    ignore_merges: bool = False
    differs: str = ""


_MARKS = "llama.cpp knows no upper and lower case or combining marks outside ASCII in this pattern"
_DIGITS_OF = "llama.cpp groups only the digits 0 to 9 here, not those of other scripts"

# the steps of a tokenizer.json: llama.cpp's names for them, the usual one first
TABLE: dict[tuple[str, ...], tuple[PreTokenizer, ...]] = {
    (GPT2,): (PreTokenizer("gpt-2"),),
    (_DIGIT, GPT2): (PreTokenizer("smollm"),),
    (LLAMA3,): (PreTokenizer("llama-bpe", True), PreTokenizer("dbrx")),
    (QWEN2,): (PreTokenizer("qwen2"),),
    (_QWEN35,): (PreTokenizer("qwen35"),),
    (GPT4O,): (
        PreTokenizer("gpt-4o", differs=_MARKS),
        PreTokenizer("granite-embed-multi-97m", True, _MARKS),
    ),
    (_TEKKEN,): (PreTokenizer("tekken", True, _MARKS),),
    (r"\d{1,3}(?=(?:\d{3})*\b)", GPT4O): (PreTokenizer("tiny_aya", differs=_DIGITS_OF),),
    (r"\p{N}{1,3}", _CJK, _PUNCTUATED): (PreTokenizer("deepseek-v3"),),
    (*_DEEPSEEK_LLM, _DIGIT): (PreTokenizer("deepseek-llm"),),
    (*_DEEPSEEK_LLM, _DIGITS): (PreTokenizer("deepseek-llm"),),
    (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_CJK, _DIGIT): (
        PreTokenizer("deepseek-coder"),
    ),
    ("punctuation contiguous", GPT2, _DIGITS, "[0-9][0-9][0-9]"): (PreTokenizer("falcon"),),
    (_BLOOM,): (PreTokenizer("bloom"),),
    (_BLOOM, _DIGIT): (PreTokenizer("viking"),),
    (_YOUTU_CJK, _CASED + r"|\p{N}" + _PATHS): (PreTokenizer("youtu", True, _MARKS),),
    (_CASELESS + "|" + _WORDS + r"|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+" + _TAIL,): (
        PreTokenizer("seed-coder"),
    ),
    (_CASELESS + "|" + _WORDS + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]" + _TAIL,): (
        PreTokenizer("bailingmoe"),
    ),
    (_WORDS + r"|\p{N}|" + _LINES,): (PreTokenizer("ufakzeka"),),
    (
        _CASELESS
        + r"|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?"
        r"|\s*[\r\n]" + _TAIL,
    ): (PreTokenizer("exaone-moe"),),
    (r"\p{N}{1,3}", LLAMA3.replace("{1,3}", "+")): (PreTokenizer("minicpm5", True),),
    (r"[^\n]+|[\n]+", QWEN2): (PreTokenizer("laguna"),),
    (LLAMA3.removesuffix(_TAIL) + "|" + _JAIS_SPACES,): (PreTokenizer("jais-2"),),
    (r"\p{N}+", r"(?=(\d{3})+(?!\d))"): (PreTokenizer("superbpe", differs=_DIGITS_OF),),
}


def recognise(
    pre_tokenizer: Mapping[str, Any] | None,
    ignore_merges: bool,
    flag_matters: Callable[[], bool] = lambda: True,
) -> PreTokenizer:
    """Find the pre-tokenizer that splits like ``pre_tokenizer`` of a tokenizer.json.

    Args:
        pre_tokenizer: The entry of tokenizer.json.
        ignore_merges: The flag of its model.
        flag_matters: Says whether the other setting would give other tokens; asked if need be.

    Raises:
        UnsupportedError: llama.cpp has no such pre-tokenizer; the message shows the steps.
    """
    steps = tuple(_steps(pre_tokenizer))
    found = _KNOWN.get(tuple(map(_canonical, steps)))
    if found is None:
        raise UnsupportedError(
            f"tokenizer.json splits text by {' then '.join(map(repr, steps)) or 'nothing'}, and "
            f"llama.cpp has no such pre-tokenizer; convert a model with one of its pre-tokenizers "
            f"({', '.join(sorted({pre.name for row in TABLE.values() for pre in row}))})"
        )
    for candidate in found:
        if candidate.ignore_merges == ignore_merges:
            return candidate
    if not flag_matters():
        return found[0]
    raise UnsupportedError(
        f"tokenizer.json has ignore_merges {str(ignore_merges).lower()}, llama.cpp's pre-tokenizer "
        f"'{found[0].name}' the opposite, and its merges do not give the same tokens either way; "
        f"convert a model whose merges reach every token"
    )


def _steps(entry: Mapping[str, Any] | None) -> Iterator[str]:
    """Yield the regexes in order; a step that is no regex as a word that matches no row."""
    if entry is None:
        return
    kind = entry["type"]
    if kind == "Sequence":
        for part in entry["pretokenizers"]:
            yield from _steps(part)
    elif kind == "Split":
        yield _split(entry)
    elif kind == "Digits":
        yield _DIGIT if entry["individual_digits"] else _DIGITS
    elif kind == "Punctuation":
        yield f"punctuation {entry['behavior'].lower()}"
    elif kind == "ByteLevel":
        if entry.get("add_prefix_space"):
            yield "a space in front"
        if entry.get("use_regex", True):
            yield GPT2
    else:
        yield kind


def _split(entry: Mapping[str, Any]) -> str:
    pattern = entry["pattern"]
    regex = pattern["Regex"] if "Regex" in pattern else re.escape(pattern["String"])
    way = (entry["behavior"], bool(entry.get("invert")))
    # keeping the matches or removing the rest is the same for a regex that matches everything
    same = way in (("Isolated", False), ("Isolated", True), ("Removed", True))
    return str(regex) if same else f"{entry['behavior'].lower()} {regex}"


_SPELLINGS = (
    ("\r", r"\r"),
    ("\n", r"\n"),
    ("\u3000", r"\u3000"),
    ("?+", "?"),  # possessive: what follows never matches what they took
    ("++", "+"),
    (r"\p{N}{1}", r"\p{N}"),
    (r"'(?i:[sdmt]|ll|ve|re)", _CASELESS),
    (r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])", _CASELESS),
    (r"(?i:'s|'t|'re|'ve|'m|'ll|'d|)", _CASELESS),
)


def _canonical(regex: str) -> str:
    for spelling, usual in _SPELLINGS:
        regex = regex.replace(spelling, usual)
    return regex


_KNOWN = {tuple(map(_canonical, steps)): found for steps, found in TABLE.items()}
