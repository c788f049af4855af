"""What a kind of device can do: one TOML file per device, each number with its source beside it.

A file has ``name``, ``system`` and ``processor``, and a table for every number of `Device`::

    [memory_bytes_per_s]
    value = 17.1e9
    kind = "computed"
    source = "LPDDR4X-4267 on 32 bits: https://..."

``kind`` is one of `KINDS`. A number may differ by ggml type: ``by_type = { Q4_K = 1.2e10 }``.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from edgekit.errors import RefusedError, UnknownNameError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = Path(__file__).resolve().parent / "profiles"
MAX_FILE_BYTES = 1 << 20
# From what was run to what was guessed
KINDS = ("measured", "published", "computed", "estimated")
TEXTS = ("name", "system", "processor")
LARGEST = 1e18  # of any number here


@dataclass(frozen=True)
class Figure:
    """A number about a device.

    Attributes:
        value: In the unit that the field's name says.
        kind: ``measured`` on such a device, ``published`` by its maker, ``computed`` from published
            numbers, or ``estimated``.
        source: Where it is from, and why it holds.
        by_type: Values for single ggml types; ``value`` stands for all others.
    """

    value: float
    kind: str
    source: str
    by_type: Mapping[str, float] = field(default_factory=dict)

    def of(self, kind: str) -> float:
        """The value for a ggml type."""
        return self.by_type.get(kind, self.value)


@dataclass(frozen=True)
class Device:
    """A device as far as a plan and its speed depend on it.

    Attributes:
        id: Name of its file, and of ``--device``.
        name: As its maker writes it.
        system: Operating system.
        processor: Where the model runs.
        cores: Threads that decode.
        total_memory_bytes: Of main memory.
        app_share: Share of it that one app may hold, 0 to 1, and why.
        memory_bytes_per_s: Of main memory, at best.
        storage_bytes_per_s: Reading a file for the first time.
        cached_bytes_per_s: Reading it again.
        decode_bytes_per_s: Bytes of weights per second while single tokens are computed.
        attention_per_s: Elements of keys and values per second at the same time, in all heads.
        prompt_operations_per_s: Multiplications and additions per second while a prompt is read.
        token_seconds: Of every token, whatever the model.
        layer_seconds: Of every layer and token, whatever its size.
        prompt_layer_seconds: The same for every token of a prompt.
        batch_bytes_per_s: Bytes of weights per second that each batch of a prompt takes on top of
            its operations; ``None``: as a token does.
        small_bytes: Models up to this size stay in the processor's caches; ``None``: not known.
        small_decode_bytes_per_s: ``decode_bytes_per_s`` of those.
        small_prompt_operations_per_s: ``prompt_operations_per_s`` of those.
        expert_operations_per_s: ``prompt_operations_per_s`` of the matrices of experts, which
            llama.cpp multiplies by other kernels; ``None``: as of others.
        small_expert_operations_per_s: The same for models that stay in the caches.
    """

    id: str
    name: str
    system: str
    processor: str
    cores: Figure
    total_memory_bytes: Figure
    app_share: Figure
    memory_bytes_per_s: Figure
    storage_bytes_per_s: Figure
    cached_bytes_per_s: Figure
    decode_bytes_per_s: Figure
    attention_per_s: Figure
    prompt_operations_per_s: Figure
    token_seconds: Figure
    layer_seconds: Figure
    prompt_layer_seconds: Figure
    batch_bytes_per_s: Figure | None = None
    small_bytes: Figure | None = None
    small_decode_bytes_per_s: Figure | None = None
    small_prompt_operations_per_s: Figure | None = None
    expert_operations_per_s: Figure | None = None
    small_expert_operations_per_s: Figure | None = None

    @property
    def budget_bytes(self) -> int:
        """What one app may hold."""
        return int(self.total_memory_bytes.value * self.app_share.value)

    def decode_rates(self, model_bytes: int) -> Figure:
        """Bytes of weights per second for a model of that size."""
        small = self.small_decode_bytes_per_s
        return small if small and self._is_small(model_bytes) else self.decode_bytes_per_s

    def batch_rates(self, model_bytes: int) -> Figure:
        """Bytes of weights per second of a batch, for a model of that size."""
        rates = self.batch_bytes_per_s
        return (
            rates if rates and not self._is_small(model_bytes) else self.decode_rates(model_bytes)
        )

    def prompt_rates(self, model_bytes: int) -> Figure:
        """Operations per second for a model of that size."""
        small = self.small_prompt_operations_per_s
        return small if small and self._is_small(model_bytes) else self.prompt_operations_per_s

    def expert_rates(self, model_bytes: int) -> Figure:
        """Operations per second of experts, for a model of that size."""
        is_small = self._is_small(model_bytes)
        rates = self.small_expert_operations_per_s if is_small else self.expert_operations_per_s
        return rates or self.prompt_rates(model_bytes)

    def _is_small(self, model_bytes: int) -> bool:
        return self.small_bytes is not None and model_bytes <= self.small_bytes.value


OPTIONAL = tuple(f.name for f in fields(Device) if f.default is None)
FIGURES = tuple(f.name for f in fields(Device) if f.name not in ("id", *TEXTS, *OPTIONAL))


def device_names() -> tuple[str, ...]:
    """The devices that edgekit knows, in alphabetical order."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.toml")))


