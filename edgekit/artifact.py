"""An artifact on disk, opened for reading: nothing leaves here before its hash was checked.

``.levels`` may end anywhere: levels that are not whole are ignored and everything before them
works, so half a download is a valid model.
"""

import hashlib
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from edgekit.cache import identity
from edgekit.catalog import Catalog, read_manifest, require_gguf
from edgekit.checkpoint import contained
from edgekit.errors import RefusedError
from edgekit.exporters.gguf import Gguf, read_header, tensor_offsets
from edgekit.manifest import ALIGNMENT, MANIFEST_NAME, Manifest
from edgekit.receipts import Receipt
from edgekit.stack import FileRecord, Level, Part, Stack

HASH_BYTES = 1 << 24  # of a part in memory while its hash is taken


def open_artifact(folder: Path, *, remember: bool = False) -> "Artifact":
    """Open the artifact in ``folder``: read the manifest, check the base's header, map the files.

    Args:
        folder: Where ``edgekit.json`` is.
        remember: Do not hash again what was found sound before (`edgekit.receipts`), and keep
            what is found sound now.

    Raises:
        UsageError: The folder holds no artifact.
        RefusedError: A file is missing, cut or corrupt.
    """
    return Artifact(folder, require_gguf(folder, read_manifest(folder)), remember)


class Artifact(Catalog):
    """Files of one artifact, mapped read-only; a context manager.

    Attributes:
        header: The base's GGUF header.
    """

    def __init__(self, folder: Path, manifest: Manifest, remember: bool = False) -> None:
        """Map the files; ``manifest`` has been checked."""
        self._checked: dict[str, set[Part]] = {}  # by file
        self._receipts: dict[str, Receipt] = {}
        self._base, base_seen = _map(folder, manifest.base.name)
        self._levels, levels_seen = _map(folder, manifest.levels.name)
        super().__init__(folder, manifest, len(self._levels))
        self.header = self._check_base()
        for (record, data), seen in zip(self.files, (base_seen, levels_seen), strict=True):
            self._checked[record.name] = set()
            if remember and data:
                self._receipts[record.name] = Receipt(folder / record.name, record.sha256, seen)

    def __enter__(self) -> "Artifact":
        """Use as a context manager."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the mappings."""
        self.close()

    def close(self) -> None:
        """Let the mappings go; they end when the last view handed out does."""
        for name, receipt in self._receipts.items():
            receipt.keep(self._checked[name])
        self._receipts = {}
        self._base = self._levels = b""

    @property
    def files(self) -> tuple[tuple[FileRecord, mmap.mmap | bytes], ...]:
        """Base and ``.levels``: what the manifest says of them, and the bytes that are here."""
        return (self.manifest.base, self._base), (self.manifest.levels, self._levels)

    def part(self, level: Level, expert: int = 0) -> memoryview:
        """The bytes of one part of a level, their hash checked at the first use.

        Raises:
            RefusedError: The bytes do not have the hash that the manifest gives.
        """
        part, record = level.parts[expert], self._record(level)
        view = memoryview(self._base if level.parent is None else self._levels)[
            part.offset : part.end
        ]
        if part not in self._checked[record.name] and not self._was_checked(record, part):
            self._check(part, view, f"level {level.tier} of {level.tensor} in {record.name}")
            self._checked[record.name].add(part)
        return view

    def _was_checked(self, record: FileRecord, part: Part) -> bool:
        receipt = self._receipts.get(record.name)
        return receipt is not None and receipt.covers(part)

    def _check(self, part: Part, view: memoryview, name: str) -> None:
        digest = hashlib.sha256()
        for start in range(0, len(view), HASH_BYTES):
            digest.update(view[start : start + HASH_BYTES])
            if len(view) > HASH_BYTES:
                self.release()
        if digest.hexdigest() != part.sha256:
            raise RefusedError(
                f"{name} is corrupt: its sha256 differs from the manifest's; get the artifact again"
            )

    def release(self) -> None:
        """Let the kernel drop the files' pages from this process."""
        for mapped in (self._base, self._levels):
            if isinstance(mapped, mmap.mmap) and hasattr(mapped, "madvise"):
                mapped.madvise(mmap.MADV_DONTNEED)

    def _record(self, level: Level) -> FileRecord:
        return self.manifest.base if level.parent is None else self.manifest.levels

    def _check_base(self) -> Gguf:
        """The base has the size, header and tensors that the manifest tells."""
        record, n_bytes = self.manifest.base, len(self._base)
        if n_bytes != record.n_bytes:
            raise RefusedError(
                f"{record.name} has {n_bytes} bytes, the manifest says {record.n_bytes}; "
                "get it again"
            )
        head = bytes(self._base[: self.manifest.header_bytes])
        if hashlib.sha256(head).hexdigest() != self.manifest.header_sha256:
            raise RefusedError(f"the header of {record.name} is corrupt; get the artifact again")
        header = read_header(head, file_size=n_bytes, name=record.name)
        offsets = tensor_offsets(header.tensors, header.alignment)
        if not _same_facts(header, self.manifest):
            raise RefusedError(
                f"{record.name} describes another model than {MANIFEST_NAME} does; refused"
            )
        found = [
            (tensor.name, tensor.type_name, tensor.shape, header.data_offset + offset)
            for tensor, offset in zip(header.tensors, offsets, strict=True)
        ]
        if found != [_base_row(stack) for stack in self.manifest.stacks]:
            raise RefusedError(
                f"{record.name} holds other tensors than {MANIFEST_NAME} tells; refused"
            )
        return header


