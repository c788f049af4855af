"""``tokenizer.zip``: the checkpoint's tokenizer files within an artifact.

llama.cpp has the tokenizer in the base; other runtimes read the files as the checkpoint had them.
"""

import hashlib
import io
import zipfile
import zlib
from pathlib import Path

from edgekit.checkpoint import contained
from edgekit.errors import RefusedError, UsageError
from edgekit.exporters.onnx_configs import CARRIED, carried_files
from edgekit.manifest import Json
from edgekit.publish import HashingWriter

NAME = "tokenizer.zip"
METHOD = zipfile.ZIP_BZIP2  # a quarter less than deflate for a tokenizer.json
FIRST_DAY = (1980, 1, 1, 0, 0, 0)  # equal files give equal archives
MAX_BYTES = 1 << 28  # of the archive, and of all its files together; the largest known have 40 MB


def pack_tokenizer(checkpoint: Path, folder: Path) -> Json:
    """Write the archive into ``folder``; what the manifest tells of it.

    Raises:
        RefusedError: A tokenizer file leads out of the checkpoint's folder.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in carried_files(checkpoint).items():
            entry = zipfile.ZipInfo(name, FIRST_DAY)
            entry.compress_type, entry.external_attr = METHOD, 0o644 << 16
            archive.writestr(entry, data)
    with HashingWriter(folder / NAME) as out:
        out.write(buffer.getvalue())
    return {"file": NAME, "bytes": out.record.n_bytes, "sha256": out.record.sha256}


def read_tokenizer(folder: Path, source: Json) -> dict[str, bytes]:
    """Name and content of every tokenizer file in the artifact.

    Args:
        folder: Of the artifact.
        source: The manifest's ``source``.

    Raises:
        UsageError: The artifact holds none.
        RefusedError: The archive is not the one that was written, or holds what it must not.
    """
    told, path = source.get("tokenizer"), contained(folder, NAME)
    if told is None or path is None:
        raise UsageError(
            f"{folder} has no {NAME}; give the folder of its config and tokenizer: "
            "--checkpoint FOLDER"
        )
    data = path.read_bytes() if path.stat().st_size <= MAX_BYTES else b""
    if told != {"file": NAME, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}:
        raise RefusedError(f"{path} is not what the manifest tells of; get the artifact again")
    try:
        return _files(data)
    except (zipfile.BadZipFile, zlib.error, ValueError, OSError, EOFError, RuntimeError) as error:
        raise RefusedError(f"{path} is damaged ({error}); get the artifact again") from error


def _files(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = archive.infolist()
        names = [entry.filename for entry in entries]
        if len(set(names)) != len(names) or not set(names) <= set(CARRIED):
            raise ValueError(f"it holds {', '.join(names)!a:.80}, not tokenizer files alone")
        if sum(entry.file_size for entry in entries) > MAX_BYTES:
            raise ValueError(f"its files have more than {MAX_BYTES} bytes")
        return {entry.filename: archive.read(entry) for entry in entries}  # no more than told
