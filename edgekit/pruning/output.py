"""Write a pruned checkpoint as any other: shards with an index, config, tokenizer, model card.

Each layer that stays is a shard of its own, so a layer is done exactly when its shard is there.
"""

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]  # gguf needs it, so it is there

from edgekit.arch import Mapping
from edgekit.checkpoint import INDEX, SINGLE, TEMPLATE_FOLDER, Checkpoint, contained
from edgekit.errors import RefusedError
from edgekit.provenance import PRUNING
from edgekit.pruning.weights import Layer, stored_tensors
from edgekit.safetensors_header import read_header
from edgekit.spool import write_atomically

Json = dict[str, Any]

COPIED = (".json", ".model", ".jinja", ".txt")  # tokenizer files and what else goes along
REPLACED = {"config.json", INDEX, SINGLE, PRUNING}
ROWS = 1 << 12  # of the embedding at a time, some MiB
MAX_CARD_BYTES = 1 << 22


@dataclass(frozen=True)
class Entry:
    """A tensor to write; ``chunks`` are its bytes in order."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: Iterable[Any]
    n_bytes: int


def shard_name(number: int, n_shards: int) -> str:
    """The name that Hugging Face gives shard ``number``, counted from 1."""
    return f"model-{number:05d}-of-{n_shards:05d}.safetensors"


def write_shard(path: Path, entries: list[Entry]) -> None:
    """Write a safetensors file so that it is there whole or not at all."""
    at = 0
    header: Json = {"__metadata__": {"format": "pt"}}
    for entry in entries:
        span = [at, at + entry.n_bytes]
        header[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": span}
        at = span[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            for chunk in entry.chunks:
                file.write(memoryview(chunk).cast("B"))
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def layer_entries(layer: Layer, mapping: Mapping, source: int, target: int) -> list[Entry]:
    """A layer under its new number."""
    return [
        Entry(name, dtype, values.shape, (values,), values.nbytes)
        for name, dtype, values in stored_tensors(layer, mapping, source, target)
    ]


def outer_entries(mapping: Mapping) -> list[Entry]:
    """What is in no layer, bit for bit: embedding, last norm, head."""
    checkpoint = mapping.tensors[0].checkpoint
    in_layers = {p.tensor for t in mapping.tensors if t.name.startswith("blk.") for p in t.pieces}
    names = [n for n in checkpoint.tensors if n not in in_layers and n not in mapping.unused]
    return [_copied(checkpoint, name) for name in names]


def _copied(checkpoint: Checkpoint, name: str) -> Entry:
    ref = checkpoint.tensors[name]
    cuts = range(0, ref.n_rows, ROWS)
    chunks = (checkpoint.read(name, slice(at, at + ROWS)) for at in cuts)
    return Entry(name, ref.dtype, ref.shape, chunks, ref.stop - ref.start)


def write_rest(
    folder: Path, checkpoint: Checkpoint, config: Json, provenance: Json, shards: list[str]
) -> None:
    """Write index, config, tokenizer, provenance and model card beside the shards."""
    _copy_files(checkpoint.folder, folder)
    if (checkpoint.folder / TEMPLATE_FOLDER).is_dir():
        _copy_files(checkpoint.folder / TEMPLATE_FOLDER, folder / TEMPLATE_FOLDER)
    where = {name: s for s in shards for name in read_header(folder / s)}
    size = sum(r.stop - r.start for s in shards for r in read_header(folder / s).values())
    index = {"metadata": {"total_size": size}, "weight_map": where}
    card = _model_card(checkpoint, provenance)
    write_atomically(folder / INDEX, json.dumps(index, indent=1).encode())
    write_atomically(folder / PRUNING, json.dumps(provenance, indent=1).encode())
    write_atomically(folder / "README.md", card.encode())
    write_atomically(folder / "config.json", json.dumps(config, indent=2).encode())


def _copy_files(source: Path, target: Path) -> None:
    """Copy what goes along, links followed only inside the checkpoint."""
    target.mkdir(exist_ok=True)
    for entry in sorted(source.iterdir()):
        if entry.suffix in COPIED and entry.name not in REPLACED:
            path = contained(source, entry.name)
            if path is not None:
                shutil.copyfile(path, target / entry.name)


def _model_card(checkpoint: Checkpoint, provenance: Json) -> str:
    """The source's front matter with what changed, then how the model came to be."""
    front = _front_matter(checkpoint.folder)
    front["tags"] = sorted({*_strings(front.get("tags")), "edgekit", "pruned"})
    name, p = provenance["source"]["name"], provenance
    kept = [f"- {key}: {value}" for key, value in p["kept"].items()]
    return "\n".join(
        [
            "---", yaml.safe_dump(front, sort_keys=False).rstrip(), "---", "",
            f"# {name}, pruned", "",
            f"`{name}` without {p['ratio']:.1%} of its parameters ({p['n_parameters']:,} of",
            f"{p['source_parameters']:,} are left), by `edgekit prune`, version {p['edgekit']};",
            "no fine-tuning. What was done, and the measured loss: `pruning.json`.", "",
            f"On text not calibrated on: KL divergence to the source {p['kl_mean']:.4g} nats,",
            f"perplexity {p['ppl']:.4g}, the source's {p['ref_ppl']:.4g}.", "",
            "What is left:", "", *kept, "",
        ]
    )  # fmt: skip


def _front_matter(folder: Path) -> Json:
    """Front matter of the source's card; empty where there is none that can be read."""
    try:
        path = contained(folder, "README.md")
        if path is None or path.stat().st_size > MAX_CARD_BYTES:
            return {}
        text = path.read_text(encoding="utf-8")
        data = yaml.safe_load(text.split("---\n")[1]) if text.startswith("---\n") else {}
    except (RefusedError, OSError, ValueError, IndexError, RecursionError, yaml.YAMLError):
        return {}
    return data if isinstance(data, dict) else {}


def _strings(value: object) -> list[str]:
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []
