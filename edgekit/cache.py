"""The cache: materialized models that are mapped again, and what was verified.

It lies in ``$EDGEKIT_CACHE``, else where the system keeps caches, and may be deleted at any time.
Models take at most `limit_bytes`; the one used longest ago goes first. A file appears under its
name only when it is whole, named after the hashes of the artifact's files and the tier of every
tensor. A *stamp* beside it tells inode, size and times of the file as it was written: one that was
touched since is never used, and thrown away once no process can be about to stamp it. What a
killed process left is swept away.
"""

import contextlib
import hashlib
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from edgekit.disk import try_to_lock
from edgekit.errors import EdgekitError
from edgekit.sizes import parse_size
from edgekit.spool import write_atomically

DEFAULT_LIMIT = 20 << 30  # bytes of models
MODELS = "models"
SETTLED_SECONDS = 60.0  # a model whose process has not stamped it by then is an orphan


def cache_folder() -> Path:
    """Where the cache is; nothing is created."""
    chosen = os.environ.get("EDGEKIT_CACHE")
    if chosen:
        return Path(chosen)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "edgekit"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home())) / "edgekit" / "cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgekit"


def limit_bytes() -> int:
    """What materialized models may take: ``$EDGEKIT_CACHE_LIMIT``, else 20 GiB."""
    return parse_size(os.environ.get("EDGEKIT_CACHE_LIMIT") or str(DEFAULT_LIMIT))


def model_path(hashes: Sequence[str], tiers: Mapping[str, str]) -> Path:
    """The place of the model with these tiers of the artifact whose files have these hashes."""
    key = json.dumps([*hashes, sorted(tiers.items())])
    return cache_folder() / MODELS / f"{hashlib.sha256(key.encode()).hexdigest()[:40]}.gguf"


def has_model(path: Path) -> bool:
    """Whether the model at ``path`` is there and as it was written."""
    is_sound = _is_sound(path)
    if is_sound:
        with contextlib.suppress(OSError):
            os.utime(_stamp(path))  # used now
    return is_sound


def _is_sound(path: Path) -> bool:
    try:
        sound: bool = json.loads(_stamp(path).read_bytes()) == identity(path.stat())
    except (OSError, ValueError):
        return False
    return sound


def stamp(path: Path) -> None:
    """Vouch for the model at ``path``, which was just written.

    Raises:
        EdgekitError: Another process removed it in between.
    """
    try:
        seen = identity(path.stat())
    except FileNotFoundError as error:
        raise EdgekitError(
            f"{path} was removed from the cache by another process; load again"
        ) from error
    write_atomically(_stamp(path), json.dumps(seen).encode())


def identity(stat: os.stat_result) -> list[int]:
    """What changes when a file is replaced or written to: device, inode, size, times."""
    return [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _stamp(path: Path) -> Path:
    return path.with_suffix(".stamp")


def _drop(path: Path) -> None:
    for name in (_stamp(path), path):
        with contextlib.suppress(OSError):
            name.unlink()


def make_room(path: Path, n_bytes: int) -> None:
    """Prepare the folder for a model of ``n_bytes`` at ``path``: sweep it, drop the oldest others.

    Raises:
        EdgekitError: The folder cannot be made or written.
    """
    folder, limit = cache_folder() / MODELS, limit_bytes()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _sweep(folder)
        kept = sorted((other for other in folder.glob("*.gguf") if other != path), key=_last_use)
        total = sum(path.stat().st_size for path in kept)
        while kept and total + n_bytes > limit:
            total -= kept[0].stat().st_size
            _drop(kept.pop(0))
    except OSError as error:
        raise EdgekitError(
            f"the cache {folder} cannot be used ({error.strerror}); set EDGEKIT_CACHE to another "
            "folder, or load with --residency anon"
        ) from error


def _last_use(path: Path) -> float:
    seen = _stamp(path)
    return (seen if seen.exists() else path).stat().st_mtime


def _sweep(folder: Path) -> None:
    """Remove what processes that are gone left half written, and what nobody vouches for."""
    for path in folder.glob("*.partial-*"):
        with contextlib.suppress(FileNotFoundError):  # it became whole a moment ago
            if time.time() - path.stat().st_mtime > 24 * 3600 or not _is_being_written(path):
                path.unlink(missing_ok=True)
    for path in folder.glob("*.gguf"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_ctime > SETTLED_SECONDS and not _is_sound(path):
                _drop(path)


def _is_being_written(path: Path) -> bool:
    """Whether a process holds it; where that cannot be told, yes."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        return not try_to_lock(descriptor)
    finally:
        os.close(descriptor)
