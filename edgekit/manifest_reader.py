"""Read ``edgekit.json`` back, as untrusted input.

Every field is checked for type and range, file names must be plain names, parts lie inside their
files, levels form a chain of known types from level 0, load orders never put a level before its
parent, and the manifest's own hash must agree.
"""

import json
import math
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any, TypeVar

from edgekit.codecs import CODECS
from edgekit.errors import RefusedError, UnsupportedError
from edgekit.kernels.ggml import TYPES
from edgekit.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    NO_FILE,
    Json,
    Manifest,
    Order,
    pruning_facts,
    self_hash,
)
from edgekit.onnx_part import OnnxPart, read_part
from edgekit.routing.facts import check_experts
from edgekit.stack import SOURCE, FileRecord, Level, Part, Stack

BASE_CODEC = "ggml"  # level 0 is plain blocks
MAX_LAYERS = 1 << 12
MAX_CHUNK_WEIGHTS = 1 << 26  # a chunk is decoded in one piece
QUALITY_FIELDS = ("weights_bytes", "bits_per_weight", "n_tokens", "kl_mean", "ppl")

T = TypeVar("T")


def loads(text: bytes) -> Manifest:
    """Read and check a manifest.

    Raises:
        RefusedError: It is no manifest, a field is missing or out of range, or its hash differs.
        UnsupportedError: It was written in another format version.
    """
    try:
        body = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
        own_hash = self_hash(body) if isinstance(body, dict) else ""
    except (ValueError, RecursionError) as error:
        raise RefusedError(
            f"{MANIFEST_NAME} is not valid JSON ({error}); get the artifact again"
        ) from error
    if not isinstance(body, dict) or body.get("format") != "edgekit":
        raise RefusedError(
            f"{MANIFEST_NAME} is not a manifest of edgekit: it lacks format: edgekit"
        )
    if _get(body, "format_version", int) != FORMAT_VERSION:
        raise UnsupportedError(
            f"{MANIFEST_NAME} has format version {body.get('format_version')!r}, "
            f"this edgekit reads {FORMAT_VERSION}; install the edgekit that wrote it"
        )
    if body.get("sha256") != own_hash:
        raise RefusedError(f"{MANIFEST_NAME} does not match its own sha256; get the artifact again")
    return _from_json(body)


def _unique(pairs: list[tuple[str, object]]) -> Json:
    keys = dict(pairs)
    if len(keys) != len(pairs):
        raise ValueError("a key stands twice")
    return keys


def _no_constant(text: str) -> Any:
    raise ValueError(f"the number {text}")


def _from_json(body: Json) -> Manifest:
    order, onnx = _get(body, "load_order", dict), _onnx(body)
    is_bare = onnx is not None and body.get("base") is None  # nothing for llama.cpp
    base = {} if is_bare else _get(body, "base", dict)
    rows = [_level(row) for row in _rows(body, "levels")]
    manifest = Manifest(
        name=_plain_name(_get(body, "name", str)),
        architecture=_get(body, "architecture", str),
        codec=_get(body, "codec", str),
        tiers=tuple(_strings(_get(body, "tiers", list), "tiers")),
        chunk_weights=_count(body, "chunk_weights", least=1, most=MAX_CHUNK_WEIGHTS),
        base=NO_FILE if is_bare else _file(base),
        header_bytes=0
        if is_bare
        else _count(base, "header_bytes", least=1, most=_count(base, "bytes")),
        header_sha256="" if is_bare else _hash(_get(base, "header_sha256", str)),
        levels=NO_FILE if is_bare else _file(_get(body, "levels_file", dict)),
        stacks=tuple(_stacks(_rows(body, "tensors"), rows)),
        stored_order=_order(order, "stored", rows),
        resident_order=_order(order, "resident", rows),
        model=_get(body, "model", dict),
        source=_source(_get(body, "source", dict)),
        tool=_get(body, "tool", dict),
        statistics=_get(body, "statistics", dict),
        quality=tuple(_quality(row) for row in _rows(body, "quality")),
        experts=check_experts(_get(body, "experts", dict)),
        memory=_memory(_get({"memory": {}} | body, "memory", dict)),
        onnx=onnx,
    )
    _check(manifest)
    return manifest


