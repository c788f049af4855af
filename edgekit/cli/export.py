"""``edgekit export``."""

import os
from pathlib import Path

import click

from edgekit.cli import options
from edgekit.cli.console import note, print_json, progress_bars
from edgekit.sizes import format_size


@click.command()
@click.argument("artifact", type=options.FOLDER)
@click.option("--format", "file_format", type=click.Choice(["onnx"]), required=True)
@click.option(
    "--checkpoint",
    type=options.FOLDER,
    help="Folder with the checkpoint's config and tokenizer, for an artifact without "
    "tokenizer.zip. Its weights are not read.",
)
@click.option(
    "--imatrix", type=options.FILE, help="Importance of columns (llama-imatrix or edgekit)."
)
@click.option(
    "--block-size",
    type=click.Choice(["32", "64", "128"]),
    default="64",
    show_default=True,
    help="Weights that share a scale.",
)
@click.option(
    "--jobs", type=click.IntRange(1, 256), default=os.cpu_count(), show_default="all cores"
)
@options.force
@options.as_json
@options.verbose
def export(
    artifact: Path,
    file_format: str,
    checkpoint: Path | None,
    imatrix: Path | None,
    block_size: str,
    jobs: int,
    force: bool,
    as_json: bool,
    verbose: bool,
) -> None:
    """Add what ONNX Runtime needs to ARTIFACT, from the original weights that it holds.

    \b
        edgekit export llama-edge --format onnx
    """
    from edgekit.onnx.add import add_onnx

    with progress_bars() as progress:
        found = add_onnx(
            artifact,
            checkpoint,
            progress,
            imatrix=imatrix,
            block=int(block_size),
            jobs=jobs,
            force=force,
        )
    if as_json:
        print_json(found)
        return
    note(f"{found['folder']} is {format_size(found['bytes'])}; {found['seconds']:.1f} s")
