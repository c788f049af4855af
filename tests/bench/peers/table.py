"""docs/compare.md from the JSON of a comparison.

python tests/bench/peers/table.py docs/compare.json
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]
MIB = 1 << 20


def page(body: Row) -> str:
    """The page."""
    parts = (_head, _quality, _wins, _cost, _versions)
    return "\n".join([line for part in parts for line in part(body)] + [""])


def _head(body: Row) -> Iterator[str]:
    yield "# edgekit beside its peers"
    yield ""
    yield (
        f"`tests/bench/peers/compare.py --sample {body['sample']}`, {body['date']}, on "
        f"{body['machine']}. The page is made by it: every peer's own tool made its files of "
        f"`samples/{body['sample']}`, its own runtime ran them on the same {body['n_tokens']:,} "
        "scored tokens of held-out text, and all are compared with the checkpoint in float32 by "
        "transformers. Bytes are those of weights (of a GGUF without its header, of other "
        "formats the files). llama.cpp's mixes have the importance matrix that edgekit's "
        "conversion saved."
    )
    yield ""


def winner(row: Row) -> str:
    """Who has the lower divergence at these bytes, where the errors tell them apart."""
    mine = row["edgekit"]
    if mine is None:
        return f"**{row['tool']}**: edgekit's least is larger"
    error = 2 * (row["kl_error"] ** 2 + mine["kl_error"] ** 2) ** 0.5
    if abs(row["kl_mean"] - mine["kl_mean"]) <= error:
        return "neither, within two errors"
    return "edgekit" if mine["kl_mean"] < row["kl_mean"] else f"**{row['tool']}**"


def _quality(body: Row) -> Iterator[str]:
    yield "## Quality at equal bytes"
    yield ""
    yield "| peer | file | bytes | its KL | edgekit's bytes | edgekit's KL | better |"
    yield "|---|---|---|---|---|---|---|"
    for row in sorted(body["models"], key=lambda r: (r["tool"], r["weights_bytes"])):
        mine = row["edgekit"]
        ours = f"{mine['weights_bytes']:,} | {_kl(mine)}" if mine else "- | -"
        yield (
            f"| {row['tool']} | {row['name']} | {row['weights_bytes']:,} | {_kl(row)} | {ours} "
            f"| {winner(row)} |"
        )
    yield ""


def _kl(row: Row) -> str:
    return f"{row['kl_mean']:.3g} +- {row['kl_error']:.1g}"


# What a row has, whether more is better, and how it is said
FIGURES = (
    ("decode_tokens_per_s", True, "decodes faster", "{:.0f} against {:.0f} tokens/s"),
    ("prompt_tokens_per_s", True, "reads prompts faster", "{:.0f} against {:.0f} tokens/s"),
    ("load_seconds", False, "loads faster", "{:.2f} against {:.2f} s"),
)
# Of making a file and of converting once: what a row has, what edgekit has, and how it is said
ONCE = (
    ("convert_seconds", "seconds", "is made faster than", "{:.1f} s".format),
    (
        "convert_peak_bytes",
        "peak_bytes",
        "takes less memory to make than",
        lambda n: f"{n / MIB:.0f} MiB",
    ),
    ("weights_bytes", "artifact_bytes", "is smaller than", "{:,} bytes".format),
)
CLEARLY = 1.1  # times; less is not told apart from noise


def _wins(body: Row) -> Iterator[str]:
    """Where a peer is better, in words."""
    yield "## Where a peer wins"
    yield ""
    for row in body["models"]:
        mine, name = row["edgekit"], f"{row['tool']} {row['name']}"
        if winner(row).startswith("**"):
            yield f"- {name}: better quality at its bytes."
        for key, more, words, form in FIGURES if mine else ():
            ratio = row[key] / mine[key] if more else mine[key] / row[key]
            if ratio >= CLEARLY:
                yield f"- {name} {words}: {form.format(row[key], mine[key])}."
    for key, ours, words, form in ONCE:
        least = min(body["models"], key=lambda row: row[key], default=None)
        if least and least[key] < body["edgekit"][ours]:
            theirs, mine = form(least[key]), form(body["edgekit"][ours])
            yield (
                f"- One file {words} an artifact for all sizes: {theirs} by {least['tool']}, "
                f"against {mine}."
            )
    yield ""


def _cost(body: Row) -> Iterator[str]:
    edge = body["edgekit"]
    yield "## What it takes"
    yield ""
    yield (
        f"edgekit's conversion, once for all sizes: {edge['seconds']:.1f} s, quality measured at "
        f"twelve of them, peak {edge['peak_bytes'] / MIB:.0f} MiB, "
        f"{edge['artifact_bytes']:,} bytes on disk. Each peer's file, from the checkpoint:"
    )
    yield ""
    columns = "making, s", "its peak, MiB", "load, s", "prompt, tokens/s", "decode, tokens/s"
    yield f"| peer | file | {' | '.join(columns)} | peak running, MiB |"
    yield "|---|---|---|---|---|---|---|---|"
    for row in body["models"]:
        yield _cost_row(row["tool"], row)
        if row["edgekit"]:
            yield _cost_row("edgekit at these bytes", row["edgekit"], is_ours=True)
    yield ""
    yield (
        "Load is from the call to a model ready for tokens, page cache warm. Loads and speeds are "
        "medians of three runs of each file in turns with edgekit's of the same bytes: compare a "
        "row with the one below it, not rows of different peers, for a shared machine differs by "
        "up to 1.4 times between moments. All GGUF files run in the same llama.cpp, with a float32 "
        "cache and without repacking. onnxruntime-genai's file holds the embedding in float32."
    )
    yield ""


def _cost_row(tool: str, row: Row, *, is_ours: bool = False) -> str:
    made = "-" if is_ours else f"{row['convert_seconds']:.1f}"
    peak = "-" if is_ours else f"{row['convert_peak_bytes'] / MIB:.0f}"
    name = "" if is_ours else row["name"]
    return (
        f"| {tool} | {name} | {made} | {peak} | {row['load_seconds']:.2f} "
        f"| {row['prompt_tokens_per_s']:.0f} | {row['decode_tokens_per_s']:.0f} "
        f"| {row['peak_bytes'] / MIB:.0f} |"
    )


def _versions(body: Row) -> Iterator[str]:
    yield "## Versions"
    yield ""
    for peer, packages in body["versions"].items():
        yield f"- {peer}: {', '.join(f'`{package}`' for package in packages)}"
    for peer, words in body["failures"].items():
        yield f"- {peer} did not run to its end here: `{words}`"
    if "llama.cpp" in body["versions"]:
        yield (
            "- The converters of llama.cpp and AutoRound refuse the samples' tokenizers (`BPE "
            "pre-tokenizer was not recognized`); they were given the name `gpt-2` by hand. Token "
            "ids are given as they are, so this changes no figure."
        )


if __name__ == "__main__":
    source = Path(sys.argv[1])
    source.with_suffix(".md").write_text(page(json.loads(source.read_text())))
