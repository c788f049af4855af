"""Model folders of whole codes in the cache: composed once, mapped again by every later session."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgekit.cache import cache_folder, identity, limit_bytes
from edgekit.disk import folder_bytes, require_free, temporary_folder
from edgekit.errors import DiskFullError
from edgekit.onnx.artifact import OnnxArtifact
from edgekit.onnx.materialize import is_newest, whole_bytes, write_folder

STAMP = "stamp.json"


def cached_folder(artifact: OnnxArtifact, depth: int) -> Path | None:
    """The model folder of a depth, made where it is missing; None where there is no room for it.

    The artifact has been checked for this depth. A folder whose files were touched is made anew.
    """
    place = _place(artifact, depth)
    if _is_sound(place):
        with contextlib.suppress(OSError):
            os.utime(place / STAMP)  # used now
        return place
    partial = place.with_name(f".{place.name}.{os.getpid()}")
    need = whole_bytes(artifact, depth)
    try:
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        shutil.rmtree(place, ignore_errors=True)
        _make_room(place.parent, need)
        write_folder(artifact, depth, partial, for_here=True)
        (partial / STAMP).write_text(json.dumps(_identities(partial)), encoding="utf-8")
        partial.rename(place)
    except (OSError, DiskFullError):
        return place if _is_sound(place) else None  # perhaps another process was faster
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return place


@contextmanager
def model_folder(artifact: OnnxArtifact, depth: int) -> Iterator[Path]:
    """The model folder of a depth: in the cache, or where that has no room, a temporary one."""
    folder = cached_folder(artifact, depth)
    if folder is not None:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="edgekit-onnx-", dir=temporary_folder()) as place:
        folder = Path(place) / "model"
        require_free(folder, whole_bytes(artifact, depth), "composing the codes of a depth")
        write_folder(artifact, depth, folder, for_here=True)
        yield folder


def _place(artifact: OnnxArtifact, depth: int) -> Path:
    files = sorted(record.sha256 for record in artifact.part.files)
    key = json.dumps([depth, is_newest(), *files])  # graphs are for the onnxruntime of here
    return cache_folder() / "onnx" / hashlib.sha256(key.encode()).hexdigest()[:40]


def _identities(folder: Path) -> dict[str, list[int]]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != STAMP]
    return {path.relative_to(folder).as_posix(): identity(path.stat()) for path in files}


def _is_sound(folder: Path) -> bool:
    try:
        told = json.loads((folder / STAMP).read_bytes())
        return bool(told) and told == _identities(folder)
    except (OSError, ValueError):
        return False


def _make_room(folder: Path, n_bytes: int) -> None:
    """Remove the folders used longest ago until ``n_bytes`` fit the cache's limit."""
    kept = sorted((p for p in folder.iterdir() if p.is_dir()), key=_last_use)
    total = sum(map(folder_bytes, kept))
    while kept and total + n_bytes > limit_bytes():
        total -= folder_bytes(kept[0])
        shutil.rmtree(kept.pop(0), ignore_errors=True)
    require_free(folder, n_bytes, "the cache")


def _last_use(folder: Path) -> float:
    stamp = folder / STAMP
    return stamp.stat().st_mtime if stamp.exists() else 0.0
