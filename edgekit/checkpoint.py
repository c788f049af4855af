"""A Hugging Face folder read as data: config.json and memory-mapped safetensors, no code run.

The folder is untrusted. Every header passes the strict checks of `edgekit.safetensors_header`
before a byte of weights is used; pickled weights are refused unopened; keys that would choose code
are dropped from the config and reported in `Checkpoint.notes`.
"""

import json
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.errors import RefusedError, UnsupportedError, UsageError
from edgekit.safetensors_header import DTYPES, TensorRef, no_duplicates, read_header

__all__ = ["Checkpoint", "TensorRef"]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_JSON_BYTES = 1 << 26  # config.json is a few kB; the index of a 1000-shard model about 10 MB
PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".npz"}
READ = {".json", ".jinja", ".model", ".txt", ".safetensors"}
TEMPLATE_FOLDER = "additional_chat_templates"  # where transformers puts named chat templates
CODE_KEYS = {"auto_map", "trust_remote_code", "custom_pipelines"}
NUMPY: dict[str, np.dtype[Any]] = {
    "BF16": np.dtype("<u2"),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
}


@dataclass(frozen=True)
class Checkpoint:
    """A validated checkpoint.

    Attributes:
        folder: The folder as it was given.
        config: config.json without the keys that would run code.
        tensors: Name -> place in a file. Keeps every dtype; `read` gives the float ones.
        files: Path of each weight file -> bytes, resolved and inside the folder's allowed places.
        notes: What was ignored, one line each.
    """

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorRef]
    files: Mapping[Path, int]
    notes: tuple[str, ...] = field(default=())

    @classmethod
    def open(cls, folder: str | Path) -> "Checkpoint":
        """Check ``folder`` and every header in it; reads no weights.

        Raises:
            UsageError: ``folder`` is no folder.
            RefusedError: Something in it is missing, corrupt or unsafe.
            UnsupportedError: The weights are already quantized.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise UsageError(f"{folder} is not a folder; give a Hugging Face checkpoint folder")
        _check_links(folder)
        config, notes = _without_code(read_json(folder, "config.json"))
        shards, more = _shards(folder)
        files, tensors = _read_shards(folder, shards)
        _refuse_quantized(folder, config, tensors)
        return cls(folder, config, tensors, files, (*notes, *_ignored_files(folder), *more))

    def read(self, name: str, rows: slice | None = None) -> npt.NDArray[Any]:
        """A tensor, or some rows of it, as a read-only array over the mapped file.

        The mapping lives as long as the array, so dropping the array drops its resident pages.

        Args:
            name: A tensor of `tensors` with dtype BF16, F16 or F32.
            rows: Rows of the tensor seen as a matrix, ``[product of the other dimensions, last
                dimension]``; a 1-D tensor is one row. None: the whole tensor in its own shape.

        Returns:
            uint16 (the bits) for BF16, float16 or float32 otherwise.

        Raises:
            UnsupportedError: Another dtype.
            RefusedError: The file is shorter than when it was opened.
        """
        ref = self.tensors[name]
        if ref.dtype not in NUMPY:
            raise UnsupportedError(
                f"tensor '{name}' is {ref.dtype}; edgekit reads BF16, F16 and F32"
            )
        if rows is None:
            return _map(ref, ref.start, ref.stop, ref.shape)
        start, stop, step = rows.indices(ref.n_rows)
        if step != 1:
            raise ValueError(f"rows must be contiguous, got a step of {step}")
        width = ref.cols * DTYPES[ref.dtype]
        n = max(stop - start, 0)
        return _map(ref, ref.start + start * width, ref.start + (start + n) * width, (n, ref.cols))


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object from ``folder``: at most 64 MiB, duplicate keys and NaN refused.

    Raises:
        RefusedError: The file is missing, too large, or not such an object.
    """
    path = contained(folder, name)
    if path is None:
        raise RefusedError(
            f"{folder} has no {name}; give a complete Hugging Face checkpoint folder"
        )
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise RefusedError(f"{folder}/{name} is {size} bytes; at most {MAX_JSON_BYTES} are read")
    try:
        data = json.loads(
            path.read_bytes(), object_pairs_hook=no_duplicates, parse_constant=_no_constant
        )
        _check_depth(data)
    except (ValueError, RecursionError) as error:
        raise RefusedError(f"{folder}/{name} is not sound JSON: {error}") from error
    if not isinstance(data, dict):
        raise RefusedError(f"{folder}/{name} holds a {type(data).__name__}; it must be an object")
    return data


