"""What a conversion made: whether it is what was asked for, and in numbers."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from edgekit.catalog import read_manifest
from edgekit.convert_options import Options
from edgekit.disk import folder_bytes
from edgekit.errors import RefusedError, UsageError
from edgekit.manifest import Manifest
from edgekit.planner import tier_at, uniform
from edgekit.stack import Stack


@dataclass(frozen=True)
class Report:
    """What a conversion made; sizes in bytes, ``tiers`` as resident bytes of the whole model."""

    artifact: str
    source_bytes: int
    base_bytes: int
    levels_bytes: int
    artifact_bytes: int
    tiers: dict[str, dict[str, float]]
    n_tensors: int
    seconds: float


def report_of(output: Path, started: float) -> Report:
    """The report of the artifact in ``output``, with the seconds since ``started``."""
    manifest = read_manifest(output)
    weights = [f["bytes"] for f in manifest.source["files"] if f["name"].endswith(".safetensors")]
    return Report(
        artifact=str(output),
        source_bytes=sum(weights),
        base_bytes=manifest.base.n_bytes,
        levels_bytes=manifest.levels.n_bytes,
        artifact_bytes=folder_bytes(output),
        tiers=tier_bytes(manifest.stacks, manifest.tiers),
        n_tensors=len(manifest.stacks) or len(manifest.onnx.store if manifest.onnx else ()),
        seconds=round(time.monotonic() - started, 3),
    )


def require_made_by(
    output: Path, options: Options, files: dict[str, int] | None, name: str | None = None
) -> None:
    """Check that the finished ``output`` is what is asked for.

    Args:
        output: An artifact.
        options: Asked for now.
        files: Bytes of the checkpoint's weight files; ``None`` compares none.
        name: Of the checkpoint; ``None`` takes any.

    Raises:
        UsageError: It has other tiers or another codec, comes from other weights, or was pruned
            otherwise.
        RefusedError: A file of it is not as long as it was.
    """
    manifest = read_manifest(output)
    tiers = options.tiers if "gguf" in options.formats else ()
    weights = {f["name"]: f["bytes"] for f in manifest.source["files"]}
    same = (manifest.codec, manifest.tiers) == (options.codec, tiers)
    same = same and (manifest.onnx is not None) == ("onnx" in options.formats)
    same = same and name in (None, manifest.source.get("name"))
    same = same and (manifest.statistics.get("kind") == "none") != options.statistics
    if options.prune:
        pruned = manifest.source.get("pruned") or {}
        same = same and pruned.get("ratio_asked") == options.prune
    if same and (files is None or files.items() <= weights.items()):
        _require_whole(output, manifest)
        return
    raise UsageError(
        f"{output} is complete and was made from another checkpoint or with other options; choose "
        "another -o, or replace it with --force"
    )


def _require_whole(output: Path, manifest: Manifest) -> None:
    for record in filter(lambda record: record.name, (manifest.base, manifest.levels)):
        path = output / record.name
        n_bytes = path.stat().st_size if path.is_file() else 0
        if n_bytes != record.n_bytes:
            raise RefusedError(
                f"{path} has {n_bytes} bytes where {record.n_bytes} were written; convert again "
                "with --force in place of --resume"
            )


def tier_bytes(stacks: Sequence[Stack], tiers: Sequence[str]) -> dict[str, dict[str, float]]:
    """Memory of the whole model at each tier."""
    n_weights = sum(stack.n_weights for stack in stacks)
    rows = {}
    for tier in tiers:
        n_bytes = uniform(stacks, partial(tier_at, tier=tier)).weights_bytes
        rows[tier] = {"bytes": n_bytes, "bits_per_weight": round(8 * n_bytes / n_weights, 4)}
    return rows
