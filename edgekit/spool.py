"""The working folder of a conversion: what is done survives a kill, ``--resume`` goes on.

One file per tensor with all its levels, chunk after chunk, and one JSON record that is written
last, atomically: a tensor is done exactly when its record is there. A job file ties the folder to
one conversion: same checkpoint, same options.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

from edgekit.errors import UsageError

JOB_NAME, READY_NAME = "job.json", "ready"
Json = dict[str, Any]


@dataclass(frozen=True)
class TensorRecord:
    """Where the levels of one tensor lie in its spool file.

    Attributes:
        name: GGUF name.
        tiers: Tier of every level, lowest first.
        losses: Loss left at each tier.
        sizes: ``[expert][chunk][level]`` bytes, in file order.
        types: ggml type of every tier that is none itself, else empty.
    """

    name: str
    tiers: tuple[str, ...]
    losses: tuple[float, ...]
    sizes: tuple[tuple[tuple[int, ...], ...], ...]
    types: tuple[str, ...]


class Spool:
    """The working folder next to the artifact it becomes."""

    def __init__(self, folder: Path) -> None:
        """Take ``folder``; nothing is created yet."""
        self.folder = folder

    def open(self, job: Json, command: Sequence[str], resume: bool) -> list[str]:
        """Start empty, or go on where a conversion with the same ``job`` stopped.

        Returns:
            The command that began the conversion.

        Raises:
            UsageError: The folder belongs to another conversion.
        """
        path = self.folder / JOB_NAME
        if resume and path.is_file():
            kept = json.loads(path.read_text())
            if kept["job"] != json.loads(json.dumps(job)):
                raise UsageError(
                    f"{self.folder} belongs to a conversion with another checkpoint or other "
                    "options; repeat the first command with --resume, or start again without it"
                )
            return list(kept["command"])
        self.remove()
        self.folder.mkdir(parents=True)
        body = {"job": job, "command": list(command)}
        write_atomically(path, json.dumps(body, indent=1).encode())
        return list(command)

    def set_ready(self) -> None:
        """Note that the staged artifact is whole: only its rename is left."""
        write_atomically(self.folder / READY_NAME, b"")

    @property
    def is_ready(self) -> bool:
        """Whether `set_ready` was reached."""
        return (self.folder / READY_NAME).exists()

    def is_published(self, name: str) -> bool:
        """Whether the artifact ``name`` has left this folder for its final place."""
        renamed = self.is_ready and not (self.folder / name).exists()
        return renamed or not self.folder.exists()

    @contextmanager
    def told_when_stopped(self, note: Callable[[str], None]) -> Iterator[None]:
        """Say to whoever presses Ctrl-C how to go on."""
        try:
            yield
        except KeyboardInterrupt:
            if self.folder.exists():
                note(f"repeat the command with --resume to go on, or remove {self.folder}")
            raise

    def remove(self) -> None:
        """Delete the folder with everything in it; killed half-way, it is gone all the same."""
        doomed = self.folder.with_name(f"{self.folder.name}.old")
        if doomed.exists():
            shutil.rmtree(doomed)
        if self.folder.exists():
            self.folder.rename(doomed)
            shutil.rmtree(doomed)

    def data_path(self, index: int) -> Path:
        """The file of tensor ``index``."""
        return self.folder / f"{index:06d}.data"

    def record(self, index: int) -> TensorRecord | None:
        """The record of tensor ``index``, ``None`` while it is not done."""
        path = self._record_path(index)
        if not path.is_file():
            return None
        body = json.loads(path.read_text())
        sizes = tuple(tuple(tuple(chunk) for chunk in expert) for expert in body["sizes"])
        tiers, losses, types = (tuple(body[key]) for key in ("tiers", "losses", "types"))
        return TensorRecord(body["name"], tiers, losses, sizes, types)

    def commit(self, index: int, record: TensorRecord) -> None:
        """Make tensor ``index`` done once `data_path` is whole and on disk."""
        write_atomically(self._record_path(index), json.dumps(asdict(record)).encode())

    def writing(self, index: int) -> AbstractContextManager[BinaryIO]:
        """A file that becomes that of tensor ``index``, whole and on disk, when the block ends.

        Two workers may write the same tensor, where one is taken for lost: the later one wins.
        """
        return replacing(self.data_path(index))

    def pieces(self, index: int, record: TensorRecord, level: int, expert: int) -> Iterator[bytes]:
        """The chunks of one level of one expert, in order."""
        at = sum(sum(chunk) for done in record.sizes[:expert] for chunk in done)
        with self.data_path(index).open("rb") as file:
            for chunk in record.sizes[expert]:
                file.seek(at + sum(chunk[:level]))
                yield file.read(chunk[level])
                at += sum(chunk)

    def _record_path(self, index: int) -> Path:
        return self.folder / f"{index:06d}.json"


def write_atomically(path: Path, data: bytes) -> None:
    """Write a small file so that it is there whole or not at all."""
    with replacing(path) as file:
        file.write(data)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that becomes ``path``, whole and on disk, when the block ends without an error."""
    partial = path.with_name(f"{path.name}.{uuid4().hex}")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
