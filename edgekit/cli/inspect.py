"""``edgekit inspect`` and ``edgekit verify``."""

from pathlib import Path
from typing import Any

import click

from edgekit.cli import options
from edgekit.cli.console import note, print_json, print_table
from edgekit.cli.experts import print_experts
from edgekit.errors import RefusedError
from edgekit.sizes import format_size

Rows = list[tuple[object, ...]]


@click.command()
@click.argument("path", type=options.ANY_PATH)
@options.as_json
@options.verbose
def inspect(path: Path, as_json: bool, verbose: bool) -> None:
    """Tell what PATH is: an artifact, a GGUF file or a checkpoint. Reads no weights.

    \b
        edgekit inspect llama-edge
    """
    from edgekit.inspect import inspect_path

    body = inspect_path(path)
    if as_json:
        print_json(body)
        return
    facts = [(key, value) for key, value in body.items() if not isinstance(value, (list, dict))]
    pruned = body.get("source", {}).get("pruned")
    if pruned:
        told = f"{pruned['ratio']:.1%} of the parameters before, KL {pruned['kl_mean']:.4g}"
        facts.append(("pruned", told))
    print_table(str(path), ("fact", "value"), facts)
    for name, columns, rows in _tables(body):
        if rows:
            print_table(name, columns, rows)
    if body.get("experts"):
        print_experts(body["experts"])


def _tables(body: dict[str, Any]) -> list[tuple[str, tuple[str, ...], Rows]]:
    quality: Rows = [
        (
            format_size(row["weights_bytes"]),
            f"{row['bits_per_weight']:.2f}",
            f"{row['kl_mean']:.4g}",
            f"{row['ppl']:.4g}",
            f"{row['top1_agreement']:.1%}",
        )
        for row in body.get("quality", [])
    ]
    levels: Rows = [
        (
            row["tier"],
            row["levels"],
            format_size(row["stored_bytes"]),
            f"{row['bits_per_weight']:.2f}",
        )
        for row in body.get("stored", [])
    ]
    depths: Rows = [
        (row["depth"], format_size(row["bytes"]), f"{row['error']:.4f}", row["graph"])
        for row in body.get("onnx", {}).get("depths", [])
    ]
    return [
        ("For ONNX Runtime", ("bits", "bytes", "relative error", "graph"), depths),
        ("Stored levels", ("tier", "levels", "bytes", "bits per weight"), levels),
        (
            "What budgets buy",
            ("weights", "bits per weight", "KL", "perplexity", "same top token"),
            quality,
        ),
    ]


@click.command()
@click.argument("artifact", type=options.FOLDER)
@options.as_json
@options.verbose
def verify(artifact: Path, as_json: bool, verbose: bool) -> None:
    """Check every byte of ARTIFACT against its manifest; exit code 5 when something is wrong.

    A .levels file that ends early is no error: the levels that are whole still work.

    \b
        edgekit verify llama-edge
    """
    from edgekit.verify import verify_path

    found = verify_path(artifact)
    if as_json:
        body = {"ok": found.ok, "checked": found.checked, "missing": found.missing}
        print_json(body | {"problems": list(found.problems)})
    if found.problems:
        more = f" (and {len(found.problems) - 1} more)" if len(found.problems) > 1 else ""
        raise RefusedError(f"{found.problems[0]}{more}")
    if not as_json:
        note(f"{artifact}: {found.checked} parts are sound, {found.missing} are not here")
