"""Where the bytes of an expert come from: a GGUF on disk, or its levels in the artifact.

Both read with ``pread``: a disk that fails is an error of ours, where a mapped page would end the
process.
"""

import contextlib
import hashlib
import os
from collections.abc import Collection
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Protocol

import numpy as np

from edgekit.artifact import Artifact
from edgekit.codecs import CODECS
from edgekit.decode import Decoder, chunks_of
from edgekit.errors import EdgekitError, RefusedError
from edgekit.exporters.gguf import Gguf, tensor_offsets
from edgekit.planner import Depths
from edgekit.stack import Level, Part


class ExpertStore(Protocol):
    """Reads experts; safe on several threads."""

    def read(self, name: str, expert: int, into: memoryview) -> int:
        """Fill ``into`` with the blocks of one expert of tensor ``name``.

        Returns:
            Bytes that were read for it.

        Raises:
            EdgekitError: The disk failed. RefusedError: the bytes are not what they should be.
        """
        ...

    def close(self) -> None:
        """Close the files; twice is once."""
        ...


class FileStore:
    """Experts as a GGUF has them."""

    def __init__(self, path: Path, header: Gguf, names: Collection[str]) -> None:
        """Open ``path``, whose header was read."""
        self._file = OpenFile(path)
        offsets = tensor_offsets(header.tensors, header.alignment)
        self._starts = {
            tensor.name: header.data_offset + offset
            for tensor, offset in zip(header.tensors, offsets, strict=True)
            if tensor.name in names
        }

    def read(self, name: str, expert: int, into: memoryview) -> int:
        """See `ExpertStore`."""
        offset = self._starts[name] + expert * len(into)
        self._file.readinto(offset, into, f"expert {expert} of {name}")
        return len(into)

    def close(self) -> None:
        """See `ExpertStore`."""
        self._file.close()


class LevelStore:
    """Experts decoded from the levels of an artifact, hashed when they are read first."""

    def __init__(self, artifact: Artifact, depths: Depths) -> None:
        """Open the artifact's files again, to be read in place of mapped."""
        manifest = artifact.manifest
        self._artifact, self._depths = artifact, depths
        self._base = OpenFile(artifact.folder / manifest.base.name)
        self._levels: OpenFile | None = None
        if artifact.levels_bytes:
            self._levels = OpenFile(artifact.folder / manifest.levels.name)
        self._codec = CODECS[artifact.manifest.codec]
        self._checked: set[tuple[bool, Part]] = set()
        self._lock = Lock()

    def read(self, name: str, expert: int, into: memoryview) -> int:
        """See `ExpertStore`."""
        stack = self._artifact.stack(name)
        depth = stack.depth_of(self._depths.tier(name))
        if depth == 1:
            self._read_part(stack.levels[0], expert, into)
            return len(into)
        at, decoder = 0, Decoder(self._codec, self._part, n_kept=depth)  # every level once
        for chunk in chunks_of(stack, depth, expert, self._artifact.manifest.chunk_weights):
            decoder.decode(chunk, np.frombuffer(into[at : at + chunk.n_bytes], np.uint8))
            at += chunk.n_bytes
        return sum(level.parts[expert].n_bytes for level in stack.levels[:depth])

    def close(self) -> None:
        """See `ExpertStore`."""
        self._base.close()
        if self._levels is not None:
            self._levels.close()

    def _part(self, level: Level, expert: int) -> memoryview:
        view = memoryview(bytearray(level.parts[expert].n_bytes))
        self._read_part(level, expert, view)
        return view

    def _read_part(self, level: Level, expert: int, into: memoryview) -> None:
        part = level.parts[expert]
        file = self._base if level.parent is None else self._levels
        what = f"expert {expert} of level {level.tier} of {level.tensor}"
        assert file is not None, f"{level.tensor} has levels and no file for them"
        file.readinto(part.offset, into, what)
        key = level.parent is None, part
        if key in self._checked:
            return
        if hashlib.sha256(into).hexdigest() != part.sha256:
            raise RefusedError(
                f"{what} in {file.path.name} is corrupt: its sha256 differs from the manifest's; "
                "get the artifact again"
            )
        with self._lock:
            self._checked.add(key)


class OpenFile:
    """A file that is read at offsets, by several threads; a context manager."""

    def __init__(self, path: Path) -> None:
        """Open it.

        Raises:
            EdgekitError: It cannot be opened.
        """
        self.path = path
        self._descriptor: int | None = None
        try:
            self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise EdgekitError(f"{path}: {error.strerror}; experts cannot be read") from error
        with contextlib.suppress(OSError, AttributeError):  # experts lie far apart
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_RANDOM)

    def __enter__(self) -> "OpenFile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def readinto(self, offset: int, into: memoryview, what: str) -> None:
        """Fill ``into`` from ``offset``.

        Raises:
            EdgekitError: The disk failed, or the file ends before; the message names ``what``.
        """
        done = 0
        while done < len(into):
            try:
                if self._descriptor is None:
                    raise OSError(None, "the file is closed")
                n = os.preadv(self._descriptor, [into[done:]], offset + done)
            except OSError as error:
                raise EdgekitError(
                    f"{self.path}: {what} cannot be read ({error.strerror or error}); check the "
                    "disk, then run again"
                ) from error
            if n == 0:
                raise EdgekitError(
                    f"{self.path}: {what} cannot be read (the file ends {len(into) - done} bytes "
                    "too early); get it again"
                )
            done += n

    def close(self) -> None:
        """Close it; twice is once."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