def find_device(name: str) -> Device:
    """A device that edgekit knows, or the one in the file that ``name`` is a path to.

    Raises:
        UnknownNameError: Neither a known name nor a file that ends in .toml.
        RefusedError: The file is no profile.
    """
    if name in device_names():
        return read_device(FOLDER / f"{name}.toml")
    if name.endswith(".toml") and Path(name).is_file():
        return read_device(Path(name))
    raise UnknownNameError("device", name, device_names())


def read_device(path: Path) -> Device:
    """Read a profile.

    Raises:
        RefusedError: It is none; the message names the file, the field and what it needs.
    """
    if path.stat().st_size > MAX_FILE_BYTES:
        raise RefusedError(f"{path} is larger than any device profile; check the path")
    try:
        body = tomllib.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RefusedError(f"{path} is no TOML file: {error}") from error
    missing = {*TEXTS, *FIGURES} - set(body)
    unknown = set(body) - {*TEXTS, *FIGURES, *OPTIONAL}
    if missing or unknown:
        what = f"lacks {min(missing)}" if missing else f"has {min(unknown)!a:.40}, which is unknown"
        raise RefusedError(f"{path} {what}; edgekit devices probe writes a complete profile")
    texts: dict[str, Any] = {key: _text(path, key, body[key]) for key in TEXTS}
    figures: dict[str, Any] = {
        key: _figure(path, key, body[key]) for key in (*FIGURES, *OPTIONAL) if key in body
    }
    if figures["app_share"].value > 1:
        raise RefusedError(f"{path}: app_share is {figures['app_share'].value}; it needs 0 to 1")
    return Device(id=path.stem, **texts, **figures)


def _figure(path: Path, key: str, table: Any) -> Figure:
    if not isinstance(table, dict):
        raise RefusedError(f"{path}: {key} needs a table with value, kind and source")
    values = [table.get("value"), *_values(table.get("by_type", {}))]
    if not all(_is_number(value) for value in values):
        raise RefusedError(f"{path}: {key} has a value that is no number above 0; correct it")
    kind = table.get("kind")
    if kind not in KINDS:
        raise RefusedError(f"{path}: {key} is of kind {kind!a:.40}; choose {', '.join(KINDS)}")
    source = _text(path, f"{key}.source", table.get("source"))
    return Figure(float(table["value"]), kind, source, dict(table.get("by_type", {})))


def _values(table: Any) -> list[Any]:
    return list(table.values()) if isinstance(table, dict) else [None]


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 0 < value < LARGEST


def _text(path: Path, key: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise RefusedError(f"{path}: {key} needs a text that is not empty")
    return value


def as_toml(device: Device) -> str:
    """The profile as the text of a file."""
    lines = [f"{key} = {json.dumps(getattr(device, key))}" for key in TEXTS]
    for key in (*FIGURES, *OPTIONAL):
        if getattr(device, key) is None:
            continue
        figure = asdict(getattr(device, key))
        by_type = figure.pop("by_type")
        lines += ["", f"[{key}]", *(f"{name} = {json.dumps(v)}" for name, v in figure.items())]
        if by_type:
            pairs = ", ".join(f"{name} = {json.dumps(value)}" for name, value in by_type.items())
            lines.append(f"by_type = {{ {pairs} }}")
    return "\n".join([*lines, ""])
