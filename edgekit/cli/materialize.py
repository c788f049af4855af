"""``edgekit materialize``."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgekit.cli import options
from edgekit.cli.console import note, print_json
from edgekit.errors import UsageError
from edgekit.sizes import format_size

if TYPE_CHECKING:
    from edgekit.materialize import Materialized
    from edgekit.onnx.materialize import OnnxMaterialized


@click.command()
@click.argument("artifact", type=options.FOLDER)
@options.tier
@click.option("--budget", type=options.Size(), help="The best file for a process of this size.")
@click.option(
    "--target-size", type=options.Size(), help="The best file with at most these bytes of weights."
)
@click.option(
    "--format",
    "file_format",
    type=click.Choice(["gguf", "onnx"]),
    default="gguf",
    show_default=True,
    help="onnx writes a model folder of one --depth.",
)
@click.option(
    "--depth", type=click.Choice(["2", "4", "8"]), help="ONNX: bits of most of the codes."
)
@click.option(
    "-o", "--output", type=options.NEW_PATH, required=True, help="The GGUF or folder to write."
)
@options.context
@options.kv_type
@options.force
@options.dry_run
@options.as_json
@options.verbose
def materialize(
    artifact: Path,
    tier: str | None,
    budget: int | None,
    target_size: int | None,
    file_format: str,
    depth: str | None,
    output: Path,
    context: int | None,
    kv_type: str,
    force: bool,
    dry_run: bool,
    as_json: bool,
    verbose: bool,
) -> None:
    """Write an ordinary GGUF from ARTIFACT; any llama.cpp app opens it. Or an ONNX model folder.

    \b
        edgekit materialize llama-edge --tier Q4_K -o phone.gguf
        edgekit materialize llama-edge --budget 900MiB -o phone.gguf
        edgekit materialize llama-edge --format onnx --depth 4 -o phone-q4
    """
    if budget is None and (context is not None or kv_type != "f16"):
        raise UsageError("--context and --kv-type are for --budget; leave them out")
    if file_format == "onnx":
        if depth is None or tier is not None or target_size is not None or budget is not None:
            raise UsageError("--format onnx takes one choice: --depth 2, 4 or 8")
        made: Materialized | OnnxMaterialized = _write_onnx(
            artifact, int(depth), output, force, dry_run
        )
    elif depth is not None:
        raise UsageError("--depth is for --format onnx; choose a GGUF's with --tier or --budget")
    else:
        made = _write_gguf(
            artifact, tier, budget, target_size, output, context, kv_type, force, dry_run
        )
    if as_json:
        print_json(asdict(made))
        return
    verb = "would be" if dry_run else "is"
    note(f"{made.path} {verb} {format_size(made.bytes)}; {made.seconds:.1f} s")


def _write_onnx(
    artifact: Path, depth: int, output: Path, force: bool, dry_run: bool
) -> "OnnxMaterialized":
    from edgekit.onnx.artifact import open_onnx
    from edgekit.onnx.materialize import check_output, materialize_onnx, preview

    check_output(output, force)
    opened = open_onnx(artifact, depth)
    if dry_run:
        return preview(opened, depth, output)
    return materialize_onnx(opened, depth, output, force=force)


def _write_gguf(
    artifact: Path,
    tier: str | None,
    budget: int | None,
    target_size: int | None,
    output: Path,
    context: int | None,
    kv_type: str,
    force: bool,
    dry_run: bool,
) -> "Materialized":
    from edgekit.artifact import open_artifact
    from edgekit.materialize import check_output, materialize, preview
    from edgekit.plan import plan_budget, plan_tier, plan_weights

    if sum(choice is not None for choice in (tier, budget, target_size)) != 1:
        raise UsageError("say what to write: give one of --tier, --budget or --target-size")
    check_output(output, force)
    with open_artifact(artifact, remember=True) as opened:
        if tier is not None:
            chosen = plan_tier(opened, tier)
        elif budget is not None:
            chosen = plan_budget(opened, budget, context, kv_type)
        else:
            chosen = plan_weights(opened, target_size or 0)
        if dry_run:
            return preview(opened, chosen.depths, output)
        return materialize(opened, chosen.depths, output, force=force)