def contained(folder: Path, name: str) -> Path | None:
    """The real path of ``folder / name``, or None where there is no such file.

    Symlinks may lead to anywhere inside the folder, or to ``blobs/`` of the same repository in the
    layout of the Hugging Face cache (``snapshots/<revision>/name -> ../../blobs/<hash>``).

    Raises:
        RefusedError: ``name`` is no plain file name, or leads elsewhere or to no regular file.
    """
    if not _is_plain(name):
        raise RefusedError(f"{folder} names the file {name!r}; only plain file names are followed")
    try:
        path = (folder / name).resolve(strict=True)
    except FileNotFoundError:
        return None
    except (OSError, RuntimeError, ValueError) as error:
        raise RefusedError(f"{folder}/{name} cannot be followed: {error}") from error
    root = folder.resolve()
    snapshots = [parent for parent in root.parents if parent.name == "snapshots"]
    allowed = [root, *(parent.parent / "blobs" for parent in snapshots[:1])]
    if not any(path.is_relative_to(place) for place in allowed):
        raise RefusedError(
            f"{folder}/{name} leads out of the checkpoint to {path}; copy the file into the folder"
        )
    if not path.is_file():
        raise RefusedError(f"{folder}/{name} is not a regular file")
    return path


def _check_links(folder: Path) -> None:
    """Refuse links out of the folder under names that any stage may read and copy from."""
    templates = folder / TEMPLATE_FOLDER
    if not templates.resolve().is_relative_to(folder.resolve()):
        raise RefusedError(f"{templates} leads out of the checkpoint; copy the files into it")
    for place in (folder, templates):
        for path in sorted(place.iterdir()) if place.is_dir() else ():
            if path.suffix in READ:
                contained(place, path.name)


def _is_plain(name: object) -> bool:
    """Whether ``name`` is one path component, on POSIX and on Windows."""
    if not isinstance(name, str) or not name or len(name.encode("utf-8", "replace")) > 255:
        return False
    return name not in (".", "..") and name.isprintable() and not set(name) & set('/\\:\0*?"<>|')


def _check_depth(data: object, left: int = 64) -> None:
    """Bound the nesting, so that later walks over ``data`` cannot exhaust the stack."""
    if left == 0:
        raise ValueError("it is nested too deeply")
    for item in data.values() if isinstance(data, dict) else data if isinstance(data, list) else ():
        _check_depth(item, left - 1)


def _no_constant(text: str) -> Any:
    raise ValueError(f"the number {text}")


