"""``edgekit.json``: everything about an artifact but the weights, format 1.

Numbers a planner needs are here, so planning reads no weights. ``manifest_reader`` reads it back.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from edgekit.onnx_part import OnnxPart
from edgekit.stack import FileRecord, Level, Stack

MANIFEST_NAME = "edgekit.json"
FORMAT_VERSION = 1
ALIGNMENT = 64  # bytes; every level starts at a multiple of it
Json = dict[str, Any]
Order = tuple[tuple[str, str], ...]  # (tensor, tier) of every level above 0, in load order


NO_FILE = FileRecord("", 0, "")  # base and levels of an artifact without GGUF

# of a pruning before: the limits of numbers, None for text
_PRUNED = {"ratio_asked": (0.0, 1.0), "ratio": (0.0, 1.0), "metric": None, "kl_mean": (0.0, 1e9)}


def pruning_facts(body: object) -> Json | None:
    """What ``source.pruned`` tells, taken from ``body``, or None where that lacks any of it."""
    facts = {key: body.get(key) for key in _PRUNED} if isinstance(body, dict) else {}
    for key, limits in _PRUNED.items():
        value = facts.get(key)
        if limits is None:
            is_sound = isinstance(value, str)
        else:
            is_sound = (
                isinstance(value, int | float)
                and not isinstance(value, bool)
                and limits[0] <= value <= limits[1]
            )
        if not is_sound:
            return None
    return facts


@dataclass(frozen=True)
class Manifest:
    """What ``edgekit.json`` says.

    Attributes:
        name: Base name of the artifact's files.
        architecture: llama.cpp's name of the architecture.
        tiers: Tiers asked for at conversion, lowest first; narrow tensors take their fallback
            types.
        chunk_weights: Upper bound of weights in one independently coded chunk.
        base: The stock GGUF; ``header_bytes`` of it come before the tensor data.
        levels: The file with all levels above 0.
        stored_order: Load order by stored bytes: the order of ``.levels``.
        resident_order: Load order by bytes in memory, which plans follow.
        model: Facts a planner needs: layers, KV heads, head sizes, context, vocabulary.
        source: Name, licence and files (name, bytes, sha256) of the checkpoint; what was pruned
            from it before.
        tool: Versions, command and options of the conversion.
        statistics: Where the importance of columns came from, and the unit of ``loss``.
        quality: Measured rows ``{weights_bytes, bits_per_weight, kl_mean, ...}``, fewest bytes
            first.
        experts: Routing metadata of mixture-of-experts models, else empty.
        memory: ``windowed``: which layers keep a window only; ``compute``: what llama.cpp reserves,
            rows ``{kv_type, batch, contexts, bytes}``; empty when it was not asked.
        onnx: What is there for ONNX Runtime; None without.
    """

    name: str
    architecture: str
    codec: str
    tiers: tuple[str, ...]
    chunk_weights: int
    base: FileRecord
    header_bytes: int
    header_sha256: str
    levels: FileRecord
    stacks: tuple[Stack, ...]
    stored_order: Order
    resident_order: Order
    model: Json = field(default_factory=dict)
    source: Json = field(default_factory=dict)
    tool: Json = field(default_factory=dict)
    statistics: Json = field(default_factory=dict)
    quality: tuple[Json, ...] = ()
    experts: Json = field(default_factory=dict)
    memory: Json = field(default_factory=dict)
    onnx: OnnxPart | None = None

    @property
    def n_parameters(self) -> int:
        """Number of weights of all tensors."""
        if not self.stacks and self.onnx is not None:
            return self.onnx.n_weights
        return sum(stack.n_weights for stack in self.stacks)

    @property
    def has_gguf(self) -> bool:
        """Whether there is something for llama.cpp."""
        return bool(self.stacks)

    def level(self, tensor: str, tier: str) -> Level:
        """The level that lifts ``tensor`` to ``tier``."""
        return self._levels_by_key[tensor, tier]

    @cached_property
    def _levels_by_key(self) -> dict[tuple[str, str], Level]:
        return {
            (level.tensor, level.tier): level for stack in self.stacks for level in stack.levels
        }


def dumps(manifest: Manifest) -> str:
    """The manifest as text, ending with its own hash; equal manifests give equal text."""
    body = _to_json(manifest)
    body["sha256"] = self_hash(body)
    return "{\n" + ",\n".join(f'"{key}": {_pretty(value)}' for key, value in body.items()) + "\n}\n"


def _pretty(value: object) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n" + ",\n".join(_compact(item) for item in value) + "\n]"
    return _compact(value)


def _compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def self_hash(body: Json) -> str:
    """sha256 of a manifest's JSON body without its own ``sha256`` field."""
    rest = {key: value for key, value in body.items() if key != "sha256"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _to_json(m: Manifest) -> Json:
    levels = [m.level(*key) for key in _level_keys(m)]
    index = {(lv.tensor, lv.tier): i for i, lv in enumerate(levels)}
    onnx = {} if m.onnx is None else {"onnx": m.onnx.to_json()}
    return {
        "format": "edgekit",
        "format_version": FORMAT_VERSION,
        "name": m.name,
        "architecture": m.architecture,
        "n_parameters": m.n_parameters,
        "codec": m.codec,
        "tiers": list(m.tiers),
        "chunk_weights": m.chunk_weights,
        "model": m.model,
        "source": m.source,
        "tool": m.tool,
        "statistics": m.statistics,
        "quality": list(m.quality),
        "experts": m.experts,
        "memory": m.memory,
        "base": _file_json(m.base)
        | {"header_bytes": m.header_bytes, "header_sha256": m.header_sha256}
        if m.has_gguf
        else None,
        "levels_file": _file_json(m.levels) if m.has_gguf else None,
        "tensors": [
            {"name": s.name, "shape": list(s.shape), "source_type": s.source_type} for s in m.stacks
        ],
        "levels": [_level_json(level) for level in levels],
        "load_order": {
            "stored": [index[key] for key in m.stored_order],
            "resident": [index[key] for key in m.resident_order],
        },
        **onnx,
    }


def _level_keys(m: Manifest) -> Iterator[tuple[str, str]]:
    """Level 0 of every tensor in the base's order, then the others as they are stored."""
    for stack in m.stacks:
        yield stack.name, stack.levels[0].tier
    yield from m.stored_order


def _file_json(record: FileRecord) -> Json:
    return {"file": record.name, "bytes": record.n_bytes, "sha256": record.sha256}


def _level_json(level: Level) -> Json:
    row: Json = {
        "tensor": level.tensor,
        "parent": level.parent,
        "tier": level.tier,
        "codec": level.codec,
        "loss": level.loss,
        "offset": level.parts[0].offset,
        "bytes": level.end - level.parts[0].offset,
    }
    if level.type:
        row["type"] = level.type
    if len(level.parts) == 1:
        return row | {"sha256": level.parts[0].sha256}
    return row | {"experts": [[p.offset, p.n_bytes, p.sha256] for p in level.parts]}
