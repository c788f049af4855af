"""A conversation outside llama.cpp, while its depth changes or memory is too short for any."""

import contextlib
import shutil
import tempfile
from pathlib import Path
from typing import IO

from edgekit.disk import temporary_folder
from edgekit.errors import EdgekitError
from edgekit.llama import Context


class Saved:
    """Tokens, and their cache on disk where it can be.

    A copy in memory would come on top of what is planned.

    Attributes:
        tokens: Of the conversation.
    """

    def __init__(self, context: Context, kv_type: str) -> None:
        """Take over what ``context`` holds, whose cache is of ``kv_type``."""
        self.tokens, self._kv_type = tuple(context.tokens), kv_type
        self._file: IO[bytes] | None = None
        if not self.tokens:
            return
        try:
            folder = temporary_folder()
            self._file = tempfile.TemporaryFile(prefix="edgekit-state-", dir=folder)  # noqa: SIM115
            context.save_file(_path_of(self._file))
        except (EdgekitError, OSError):  # no room on disk, or no way to name an unnamed file
            self.close()

    def restore(self, context: Context, kv_type: str) -> None:
        """Fill a context.

        One with another type of cache computes the conversation anew, and so does one that cannot
        read it back.
        """
        if not self.tokens:
            return
        if kv_type == self._kv_type and self._file is not None:
            with contextlib.suppress(EdgekitError):  # the context is empty then
                context.restore_file(_path_of(self._file))
                return
        context.decode(self.tokens, "none")

    def copy_to(self, path: Path) -> None:
        """Write the file once more, under a name.

        Raises:
            EdgekitError: It cannot be written, or the conversation is not on disk.
        """
        if self._file is None:
            raise EdgekitError("the conversation is not on disk, and no depth of it is loaded")
        try:
            shutil.copyfile(_path_of(self._file), path)
        except OSError as error:
            raise EdgekitError(f"{path} cannot be written: {error.strerror}") from error

    def close(self) -> None:
        """Let go of the file; twice is once."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _path_of(file: IO[bytes]) -> Path:
    """A path to an open file that has no name of its own any more: a kill leaves nothing behind."""
    return Path(f"/dev/fd/{file.fileno()}")
