"""What a conversion made, in numbers."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from edgekit.catalog import read_manifest
from edgekit.disk import folder_bytes
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


def tier_bytes(stacks: Sequence[Stack], tiers: Sequence[str]) -> dict[str, dict[str, float]]:
    """Memory of the whole model at each tier."""
    n_weights = sum(stack.n_weights for stack in stacks)
    rows = {}
    for tier in tiers:
        n_bytes = uniform(stacks, partial(tier_at, tier=tier)).weights_bytes
        rows[tier] = {"bytes": n_bytes, "bits_per_weight": round(8 * n_bytes / n_weights, 4)}
    return rows
