"""The artifact's README.md: source, licence, what each budget buys, how to run."""

from functools import partial
from pathlib import Path

from edgekit.exporters.onnx_store import DEPTHS
from edgekit.manifest import Json, Manifest
from edgekit.onnx_part import FOLDER, OnnxPart, graph_name
from edgekit.planner import tier_at, uniform
from edgekit.sizes import format_size
from edgekit.spool import write_atomically


def write_model_card(folder: Path, manifest: Manifest) -> None:
    """Write ``README.md`` into ``folder``."""
    write_atomically(folder / "README.md", model_card(manifest).encode())


def model_card(m: Manifest) -> str:
    """The text of the model card, Markdown with the front matter of the Hugging Face hub."""
    licence = m.source.get("license")
    front = [
        "---",
        *([f"license: {licence}"] if licence else []),
        "library_name: edgekit",
        f"tags: [{', '.join(_tags(m))}]",
        "---",
    ]
    gguf = [*_what(m), "", *_budgets(m), ""] if m.has_gguf else [f"# {m.name}", ""]
    onnx = [*_depths(m.onnx), ""] if m.onnx is not None else []
    return "\n".join([*front, "", *gguf, *onnx, *_use(m), "", *_origin(m), ""])


def _tags(m: Manifest) -> list[str]:
    return [*(["gguf"] if m.has_gguf else []), *(["onnx"] if m.onnx else []), "edgekit"]


def _depths(part: OnnxPart) -> list[str]:
    rows = [
        f"| {depth} | `{graph_name(depth)}` | {format_size(part.depth_bytes(depth))} "
        f"| {part.errors[depth][0]:.4f} | {part.errors[depth][1]:.4f} |"
        for depth in DEPTHS
    ]
    return [
        f"## For ONNX Runtime, in `{FOLDER}/`",
        "",
        "One set of nested codes; a depth reads its own bytes of the data files only.",
        "",
        "| bits | graph | bytes | relative error | of codes for that depth alone |",
        "|---|---|---|---|---|",
        *rows,
    ]


def _what(m: Manifest) -> list[str]:
    return [
        f"# {m.name}",
        "",
        f"{m.n_parameters / 1e6:.1f} M parameters, architecture `{m.architecture}`, converted once",
        f"by edgekit for every memory budget. `{m.base.name}` is an ordinary GGUF that any",
        f"llama.cpp app opens; `{m.levels.name}` holds the levels that lift its tensors through",
        f"{', '.join(m.tiers)}.",
    ]


def _budgets(m: Manifest) -> list[str]:
    rows = [
        "## What a budget buys",
        "",
        "| every tensor at | weights in memory | bits per weight |",
        "|---|---|---|",
    ]
    for tier in m.tiers:
        size = uniform(m.stacks, partial(tier_at, tier=tier)).weights_bytes
        rows.append(f"| {tier} | {format_size(size)} | {8 * size / m.n_parameters:.2f} |")
    if not m.quality:
        return [*rows, "", "Quality was not measured at conversion."]
    rows += [
        "",
        f"Mixed depths, measured on {m.quality[0]['n_tokens']} tokens of held-out text against the",
        "highest depth:",
        "",
    ]
    rows += [
        "| weights in memory | bits per weight | KL | perplexity | same top token |",
        "|---|---|---|---|---|",
    ]
    return rows + [_quality_row(row) for row in m.quality]


def _quality_row(row: Json) -> str:
    return (
        f"| {format_size(row['weights_bytes'])} | {row['bits_per_weight']:.2f} "
        f"| {row['kl_mean']:.4g} | {row['ppl']:.4g} | {row['top1_agreement']:.1%} |"
    )


def _use(m: Manifest) -> list[str]:
    lines = ["## How to run", ""]
    if m.has_gguf:
        lines += [
            '    edgekit run . --budget auto -p "Hello"',
            f"    edgekit materialize . --tier {m.tiers[0]} -o model.gguf",
        ]
    if m.onnx is not None:
        lines += [
            '    edgekit run . --runtime onnx --budget auto -p "Hello"',
            "    edgekit materialize . --format onnx --depth 4 -o model-q4",
        ]
    return lines


def _pruning(m: Manifest) -> list[str]:
    pruned = m.source.get("pruned")
    if not pruned:
        return []
    return [
        "",
        f"The source had been pruned: {pruned['ratio']:.1%} of the parameters of the model",
        f"before are gone, at a KL divergence of {pruned['kl_mean']:.4g} nats from it. What",
        "budgets buy is measured against the pruned model, so that comes on top.",
    ]


def _origin(m: Manifest) -> list[str]:
    licence = m.source.get("license") or "not stated by the source"
    files = [
        f"- `{f['name']}`, {f['bytes']} bytes, sha256 `{f['sha256']}`"
        for f in m.source.get("files", [])
    ]
    statistics = (
        "an importance matrix" if m.statistics.get("kind") == "imatrix" else "no importance matrix"
    )
    return [
        "## Where it comes from",
        "",
        f"Source `{m.source.get('name')}`, licence {licence}; quantized with {statistics};",
        f"edgekit {m.tool.get('edgekit')}, llama-cpp-python {m.tool.get('llama_cpp_python')}.",
        *_pruning(m),
        "",
        *files,
    ]