def _same_facts(header: Gguf, manifest: Manifest) -> bool:
    """Whether the facts that plans follow from are those that llama.cpp will read."""
    told, vocab = dict(manifest.model), header.get("tokenizer.ggml.tokens", ())
    same_vocab = told.pop("vocab_size", None) == len(vocab) or not vocab
    same_architecture = header.get("general.architecture") == manifest.architecture
    facts = {key: header.get(key) for key in told}
    return same_architecture and same_vocab and _as_stored(facts) == _as_stored(told)


def _as_stored(value: object) -> object:
    """Floats as float32, which is what a GGUF holds of them."""
    if isinstance(value, dict):
        return {key: _as_stored(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_stored(item) for item in value]
    return float(np.float32(value)) if isinstance(value, float) else value


def _base_row(stack: Stack) -> tuple[str, str, tuple[int, ...], int]:
    """What the base's header must say of a tensor: name, type, shape, offset in the file."""
    lowest = stack.levels[0]
    return stack.name, stack.type_at(lowest.tier), stack.shape, lowest.parts[0].offset


def _map(folder: Path, name: str) -> tuple[mmap.mmap | bytes, list[int]]:
    """Map a file read-only, and tell its identity.

    One that is empty (cannot be mapped) or not there has no bytes.
    """
    path = contained(folder, name)
    if path is None:
        return b"", []
    try:
        with path.open("rb") as file:
            stat = os.fstat(file.fileno())
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if stat.st_size else b""
            return data, identity(stat)
    except OSError as error:
        raise RefusedError(f"{path}: {error.strerror}; get the artifact again") from error


@dataclass(frozen=True)
class Verification:
    """What ``verify`` found; ``missing`` counts levels cut off the end of ``.levels``."""

    checked: int
    missing: int
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """No problem was found; missing levels are none."""
        return not self.problems


def verify(artifact: Artifact) -> Verification:
    """Check every byte of every file against the manifest."""
    problems = list(_file_problems(artifact))
    checked = 0
    for stack in artifact.stacks:
        for level in stack.levels:
            checked += 1
            problems += _level_problems(artifact, level)
    whole = sum(len(stack.levels) for stack in artifact.manifest.stacks)
    return Verification(checked, whole - checked, tuple(problems))


def _level_problems(artifact: Artifact, level: Level) -> Iterator[str]:
    for expert in range(len(level.parts)):
        try:
            artifact.part(level, expert)
        except RefusedError as error:
            yield str(error)


def _file_problems(artifact: Artifact) -> Iterator[str]:
    """Bytes that belong to no level: padding, and a whole file that is not what was written."""
    for record, data in artifact.files:
        n_bytes, digest = len(data), hashlib.sha256()
        for start in range(0, n_bytes, 1 << 20):
            digest.update(data[start : start + (1 << 20)])
        if n_bytes > record.n_bytes:
            yield f"{record.name} has {n_bytes} bytes, not {record.n_bytes}; get it again"
        elif n_bytes == record.n_bytes and digest.hexdigest() != record.sha256:
            yield f"{record.name} is corrupt: its sha256 differs from the manifest's; get it again"


def align(offset: int) -> int:
    """The next offset at which a level may start."""
    return -(-offset // ALIGNMENT) * ALIGNMENT