def _without_code(config: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """``config`` without keys that choose code to run, and a note for each."""
    notes: list[str] = []

    def clean(data: Any) -> Any:
        if isinstance(data, list):
            return [clean(item) for item in data]
        if not isinstance(data, dict):
            return data
        bad = {k for k in data if k in CODE_KEYS or k.startswith("_attn_implementation")}
        notes.extend(
            f"config.json: '{key}' ignored; edgekit runs no code of a model" for key in bad
        )
        return {key: clean(value) for key, value in data.items() if key not in bad}

    return clean(config), tuple(sorted(notes))


def _refuse_quantized(folder: Path, config: dict[str, Any], tensors: dict[str, TensorRef]) -> None:
    """Weights quantized by GPTQ, AWQ, FP8 and the like would lose a second time."""
    packed = [name for name in tensors if name.endswith((".qweight", ".qzeros", ".weight_packed"))]
    for key in ("quantization_config", "compression_config"):
        if config.get(key):
            packed.append(f"{key} in config.json")
    if packed:
        raise UnsupportedError(
            f"{folder} is already quantized ({packed[-1]}); edgekit converts from original BF16, "
            "F16 or F32 weights: use the unquantized checkpoint"
        )


def _ignored_files(folder: Path) -> list[str]:
    names = sorted(os.listdir(folder))
    code = [f"{n} ignored; edgekit runs no code of a model" for n in names if n.endswith(".py")]
    pickles = [f"{n} ignored; pickles are never opened" for n in names if Path(n).suffix in PICKLES]
    return code + pickles


def _shards(folder: Path) -> tuple[dict[str, frozenset[str] | None], tuple[str, ...]]:
    """Weight file -> the tensors that the index expects in it (None: no index)."""
    has_index = contained(folder, INDEX) is not None
    if contained(folder, SINGLE) is not None:  # transformers prefers it as well
        note = (f"{INDEX} ignored; {SINGLE} holds the weights",) if has_index else ()
        return {SINGLE: None}, note
    if not has_index:
        raise RefusedError(_no_weights(folder))
    weight_map = read_json(folder, INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise RefusedError(f"{folder}/{INDEX} has no weight_map; download it again")
    shards: dict[str, set[str]] = {}
    for tensor, shard in weight_map.items():
        if not _is_plain(shard) or not shard.endswith(".safetensors"):
            raise RefusedError(
                f"{folder}/{INDEX} puts {tensor!r} into {shard!r}; "
                "a shard must be a plain name that ends with .safetensors"
            )
        shards.setdefault(shard, set()).add(tensor)
    return {shard: frozenset(tensors) for shard, tensors in sorted(shards.items())}, ()


def _no_weights(folder: Path) -> str:
    names = sorted(os.listdir(folder))
    pickles = [n for n in names if Path(n).suffix in PICKLES]
    loose = [n for n in names if n.endswith(".safetensors")]
    if loose:
        return f"{folder} has {loose[0]} but neither {SINGLE} nor {INDEX}; download it completely"
    if pickles:
        return (
            f"{folder} has only pickled weights ({pickles[0]}), which can run code when opened; "
            "take the repository's safetensors, or load and save_pretrained it in a sandbox"
        )
    return f"{folder} has neither {SINGLE} nor {INDEX}; give a checkpoint in safetensors"


def _read_shards(
    folder: Path, shards: dict[str, frozenset[str] | None]
) -> tuple[dict[Path, int], dict[str, TensorRef]]:
    files: dict[Path, int] = {}
    tensors: dict[str, TensorRef] = {}
    for shard, expected in shards.items():
        path = contained(folder, shard)
        if path is None:
            raise RefusedError(f"{folder} lacks the shard {shard} of its index; download it again")
        found = read_header(path)
        if expected is not None:  # so no tensor can be in two shards either
            _compare(folder, shard, expected, frozenset(found))
        files[path] = path.stat().st_size
        tensors |= found
    return files, tensors


def _compare(folder: Path, shard: str, expected: frozenset[str], found: frozenset[str]) -> None:
    for wrong, text in (
        (expected - found, "is named by the index but not in"),
        (found - expected, "is not named by the index but in"),
    ):
        if wrong:
            raise RefusedError(f"{folder}: tensor {min(wrong)!r} {text} {shard}; download it again")


def _map(ref: TensorRef, start: int, stop: int, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """Bytes ``[start, stop)`` of the file as a read-only array of ``shape``."""
    dtype = NUMPY[ref.dtype]
    if start == stop:
        return np.zeros(shape, dtype)
    page = start - start % mmap.ALLOCATIONGRANULARITY
    try:
        with ref.file.open("rb") as file:
            view = mmap.mmap(file.fileno(), stop - page, access=mmap.ACCESS_READ, offset=page)
    except (OSError, ValueError) as error:
        raise RefusedError(f"{ref.file} changed since it was opened: {error}") from error
    n = (stop - start) // dtype.itemsize
    return np.frombuffer(view, dtype, n, start - page).reshape(shape)
