"""Numbers of the page: values of the JSON, found by their path and written in their unit."""

from collections.abc import Callable, Sequence
from typing import Any

from edgekit.sizes import format_size

Path = tuple[str | int, ...]


def _significant(value: float) -> str:
    """Three digits, as people write them: 0.0123, 12.3, 1230."""
    if value == 0:
        return "0"
    text = f"{value:.3g}"
    return f"{float(text):.0f}" if "e+" in text else text


FORMATS: dict[str, Callable[[Any], str]] = {
    "size": format_size,
    "bits": lambda value: f"{value:.2f}",
    "kl": _significant,
    "ppl": lambda value: f"{value:.4g}",
    "rate": lambda value: f"{_significant(value)}/s",
    "seconds": lambda value: f"{_significant(value)} s",
    "count": lambda value: f"{value:,.0f}",
    "share": lambda value: f"{100 * value:.3g} %",
    "speed": lambda value: f"{_significant(value / 1e9)} GB/s",
    "text": str,
}
MISSING = "-"  # where the JSON says null


def value_at(body: Any, path: Sequence[str | int]) -> Any:
    """The value that ``path`` leads to."""
    for key in path:
        body = body[key]
    return body


def written(value: Any, unit: str) -> str:
    """The value as the page has it."""
    return MISSING if value is None else FORMATS[unit](value)


def joined(path: Sequence[str | int]) -> str:
    """The path as one word: ``budgets/3/total_bytes``."""
    return "/".join(str(key) for key in path)


def split(word: str) -> Path:
    """What `joined` made."""
    return tuple(int(key) if key.isdigit() else key for key in word.split("/"))