def _source(source: Json) -> Json:
    if "pruned" in source and pruning_facts(source["pruned"]) != source["pruned"]:
        raise RefusedError(
            f"{MANIFEST_NAME}: field 'pruned' does not tell what was pruned; get the artifact again"
        )
    return source


def _onnx(body: Json) -> OnnxPart | None:
    if "onnx" not in body:
        return None
    part = _get(body, "onnx", dict)
    files = tuple(_file(row) for row in _rows(part, "files"))
    if len({record.name for record in files}) != len(files):
        raise RefusedError(f"{MANIFEST_NAME}: a file of the ONNX part stands twice")
    return read_part(part, files)


def _get(obj: Mapping[str, Any], key: str, kind: type[T]) -> T:
    value = obj.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise RefusedError(
            f"{MANIFEST_NAME}: field '{key}' has {type(value).__name__}, needs {kind.__name__}; "
            "get the artifact again"
        )
    return value


def _count(obj: Mapping[str, Any], key: str, least: int = 0, most: int = 1 << 62) -> int:
    value = _get(obj, key, int)
    if not least <= value <= most:
        raise RefusedError(f"{MANIFEST_NAME}: field '{key}' is {value}, out of range")
    return value


def _rows(obj: Mapping[str, Any], key: str) -> list[Json]:
    rows = _get(obj, key, list)
    if not all(isinstance(row, dict) for row in rows):
        raise RefusedError(f"{MANIFEST_NAME}: '{key}' needs a list of objects")
    return rows


def _strings(values: list[object], key: str) -> list[str]:
    if not all(isinstance(value, str) for value in values):
        raise RefusedError(f"{MANIFEST_NAME}: '{key}' needs a list of names")
    return [str(value) for value in values]


def _plain_name(name: str) -> str:
    """A name that stays in its folder: no separators, no drive, no parent, nothing hidden."""
    plain = name.isprintable() and not set(name) & set("\\/:") and len(name.encode()) <= 255
    if not plain or not name or name.startswith("."):
        raise RefusedError(f"{MANIFEST_NAME}: {name[:80]!a} is not a plain file name; refused")
    return name


def _hash(text: str) -> str:
    if len(text) != 64 or set(text) - set("0123456789abcdef"):
        raise RefusedError(f"{MANIFEST_NAME}: '{text[:70]}' is no sha256")
    return text


def _file(obj: Json) -> FileRecord:
    return FileRecord(
        _plain_name(_get(obj, "file", str)), _count(obj, "bytes"), _hash(_get(obj, "sha256", str))
    )


def _level(row: Json) -> Level:
    parent = row.get("parent")
    if parent is not None and not isinstance(parent, str):
        raise RefusedError(f"{MANIFEST_NAME}: a level's parent is {parent!r}, needs a tier or null")
    return Level(
        tensor=_get(row, "tensor", str),
        tier=_get(row, "tier", str),
        parent=parent,
        codec=_get(row, "codec", str),
        parts=_parts(row),
        loss=_number(row, "loss"),
        type=_get({"type": ""} | row, "type", str),
    )


def _number(row: Json, key: str) -> float:
    value = row.get(key)
    if not isinstance(value, (int, float)) or not 0 <= value < 1e300:
        raise RefusedError(
            f"{MANIFEST_NAME}: field '{key}' is {str(value)[:40]}, needs a number >= 0"
        )
    return float(value)


def _quality(row: Json) -> Json:
    """A measured row; what planning and printing read of it are numbers."""
    _count(row, "weights_bytes")
    for key in row:
        _number(row, key)
    for key in QUALITY_FIELDS:
        _number(row, key)
    return row


