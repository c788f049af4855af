"""A real control group for a test, or the printed reason why there is none."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from bench.cgroups import Group, memory_group

# a program that takes bytes within a second and lets go of them half a second later
HOG = """
import sys, time
top, held = int(sys.argv[1]), []
for _ in range(20):
    block = bytearray(top // 20)
    block[::4096] = b"x" * len(block[::4096])
    held.append(block)
    time.sleep(0.05)
time.sleep(0.5)
"""


@contextmanager
def real_group(limit: int) -> Iterator[Group]:
    """A memory control group with a limit in bytes; skips where this process may make none."""
    made = memory_group("edgekit-test", limit)
    try:
        group = made.__enter__()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    try:
        yield group
    finally:
        made.__exit__(None, None, None)
