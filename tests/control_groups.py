"""A real control group for a test, or the printed reason why there is none."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from bench.cgroups import Group, memory_group


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