def _memory(memory: Json) -> Json:
    """What was measured of memory; rows are lines through at least two points."""
    if not memory:
        return memory
    windowed = _get({"windowed": []} | memory, "windowed", list)
    if len(windowed) > MAX_LAYERS or not all(isinstance(item, bool) for item in windowed):
        raise RefusedError(f"{MANIFEST_NAME}: field 'windowed' is no list of layers")
    for row in _rows(memory, "compute"):
        _get(row, "kv_type", str)
        _count(row, "batch", least=1)
        contexts, sizes = (_get(row, key, list) for key in ("contexts", "bytes"))
        counts = [*contexts, *sizes]
        if not all(type(n) is int and 0 < n < 1 << 62 for n in counts):
            raise RefusedError(f"{MANIFEST_NAME}: measured memory is no list of sizes")
        if len(contexts) != len(sizes) or len(contexts) < 2 or sorted(set(contexts)) != contexts:
            raise RefusedError(f"{MANIFEST_NAME}: measured memory has no increasing contexts")
    return memory


def _parts(row: Json) -> tuple[Part, ...]:
    offset, n_bytes = _count(row, "offset"), _count(row, "bytes", least=1)
    if "experts" not in row:
        return (Part(offset, n_bytes, _hash(_get(row, "sha256", str))),)
    parts = tuple(_expert_part(item) for item in _get(row, "experts", list))
    ordered = all(a.end <= b.offset for a, b in pairwise(parts))
    if not ordered or not parts or parts[0].offset != offset or parts[-1].end != offset + n_bytes:
        raise RefusedError(f"{MANIFEST_NAME}: the experts of {row['tensor']} do not fill its level")
    return parts


def _expert_part(item: object) -> Part:
    match item:
        case [int(offset), int(n_bytes), str(sha256)] if offset >= 0 and n_bytes > 0:
            return Part(offset, n_bytes, _hash(sha256))
    raise RefusedError(f"{MANIFEST_NAME}: an expert is {item!r}, needs [offset, bytes, sha256]")


def _stacks(tensors: list[Json], levels: list[Level]) -> Iterator[Stack]:
    by_tensor: dict[str, list[Level]] = {}
    for level in levels:
        by_tensor.setdefault(level.tensor, []).append(level)
    for row in tensors:
        name, shape = _get(row, "name", str), tuple(_get(row, "shape", list))
        if not 1 <= len(shape) <= 3 or not all(type(n) is int and 0 < n < 1 << 40 for n in shape):
            raise RefusedError(f"{MANIFEST_NAME}: tensor {name} has shape {list(shape)}")
        yield Stack(
            name, shape, _get(row, "source_type", str), _chain(name, by_tensor.pop(name, []))
        )
    if by_tensor:
        raise RefusedError(
            f"{MANIFEST_NAME}: levels of unknown tensors: {', '.join(by_tensor)}"[:300]
        )


def _chain(name: str, levels: list[Level]) -> tuple[Level, ...]:
    """The levels of one tensor, each after its parent."""
    by_parent = {level.parent: level for level in levels}
    chain: list[Level] = []
    if len({level.tier for level in levels}) != len(levels):
        raise RefusedError(f"{MANIFEST_NAME}: {name} has a tier twice")
    while (following := by_parent.get(chain[-1].tier if chain else None)) is not None:
        if len(chain) >= len(levels):
            break
        chain.append(following)
    if not chain or len(chain) != len(levels):
        raise RefusedError(f"{MANIFEST_NAME}: the levels of {name} form no chain from level 0")
    return tuple(chain)


def _order(order: Json, key: str, levels: list[Level]) -> Order:
    indices = _get(order, key, list)
    above = [i for i, level in enumerate(levels) if level.parent is not None]
    if not all(type(i) is int for i in indices) or sorted(indices) != above:
        raise RefusedError(f"{MANIFEST_NAME}: load order '{key}' does not name every level once")
    return tuple((levels[i].tensor, levels[i].tier) for i in indices)


