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
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(n_bytes) < 1024:
            break
        n_bytes /= 1024
    else:
        unit = "TiB"
    return f"{n_bytes:.0f} bytes" if unit == "bytes" else f"{n_bytes:.{_digits(n_bytes)}f} {unit}"


def _digits(value: float) -> int:
    return 2 if value < 10 else 1 if value < 100 else 0
