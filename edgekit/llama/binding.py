"""The one place that imports llama_cpp: late, with its log captured, not printed."""

import ctypes
import functools
import re
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from edgekit.errors import EdgekitError
from edgekit.kernels.openmp import limit_spinning

_ERROR = 4  # GGML_LOG_LEVEL_ERROR
_FUNCTION = re.compile(r"^\w+: (error loading model: )?")
_CONTINUED = 5  # GGML_LOG_LEVEL_CONT: the rest of the line before


class Log:
    """The last lines of llama.cpp's log, and of every level while a capture is open."""

    def __init__(self) -> None:
        """Start empty; 500 lines are more than one load prints for any architecture."""
        self.lines: deque[tuple[int, str]] = deque(maxlen=500)
        self.captures: list[list[str]] = []
        self._part = ""
        self._level = 0

    def add(self, level: int, text: bytes | None, _user_data: object) -> None:
        """Take one message, whose line may be continued by the next."""
        self._level = self._level if level == _CONTINUED else level
        *whole, self._part = (self._part + (text or b"").decode("utf-8", "replace")).split("\n")
        for line in whole:
            self.lines.append((self._level, line))
            for capture in self.captures:
                capture.append(line)

    def reason(self) -> str:
        """The first error since `clear`, the most specific, without the function that logged it."""
        errors = (line.strip() for level, line in self.lines if level == _ERROR)
        first = next((line for line in errors if line), "no reason given")
        return _FUNCTION.sub("", first)

    def clear(self) -> None:
        """Forget all lines, before a call whose errors matter."""
        self.lines.clear()
        self._part = ""


LOG = Log()


@functools.cache
def binding() -> Any:
    """Give the module ``llama_cpp.llama_cpp``, initialized, silent.

    Raises:
        EdgekitError: It is not installed or does not load on this machine.
    """
    limit_spinning()
    try:
        from llama_cpp import llama_cpp as lib
    except (ImportError, OSError, RuntimeError) as error:
        raise EdgekitError(
            f"llama-cpp-python cannot be loaded ({error}); pip install llama-cpp-python"
        ) from error
    lib.llama_log_set(_callback(lib), ctypes.c_void_p(0))
    lib.llama_backend_init()
    return lib


@functools.cache
def _callback(lib: Any) -> Any:
    return lib.llama_log_callback(LOG.add)  # cached: llama.cpp keeps the pointer


def take_log() -> None:
    """Have llama.cpp log to `LOG` again: other code of the process may have set its own."""
    lib = binding()
    lib.llama_log_set(_callback(lib), ctypes.c_void_p(0))


@contextmanager
def capture_log() -> Iterator[list[str]]:
    """Collect every line that llama.cpp logs inside the block, at all levels."""
    take_log()
    lines: list[str] = []
    LOG.captures.append(lines)
    try:
        yield lines
    finally:
        LOG.captures.remove(lines)


def system_info() -> str:
    """The instruction sets and features llama.cpp was built with."""
    return str(binding().llama_print_system_info().decode())