def _check(m: Manifest) -> None:
    """Facts that tie fields together: parts inside their files, orders that respect parents."""
    if (not m.stacks and m.onnx is None) or bool(m.stacks) != bool(m.base.name):
        raise RefusedError(f"{MANIFEST_NAME}: the artifact has no tensors")
    if m.codec not in CODECS:
        raise UnsupportedError(
            f"{MANIFEST_NAME}: codec {m.codec[:40]!a} is unknown; known: {', '.join(CODECS)}"
        )
    is_tier = CODECS[m.codec].is_tier
    is_chain = len(set(m.tiers)) == len(m.tiers) and all(map(is_tier, m.tiers))
    if not is_chain or bool(m.tiers) != m.has_gguf:
        raise RefusedError(f"{MANIFEST_NAME}: tiers {', '.join(m.tiers)[:200]!a} are no chain")
    for stack in m.stacks:
        if stack.tiers[-1] != SOURCE and SOURCE in stack.tiers:
            raise RefusedError(f"{MANIFEST_NAME}: {stack.name} has levels above {SOURCE}")
        for level in stack.levels:
            _check_level(m, stack, level)
            _check_type(m, stack, level)
        _check_base_parts(stack)
    for order in (m.stored_order, m.resident_order):
        _check_parents_first(m, order)


def _check_level(m: Manifest, stack: Stack, level: Level) -> None:
    record = m.base if level.parent is None else m.levels
    if level.end > record.n_bytes:
        raise RefusedError(
            f"{MANIFEST_NAME}: level {level.tier} of {level.tensor} ends after {record.name}"
        )
    if len(level.parts) != stack.n_experts:
        raise RefusedError(
            f"{MANIFEST_NAME}: level {level.tier} of {level.tensor} has {len(level.parts)} parts "
            f"for {stack.n_experts} experts"
        )


def _check_type(m: Manifest, stack: Stack, level: Level) -> None:
    """A type that ggml has, that holds rows of this length, and that the codec can lead to."""
    name = stack.type_at(level.tier)
    if name not in TYPES or stack.cols % TYPES[name].block:
        raise RefusedError(
            f"{MANIFEST_NAME}: {stack.name[:80]!a}, {stack.cols} columns, cannot be {name[:40]!a}"
        )
    is_base = level.parent is None
    is_given = not is_base and level.codec == m.codec and CODECS[m.codec].gives(stack, level)
    if not (level.codec == BASE_CODEC and not level.type if is_base else is_given):
        raise RefusedError(
            f"{MANIFEST_NAME}: codec {level.codec[:40]!a} gives no level {level.tier} of "
            f"{stack.name[:80]!a}"
        )


def _check_base_parts(stack: Stack) -> None:
    """Level 0 is the tensor's blocks in the base, expert after expert, nothing between."""
    kind, parts = TYPES[stack.type_at(stack.tiers[0])], stack.levels[0].parts
    n_bytes = math.prod(stack.shape) // len(parts) // kind.block * kind.block_bytes
    if any(part.n_bytes != n_bytes for part in parts) or any(
        before.end != part.offset for before, part in pairwise(parts)
    ):
        raise RefusedError(
            f"{MANIFEST_NAME}: level 0 of {stack.name} is not the {n_bytes} bytes of its blocks"
        )


def _check_parents_first(m: Manifest, order: Order) -> None:
    reached = {(stack.name, stack.levels[0].tier) for stack in m.stacks}
    for tensor, tier in order:
        if (tensor, m.level(tensor, tier).parent) not in reached:
            raise RefusedError(f"{MANIFEST_NAME}: level {tier} of {tensor} comes before its parent")
        reached.add((tensor, tier))
