"""The page: sections of plots and tables, every number of them found in the JSON by its path."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import matplotlib
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from edgekit.manifest import Json
from edgekit.report import plots
from edgekit.report.numbers import Path, joined, split, value_at, written
from edgekit.report.svg import inline
from edgekit.report.tips import describe

COLOURS = (
    {plots.INK: "var(--ink)", plots.GRID: "var(--grid)"}
    | {plots.LINE: "var(--line)", plots.ACCENT: "var(--accent)"}
    | {colour: f"var(--s{i})" for i, colour in enumerate(plots.SERIES)}
    | {colour: f"var(--b{i})" for i, colour in enumerate(plots.STEPS)}
    | {colour: f"var(--{part})" for part, colour in plots.PARTS.items()}
)


@dataclass(frozen=True)
class Cell:
    """A value of the JSON in its unit, or words."""

    path: Path = ()
    unit: str = "text"
    words: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of cells under headings."""

    headings: tuple[Cell, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        id: Its anchor, and the name of its text in the template.
        title: Its heading.
        kind: How its numbers are known.
        figures: What is drawn, with what each shows.
        table: The same numbers.
        captions: Of the figures, where they have any.
    """

    id: str
    title: str
    kind: str
    figures: tuple[tuple[str, Figure], ...] = ()
    table: Table | None = None
    captions: tuple[Cell, ...] = ()


Column = tuple[str, str, str]  # heading, path below the row, unit


def render(body: Json) -> str:
    """The page of a profile, as `edgekit.profile.Profile.as_json` gives it."""
    environment = Environment(
        loader=PackageLoader("edgekit.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["number"] = partial(_number, body)
    environment.filters["cell"] = partial(_cell, body)
    with matplotlib.rc_context(plots.STYLE):
        found = sections(body)
        drawn = {
            name: Markup(inline(figure, name, COLOURS, partial(describe, body)))
            for section in found
            for name, figure in section.figures
        }
    # "</script>" inside a string of the data must not end it
    data = Markup(json.dumps(body, ensure_ascii=False).replace("<", "\\u003c"))
    template = environment.get_template("page.html")
    return template.render(body=body, sections=found, drawn=drawn, data=data)


def _number(body: Json, path: str, unit: str) -> Markup:
    """A value in the text, by a path as `joined` writes it."""
    return _cell(body, Cell(split(path), unit))


def _cell(body: Json, cell: Cell) -> Markup:
    if not cell.path:
        return Markup("{}").format(cell.words)
    value = value_at(body, cell.path)
    raw = value if isinstance(value, str) else json.dumps(value)
    return Markup('<data value="{}" data-at="{}" data-unit="{}">{}</data>').format(
        raw, joined(cell.path), cell.unit, written(value, cell.unit)
    )


def sections(body: Json) -> list[Section]:
    """All that the page has of this profile."""
    found = (
        *(_devices(body), _quality(body), _peers(body), _memory(body), _bits(body), _speed(body)),
        *(_trials(body), _cache(body), _experts(body), _tiers(body), _sources(body)),
    )
    return [section for section in found if section is not None]


def _drawn(*figures: tuple[str, Figure | None]) -> tuple[tuple[str, Figure], ...]:
    return tuple((name, figure) for name, figure in figures if figure is not None)


def _rows(base: Path, n: int, columns: Sequence[Column]) -> Table:
    """A table of ``n`` rows of the list at ``base``."""
    return Table(
        tuple(Cell(words=heading) for heading, _, _ in columns),
        tuple(
            tuple(Cell((*base, i, *below.split("/")), unit) for _, below, unit in columns)
            for i in range(n)
        ),
    )


DEVICE_COLUMNS: tuple[Column, ...] = (
    ("device", "device/name", "text"),
    ("memory", "device/total_memory_bytes/value", "size"),
    ("budget of an app", "budget_bytes", "size"),
    ("weights", "plan/weights_bytes", "size"),
    ("bits per weight", "plan/bits_per_weight", "bits"),
    ("expected KL", "plan/expected_kl", "kl"),
    ("decode", "predicted/decode_tokens_per_s", "rate"),
    ("context full", "predicted/late_tokens_per_s", "rate"),
    ("prompt", "predicted/prompt_tokens_per_s", "rate"),
    ("first read", "predicted/read_seconds", "seconds"),
)


def _devices(body: Json) -> Section | None:
    if not body["devices"]:
        return None
    rows = []
    for i, row in enumerate(body["devices"]):
        cells = []
        for _, below, unit in DEVICE_COLUMNS:
            keys: Path = tuple(below.split("/"))
            absent = row["plan"] is None and keys[0] in ("plan", "predicted")
            cells.append(
                Cell(words="does not fit" if keys[-1] == "weights_bytes" else "-")
                if absent
                else Cell(("devices", i, *keys), unit)
            )
        rows.append(tuple(cells))
    headings = tuple(Cell(words=heading) for heading, _, _ in DEVICE_COLUMNS)
    return Section("devices", "Devices", "predicted", table=Table(headings, tuple(rows)))


def _quality(body: Json) -> Section | None:
    if not body["quality"]:
        return None
    columns: tuple[Column, ...] = (
        ("weights", "weights_bytes", "size"),
        ("bits per weight", "bits_per_weight", "bits"),
        ("KL", "kl_mean", "kl"),
        ("perplexity", "ppl", "ppl"),
        ("same first choice", "top1_agreement", "share"),
    )
    table = _rows(("quality",), len(body["quality"]), columns)
    figures = _drawn(
        ("Quality over weights", plots.quality(body)),
        ("Perplexity over weights", plots.perplexity(body)),
    )
    return Section("quality", "Quality", "measured, stairs expected", figures, table)


def _peers(body: Json) -> Section | None:
    if not body["peers"]:
        return None
    columns: tuple[Column, ...] = (
        ("tool", "tool", "text"),
        ("file", "name", "text"),
        ("weights", "weights_bytes", "size"),
        ("KL", "kl_mean", "kl"),
    )
    table = _rows(("peers",), len(body["peers"]), columns)
    return Section("peers", "Other tools' files of this model", "measured", table=table)


def _memory(body: Json) -> Section:
    seen = [row["tier"] for row in body["tiers"]]
    seen += [tier for row in body["budgets"] for tier in row["by_tier"]]
    tiers = list(dict.fromkeys(seen))
    columns: list[Column] = [
        ("budget", "budget_bytes", "size"),
        ("used", "total_bytes", "size"),
        ("weights", "weights_bytes", "size"),
        ("KV cache", "kv_bytes", "size"),
        ("compute", "compute_bytes", "size"),
        ("process", "overhead_bytes", "size"),
        ("bits per weight", "bits_per_weight", "bits"),
        ("expected KL", "expected_kl", "kl"),
    ]
    table = _rows(("budgets",), len(body["budgets"]), columns)
    rows = []
    for i, (row, planned) in enumerate(zip(table.rows, body["budgets"], strict=True)):
        cells = [
            Cell(("budgets", i, "by_tier", tier), "size")
            if tier in planned["by_tier"]
            else Cell(words="-")
            for tier in tiers
        ]
        rows.append((*row, *cells))
    headings = (*table.headings, *(Cell(words=tier) for tier in tiers))
    figures = _drawn(("Memory over budgets", plots.memory(body)))
    return Section("memory", "Memory", "predicted", figures, Table(headings, tuple(rows)))


def _bits(body: Json) -> Section:
    figures = tuple(
        (f"Bits per weight, map {i + 1} of {len(body['maps'])}", plots.bits(body, i))
        for i in range(len(body["maps"]))
    )
    captions = tuple(Cell(("maps", i, "budget_bytes"), "size") for i in range(len(body["maps"])))
    headings = (
        Cell(words="budget"),
        Cell(words="role"),
        *(Cell(("columns", c)) for c in range(len(body["columns"]))),
    )
    rows = []
    for m, bit_map in enumerate(body["maps"]):
        for r, bits in enumerate(bit_map["bits"]):
            cells = [
                Cell(words="") if value is None else Cell(("maps", m, "bits", r, c), "bits")
                for c, value in enumerate(bits)
            ]
            rows.append((Cell(("maps", m, "budget_bytes"), "size"), Cell(("roles", r)), *cells))
    table = Table(headings, tuple(rows))
    return Section("bits", "Where the bits go", "counted", figures, table, captions)


def _speed(body: Json) -> Section | None:
    figure = plots.speed(body)
    if figure is None:
        return None
    columns: list[Column] = [
        ("device", "device/name", "text"),
        ("cores", "device/cores/value", "count"),
        ("memory", "device/memory_bytes_per_s/value", "speed"),
        ("is", "device/memory_bytes_per_s/kind", "text"),
        ("weights are read at", "device/decode_bytes_per_s/value", "speed"),
        ("is", "device/decode_bytes_per_s/kind", "text"),
        ("storage", "device/storage_bytes_per_s/value", "speed"),
        ("is", "device/storage_bytes_per_s/kind", "text"),
    ]
    table = _rows(("devices",), len(body["devices"]), columns)
    return Section("speed", "Speed", "predicted", (("Speed of devices", figure),), table)


def _trials(body: Json) -> Section | None:
    figure = plots.trials(body)
    if figure is None:
        return None
    columns: list[Column] = [
        ("budget", "trial/budget_bytes", "size"),
        ("memory, predicted", "trial/planned_bytes", "size"),
        ("peak, measured", "trial/peak_bytes", "size"),
        ("decode, predicted", "decode_tokens_per_s", "rate"),
        ("measured", "trial/decode_tokens_per_s", "rate"),
        ("prompt, predicted", "prompt_tokens_per_s", "rate"),
        ("measured", "trial/prompt_tokens_per_s", "rate"),
        ("load, measured", "trial/load_seconds", "seconds"),
        ("resized to", "trial/resize_bytes", "size"),
        ("in, measured", "trial/resize_seconds", "seconds"),
        ("and back, measured", "trial/return_seconds", "seconds"),
    ]
    table = _rows(("measured", "checks"), len(body["measured"]["checks"]), columns)
    figures = (("Predicted and measured", figure),)
    return Section("trials", "This machine", "measured and predicted", figures, table)


def _cache(body: Json) -> Section:
    kinds = list(body["cache"][0]["by_type"])
    columns: list[Column] = [("context, tokens", "context", "count")]
    columns += [(kind, f"by_type/{kind}", "size") for kind in kinds]
    table = _rows(("cache",), len(body["cache"]), columns)
    figures = _drawn(("KV cache over context", plots.cache(body)))
    return Section("cache", "Context", "counted", figures, table)


def _experts(body: Json) -> Section | None:
    figure = plots.hits(body)
    if figure is None:
        return None
    curves = body["experts"]["hit_curves"]
    headings = (Cell(words="experts per layer"), *(Cell(words=c["policy"]) for c in curves))
    sizes = curves[0]["experts_per_layer"]
    rows = tuple(
        (
            Cell(("experts", "hit_curves", 0, "experts_per_layer", i), "count"),
            *(
                Cell(("experts", "hit_curves", k, "hit_rate", i), "share")
                for k in range(len(curves))
            ),
        )
        for i in range(len(sizes))
    )
    figures = (("Experts: hit rate over cache", figure),)
    return Section("experts", "Experts", "measured", figures, Table(headings, rows))


def _tiers(body: Json) -> Section:
    columns: tuple[Column, ...] = (
        ("tier", "tier", "text"),
        ("a file of it would hold", "weights_bytes", "size"),
        ("bits per weight", "bits_per_weight", "bits"),
    )
    table = _rows(("tiers",), len(body["tiers"]), columns)
    return Section("tiers", "One artifact", "counted", table=table)


FIGURE_UNITS = {
    "cores": "count",
    "total_memory_bytes": "size",
    "app_share": "share",
    "memory_bytes_per_s": "speed",
    "storage_bytes_per_s": "speed",
    "cached_bytes_per_s": "speed",
    "decode_bytes_per_s": "speed",
    "attention_per_s": "rate",
    "prompt_operations_per_s": "rate",
    "token_seconds": "seconds",
    "layer_seconds": "seconds",
    "prompt_layer_seconds": "seconds",
    "batch_bytes_per_s": "speed",
    "small_bytes": "size",
    "small_decode_bytes_per_s": "speed",
    "small_prompt_operations_per_s": "rate",
    "expert_operations_per_s": "rate",
    "small_expert_operations_per_s": "rate",
}


def _sources(body: Json) -> Section | None:
    if not body["devices"]:
        return None
    rows: list[tuple[Cell, ...]] = []
    for i, row in enumerate(body["devices"]):
        for name, unit in FIGURE_UNITS.items():
            if row["device"][name] is None:
                continue
            base: tuple[Any, ...] = ("devices", i, "device", name)
            rows.append(
                (
                    Cell(("devices", i, "device", "name")),
                    Cell(words=name.replace("_", " ")),
                    Cell((*base, "value"), unit),
                    Cell((*base, "kind")),
                    Cell((*base, "source")),
                )
            )
    headings = tuple(Cell(words=w) for w in ("device", "number", "value", "is", "source"))
    return Section(
        "sources", "Where the devices' numbers are from", "", table=Table(headings, tuple(rows))
    )
