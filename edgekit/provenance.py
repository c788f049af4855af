"""Where an artifact comes from: files and their hashes, versions, the command, the statistics."""

import hashlib
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from edgekit import __version__
from edgekit.checkpoint import Checkpoint, contained, read_json
from edgekit.errors import RefusedError
from edgekit.imatrix import Imatrix
from edgekit.manifest import Json, pruning_facts
from edgekit.sensitivity import Fisher

PACKAGES = ("llama_cpp_python", "gguf", "numpy", "zstandard")
PRUNING = "pruning.json"  # in a checkpoint that `edgekit prune` wrote: what was done, and lost
SUFFIXES = (".json", ".safetensors", ".model", ".jinja", ".txt")


def artifact_name(folder: Path) -> str:
    """Base name of the artifact's files: the checkpoint's folder or Hugging Face repository."""
    path = folder.resolve()
    if path.parent.name == "snapshots":
        path = Path(path.parent.parent.name.split("--")[-1])
    name = "".join(c if c.isalnum() or c in "-_." else "-" for c in path.name).strip(".-")
    return name or "model"


def source_files(checkpoint: Checkpoint) -> list[Json]:
    """Name, bytes and sha256 of the checkpoint's weight, config and tokenizer files."""
    rows: list[Json] = []
    for entry in sorted(checkpoint.folder.iterdir()):
        path = contained(checkpoint.folder, entry.name) if entry.suffix in SUFFIXES else None
        if path is None:
            continue
        size = path.stat().st_size
        rows.append({"name": entry.name, "bytes": size, "sha256": file_hash(path)})
    return rows


def pruning_of(checkpoint: Checkpoint) -> Json | None:
    """What was removed from a checkpoint before, or None where nothing is known of that."""
    try:
        return pruning_facts(read_json(checkpoint.folder, PRUNING))
    except RefusedError:  # there is none, or one of another tool
        return None


def file_hash(path: Path) -> str:
    """sha256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def tool_versions(command: Sequence[str]) -> Json:
    """The command that began the conversion, and the packages whose code shaped the bytes."""
    versions = {name: version(name) for name in PACKAGES}
    return {"edgekit": __version__, **versions, "command": list(command)}


def statistics_json(imatrix: Imatrix | None, fisher: Fisher) -> Json:
    """What weighed the columns, and what a level's ``loss`` is."""
    told: Json = {"kind": "none"}
    if imatrix is not None:
        told = {
            "kind": "imatrix",
            "datasets": list(imatrix.datasets),
            "chunks": imatrix.chunk_count,
            "chunk_tokens": imatrix.chunk_size,
        }
    if not fisher.n_sequences:
        loss = "a constant of the tensor's role times the relative square error, columns weighted"
        alike = "alike" if imatrix is None else "by the mean square of their input"
        return told | {"sensitivity": "role", "loss": f"{loss} {alike}"}
    return told | {
        "sensitivity": "fisher",
        "fisher_sequences": fisher.n_sequences,
        "fisher_tokens": fisher.n_tokens,
        "loss": "second-order KL divergence to the source, nats per token",
    }
