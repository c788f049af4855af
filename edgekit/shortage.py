"""Ends a load that memory will not be enough for, before the kernel ends the process."""

import time
from collections.abc import Callable

from edgekit.devices.pressure import read_pressure
from edgekit.errors import MemoryShortError
from edgekit.sizes import format_size

WATCH_SECONDS = 0.02  # between two looks at memory
SHORTAGE = 0.95  # of what is still to come; less that is free ends a load


def shortage_watch(to_come: int) -> Callable[[int], None]:
    """What ends a load of ``to_come`` bytes when less memory is free than has not come yet.

    Returns:
        To be called with the bytes so far; raises `MemoryShortError`.
    """
    last = 0.0

    def watch(n_bytes: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < WATCH_SECONDS:
            return
        last, free, rest = now, read_pressure().free_bytes, to_come - n_bytes
        if free < SHORTAGE * rest:
            raise MemoryShortError(
                f"{format_size(rest)} are still to be loaded, {format_size(free)} are free"
            )

    return watch
