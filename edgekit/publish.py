"""Turn a finished spool into an artifact: base, levels in load order, manifest, one rename."""

import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edgekit.artifact import align
from edgekit.exporters.file_types import file_type
from edgekit.exporters.gguf import TensorInfo, header_bytes, padded, tensor_offsets
from edgekit.exporters.gguf_values import Value, u32
from edgekit.exporters.hashed_file import HashedFile
from edgekit.manifest import MANIFEST_NAME, Manifest, dumps
from edgekit.planner import LOAD_ORDERS, resident_step, stored_step
from edgekit.routing.gguf_keys import range_metadata
from edgekit.spool import Spool, TensorRecord, write_atomically
from edgekit.stack import SOURCE, FileRecord, Level, Part, Stack

BASE_CODEC = "ggml"  # level 0 is plain blocks
ALIGNMENT = 32  # bytes between tensors of the base, GGUF's default


@dataclass(frozen=True)
class Encoded:
    """A tensor whose levels lie in the spool under ``index``."""

    index: int
    shape: tuple[int, ...]
    source_type: str
    record: TensorRecord

    def type_at(self, level: int) -> str:
        """ggml type of level ``level``."""
        tier = self.record.tiers[level]
        return self.source_type if tier == SOURCE else tier


class HashingWriter(HashedFile):
    """A file of an artifact, which the manifest records."""

    def pad_to(self, offset: int) -> None:
        """Append zeros up to ``offset``."""
        self.write(bytes(offset - self.n_bytes))

    def part(self, pieces: Iterator[bytes]) -> Part:
        """Append ``pieces`` as one part."""
        start, digest = self.n_bytes, hashlib.sha256()
        for piece in pieces:
            digest.update(piece)
            self.write(piece)
        return Part(start, self.n_bytes - start, digest.hexdigest())

    @property
    def record(self) -> FileRecord:
        """Name, bytes and hash of what has been written."""
        return FileRecord(self.path.name, self.n_bytes, self.sha256)


def publish(
    spool: Spool,
    folder: Path,
    tensors: Sequence[Encoded],
    metadata: dict[str, Value],
    facts: Manifest,
    order: str = "kl",
) -> Manifest:
    """Write base and ``.levels`` into ``folder`` from the spool; return the whole manifest.

    Args:
        spool: Where the encoded tensors lie.
        folder: Exists and is empty.
        tensors: In the base's order.
        metadata: Key-value pairs of the base GGUF.
        facts: Everything about the artifact that does not depend on the files.
        order: Key of `LOAD_ORDERS`.
    """
    stem = facts.name
    with HashingWriter(folder / f"{stem}-{_lowest(facts.tiers)}.gguf") as out:
        header, stacks = _write_base(out, spool, tensors, metadata, facts.codec)
        base = out.record
    sort = LOAD_ORDERS[order]
    stored, resident = sort(stacks, stored_step), sort(stacks, resident_step)
    with HashingWriter(folder / f"{stem}.levels") as out:
        stacks = _write_levels(out, spool, tensors, stacks, stored)
        levels = out.record
    return replace(
        facts,
        base=base,
        header_bytes=len(header),
        header_sha256=hashlib.sha256(header).hexdigest(),
        levels=levels,
        stacks=stacks,
        stored_order=stored,
        resident_order=resident,
    )


def _lowest(tiers: Sequence[str]) -> str:
    return tiers[0] if tiers[0] != SOURCE else "source"


def _write_base(
    out: HashingWriter,
    spool: Spool,
    tensors: Sequence[Encoded],
    metadata: dict[str, Value],
    codec: str,
) -> tuple[bytes, tuple[Stack, ...]]:
    infos = [TensorInfo(t.record.name, t.type_at(0), t.shape) for t in tensors]
    typed = {"general.file_type": u32(file_type(infos))} | range_metadata(infos, ALIGNMENT)
    header = header_bytes(metadata | typed, infos)
    out.write(header)
    stacks = []
    for tensor, offset in zip(tensors, tensor_offsets(infos, ALIGNMENT), strict=True):
        out.pad_to(len(header) + offset)
        parts = tuple(
            out.part(spool.pieces(tensor.index, tensor.record, 0, expert))
            for expert in range(len(tensor.record.sizes))
        )
        levels = tuple(
            _level(tensor, i, parts if i == 0 else _sizes(tensor, i), codec)
            for i in range(len(tensor.record.tiers))
        )
        stacks.append(Stack(tensor.record.name, tensor.shape, tensor.source_type, levels))
    out.pad_to(padded(out.n_bytes, ALIGNMENT))
    return header, tuple(stacks)


def _sizes(tensor: Encoded, level: int) -> tuple[Part, ...]:
    """Parts that know their size but not yet their place: what ordering the levels needs."""
    return tuple(
        Part(0, sum(chunk[level] for chunk in expert), "") for expert in tensor.record.sizes
    )


def _level(tensor: Encoded, i: int, parts: tuple[Part, ...], codec: str) -> Level:
    record = tensor.record
    parent, codec = (None, BASE_CODEC) if i == 0 else (record.tiers[i - 1], codec)
    loss, kind = record.losses[i], record.types[i]
    return Level(record.name, record.tiers[i], parent, codec, parts, loss, kind)


def _write_levels(
    out: HashingWriter,
    spool: Spool,
    tensors: Sequence[Encoded],
    stacks: Sequence[Stack],
    order: Sequence[tuple[str, str]],
) -> tuple[Stack, ...]:
    """Write all levels in ``order``; return the stacks with every part in its place."""
    by_name = {tensor.record.name: tensor for tensor in tensors}
    placed: dict[tuple[str, str], tuple[Part, ...]] = {}
    for name, tier in order:
        tensor = by_name[name]
        level, parts = tensor.record.tiers.index(tier), []
        for expert in range(len(tensor.record.sizes)):
            out.pad_to(align(out.n_bytes))
            parts.append(out.part(spool.pieces(tensor.index, tensor.record, level, expert)))
        placed[name, tier] = tuple(parts)
    return tuple(
        replace(
            stack,
            levels=tuple(
                replace(lv, parts=placed.get((lv.tensor, lv.tier), lv.parts)) for lv in stack.levels
            ),
        )
        for stack in stacks
    )


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``edgekit.json`` into ``folder``."""
    write_atomically(folder / MANIFEST_NAME, dumps(manifest).encode())


def move_into_place(staged: Path, final: Path) -> None:
    """Rename the staged folder to its final name; what stood there before goes only then."""
    sync_folder(staged)
    old = final.with_name(f".{final.name}.old")
    if old.exists():
        shutil.rmtree(old)
    if final.exists():
        final.rename(old)
    staged.rename(final)
    sync_folder(final.parent)
    if old.exists():
        shutil.rmtree(old)


def sync_folder(folder: Path) -> None:
    """Make the names in ``folder`` durable."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
