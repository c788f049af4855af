"""Sizes in bytes as people write and read them."""

import re

from edgekit.errors import UsageError

_UNITS = {"": 1, "B": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("KMGT", start=1)
    for suffix, base in (("", 1000), ("B", 1000), ("IB", 1024))
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]*)\s*")


def parse_size(text: str) -> int:
    """Read ``900MB``, ``900MiB``, ``1.2G`` (= 1.2 GB) or plain bytes as a number of bytes.

    Raises:
        UsageError: The text is no size.
    """
    match = _SIZE.fullmatch(text)
    unit = match[2].upper() if match else ""
    if match is None or unit not in _UNITS:
        raise UsageError(f"'{text}' is no size; write bytes, 900MB, 900MiB or 1.2G")
    return int(float(match[1]) * _UNITS[unit])


def format_size(n_bytes: float) -> str:
    """Write bytes in binary units with three digits or so: ``1.21 GiB``."""
    units = ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while abs(n_bytes) >= 1024 and len(units) > 1:
        n_bytes /= 1024
        del units[0]
    digits = 0 if units[0] == "bytes" else _digits(n_bytes)
    return f"{n_bytes:.{digits}f} {units[0]}"


def _digits(value: float) -> int:
    return 2 if value < 10 else 1 if value < 100 else 0
