"""Fields of config.json, read as untrusted data."""

from collections.abc import Mapping
from typing import Any

from edgekit.errors import RefusedError

MAX_CONTEXT = (1 << 31) - 1  # llama.cpp holds positions in int32


class Fields:
    """config.json with the defaults of a row; every getter checks type and range."""

    def __init__(self, config: Mapping[str, Any], defaults: Mapping[str, Any], name: str) -> None:
        """Fields missing from ``config`` are those of ``defaults``; ``name`` is for messages."""
        self.config, self.defaults, self.name = config, defaults, name

    def get(self, key: str, default: Any = None) -> Any:
        """The field as it is, or its default."""
        return self.config.get(key, self.defaults.get(key, default))

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        """An int in ``[low, high]``; null counts as missing."""
        value = self.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.bad(key, value, f"an integer from {low} to {high}")
        return value

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        """A finite number in ``(low, high]``."""
        value = self.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.bad(key, value, "a number")
        if not low < value <= high:  # also false for NaN
            raise self.bad(key, value, f"a number above {low} and up to {high:g}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """A bool; null counts as missing."""
        value = self.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.bad(key, value, "true or false")
        return value

    def bad(self, key: str, value: object, need: str) -> RefusedError:
        """The error for a field that is not as needed."""
        return RefusedError(
            f"{self.name}: '{key}' is {value!r:.80}; it needs {need}: check the checkpoint"
        )
