"""``edgekit materialize``: write the GGUF of a plan, an ordinary file for any llama.cpp app."""

import os
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from edgekit.artifact import Artifact
from edgekit.assembly import Assembly
from edgekit.catalog import read_manifest
from edgekit.disk import PLAIN, disk_full_reported, require_free, try_to_lock
from edgekit.errors import EdgekitError, UsageError
from edgekit.manifest import MANIFEST_NAME
from edgekit.planner import Depths
from edgekit.sink import FileSink

SYNC_BYTES = 1 << 26  # handed to the disk at once, so that little is left to wait for at the end


@dataclass(frozen=True)
class Materialized:
    """The file written; ``tensors`` as ``{name, tier}``."""

    path: str
    bytes: int
    seconds: float
    tensors: tuple[dict[str, str], ...]


def materialize(
    artifact: Artifact,
    depths: Depths,
    output: Path,
    *,
    force: bool = False,
    n_threads: int | None = None,
) -> Materialized:
    """Write the GGUF of ``artifact`` at ``depths`` to ``output``, which appears when it is whole.

    Raises:
        UsageError: ``output`` exists and force is off, or is no place for a file.
        DiskFullError: There is not enough room.
        RefusedError: A level is corrupt.
    """
    started = time.monotonic()
    check_output(output, force)
    with Assembly(artifact, depths, n_threads or os.cpu_count() or 1) as assembly:
        require_free(output.parent, assembly.size, f"writing {output}")
        _write(assembly, output)
    seconds = round(time.monotonic() - started, 3)
    return Materialized(str(output), assembly.size, seconds, _tensors(artifact, depths))


def _write(assembly: Assembly, output: Path) -> None:
    """Write it under another name first."""
    partial = output.with_name(f"{output.name}.partial-{uuid4().hex}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | PLAIN
    try:
        with disk_full_reported(f"writing {output}", "make room and repeat"):
            descriptor = os.open(partial, flags, 0o644)
            try_to_lock(descriptor)  # so that nobody takes it for abandoned
            try:
                _write_synced(assembly, descriptor)
            finally:
                os.close(descriptor)
            partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)


def _write_synced(assembly: Assembly, descriptor: int) -> None:
    """Write the whole file; the disk takes what is written while the next chunks are decoded."""
    n_asked, syncs = 0, list[Future[None]]()
    with ThreadPoolExecutor(1) as background:

        def sync_some(n_written: int) -> None:
            nonlocal n_asked
            if n_written - n_asked >= SYNC_BYTES:
                syncs.append(background.submit(os.fsync, descriptor))
                n_asked = n_written

        assembly.write_to(FileSink(descriptor), sync_some)
    for sync in syncs:  # the kernel tells of a failed write once, to the sync that met it
        sync.result()
    os.fsync(descriptor)


def preview(artifact: Artifact, depths: Depths, output: Path) -> Materialized:
    """What `materialize` would write, to the byte; writes nothing."""
    size = Assembly(artifact, depths).size
    return Materialized(str(output), size, 0.0, _tensors(artifact, depths))


def _tensors(artifact: Artifact, depths: Depths) -> tuple[dict[str, str], ...]:
    return tuple({"name": s.name, "tier": depths.tier(s.name)} for s in artifact.stacks)


def _is_part(path: Path) -> bool:
    """Whether ``path`` is a file of the artifact in its folder; yes where that cannot be read."""
    try:
        manifest = read_manifest(path.parent)
    except EdgekitError:
        return True
    onnx = manifest.onnx.files if manifest.onnx is not None else ()
    files = {record.name for record in (manifest.base, manifest.levels, *onnx)}
    tokenizer = manifest.source.get("tokenizer") or {}
    return path.name in files | {MANIFEST_NAME, tokenizer.get("file")}


def check_output(output: Path, force: bool) -> None:
    """Check that ``output`` may be written.

    Raises:
        UsageError: It exists and force is off, it is a folder, a link, a device or a file of an
            artifact, or its folder is missing.
    """
    if output.is_symlink() or (output.exists() and not output.is_file()):
        raise UsageError(
            f"{output} is a folder, a link or a device; give the name of a file with -o"
        )
    if output.exists() and (output.parent / MANIFEST_NAME).is_file() and _is_part(output):
        raise UsageError(f"{output} is a file of an artifact; choose another -o")
    if output.exists() and not force:
        raise UsageError(f"{output} exists; choose another -o, or replace it with --force")
    if not output.absolute().parent.is_dir():
        raise UsageError(f"{output.parent} is no folder; make it first, or choose another -o")
