"""Tell what a path is without reading weights."""

from collections import defaultdict
from pathlib import Path

from edgekit.artifact import Artifact, open_artifact
from edgekit.catalog import read_manifest
from edgekit.checkpoint import Checkpoint
from edgekit.exporters.gguf import read_header
from edgekit.manifest import FORMAT_VERSION, MANIFEST_NAME, Json, Manifest
from edgekit.stack import Level


def inspect_path(path: Path) -> Json:
    """Facts about an artifact, a GGUF file or a checkpoint folder.

    Raises:
        UsageError, RefusedError: It is none of them, or it is corrupt.
    """
    if path.is_file():
        return _gguf(path)
    if (path / MANIFEST_NAME).is_file():
        manifest = read_manifest(path)
        if not manifest.has_gguf:
            return _manifest(manifest)
        with open_artifact(path) as artifact:
            return _artifact(artifact)
    return _checkpoint(path)


def _artifact(artifact: Artifact) -> Json:
    here = {(level.tensor, level.tier) for stack in artifact.stacks for level in stack.levels}
    m = artifact.manifest
    return _manifest(m) | {
        "levels_bytes_here": artifact.levels_bytes,
        "stored": _stored(artifact),
        "levels": [
            _level(level) | {"here": (level.tensor, level.tier) in here}
            for stack in m.stacks
            for level in stack.levels
        ],
    }


def _manifest(m: Manifest) -> Json:
    onnx = {} if m.onnx is None else {"onnx": m.onnx.to_json()}
    return {
        "kind": "artifact",
        "name": m.name,
        "architecture": m.architecture,
        "format_version": FORMAT_VERSION,
        "n_parameters": m.n_parameters,
        "n_tensors": len(m.stacks) or len(m.onnx.store if m.onnx else ()),
        "codec": m.codec,
        "tiers": list(m.tiers),
        "base_bytes": m.base.n_bytes,
        "levels_bytes": m.levels.n_bytes,
        "statistics": m.statistics,
        "source": m.source,
        "tool": m.tool,
        "model": m.model,
        "quality": list(m.quality),
        "levels": [],
        **onnx,
    }


def _level(level: Level) -> Json:
    return {
        "tensor": level.tensor,
        "parent": level.parent,
        "tier": level.tier,
        "codec": level.codec,
        "bytes": level.n_bytes,
        "loss": level.loss,
    }


def _stored(artifact: Artifact) -> list[Json]:
    """Bytes stored per tier reached, and bits per weight of the tensors that have it."""
    levels: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for stack in artifact.manifest.stacks:
        for level in stack.levels:
            row = levels[level.tier]
            row[0], row[1], row[2] = row[0] + 1, row[1] + level.n_bytes, row[2] + stack.n_weights
    return [
        {
            "tier": tier,
            "levels": n,
            "stored_bytes": size,
            "bits_per_weight": round(8 * size / weights, 3),
        }
        for tier, (n, size, weights) in levels.items()
    ]


def _gguf(path: Path) -> Json:
    header = read_header(path)
    return {
        "kind": "gguf",
        "name": header.get("general.name", path.stem),
        "architecture": header.get("general.architecture"),
        "n_parameters": sum(tensor.n_weights for tensor in header.tensors),
        "n_tensors": len(header.tensors),
        "weights_bytes": sum(tensor.n_bytes for tensor in header.tensors),
        "tensors": [
            {"name": t.name, "type": t.type_name, "shape": list(t.shape)} for t in header.tensors
        ],
    }


def _checkpoint(path: Path) -> Json:
    checkpoint = Checkpoint.open(path)
    return {
        "kind": "checkpoint",
        "name": path.resolve().name,
        "architecture": checkpoint.config.get("model_type"),
        "n_tensors": len(checkpoint.tensors),
        "bytes": sum(checkpoint.files.values()),
        "notes": list(checkpoint.notes),
    }
