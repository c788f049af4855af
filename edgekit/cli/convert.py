"""``edgekit convert``."""

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgekit.cli import options
from edgekit.cli.console import note, print_json, print_table, progress_bars
from edgekit.errors import UsageError
from edgekit.sizes import format_size

if TYPE_CHECKING:
    from edgekit.convert_report import Report


@click.command()
@click.argument("checkpoint", type=options.FOLDER)
@click.option(
    "-o", "--output", type=options.NEW_PATH, required=True, help="Folder of the artifact."
)
@click.option(
    "--tiers",
    help="Lowest first. Default: Q2_K,Q3_K,Q4_K,Q5_K,Q6_K,Q8_0,source; with --codec bitstack "
    "Q2_K,B1,...,B8,source.",
)
@click.option(
    "--codec",
    type=click.Choice(["nested", "bitstack"]),
    default="nested",
    show_default=True,
    help="How levels are stored: as differences of stock tiers, or as BitStack does.",
)
@click.option(
    "--column-group",
    type=click.IntRange(0),
    default=0,
    help="With --codec bitstack: rank-1 factors for every so many columns; 0: one set of a higher "
    "rank for all.",
)
@click.option(
    "--load-order",
    type=click.Choice(["kl", "average"]),
    default="kl",
    show_default=True,
    help="By KL divergence per byte, or level by level as BitStack's authors sort.",
)
@click.option(
    "--format",
    "formats",
    default="gguf",
    show_default=True,
    help="gguf for llama.cpp, onnx for ONNX Runtime, gguf,onnx for both.",
)
@click.option(
    "--block-size",
    type=click.Choice(["32", "64", "128"]),
    default="64",
    show_default=True,
    help="ONNX: weights that share a scale.",
)
@click.option(
    "--error-feedback",
    type=click.Choice(["8", "4", "2", "mean"]),
    help="ONNX: carry each weight's error at so many bits, or at all depths' mean, on to the next "
    "columns. Better at that depth, worse at the others.",
)
@click.option(
    "--prune",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.0,
    help="Prune first, by this share of all parameters (edgekit prune).",
)
@click.option(
    "--calibration",
    type=options.FILE,
    help="Text to calibrate on, its first 4 MiB; default: a text that ships with edgekit.",
)
@click.option(
    "--imatrix", type=options.FILE, help="Use this importance matrix (llama-imatrix or edgekit)."
)
@click.option(
    "--no-calibration",
    is_flag=True,
    help="Quantize without statistics; --prune calibrates all the same.",
)
@click.option(
    "--save-imatrix",
    type=options.NEW_PATH,
    help="Also write the importance matrix, for llama-quantize.",
)
@click.option(
    "--no-measure", is_flag=True, help="Do not measure quality at a dozen budgets at the end."
)
@click.option(
    "--jobs",
    type=click.IntRange(1, 256),
    default=os.cpu_count(),
    show_default="all cores",
    help="Tensors that are encoded at once.",
)
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="What encodes: threads of this machine, or a Ray cluster that sees the same paths.",
)
@click.option("--address", help="Of a running Ray cluster; default: one is started here.")
@click.option("--resume", is_flag=True, help="Go on with the same conversion where it was stopped.")
@options.force
@options.dry_run
@options.as_json
@options.verbose
def convert(
    checkpoint: Path,
    output: Path,
    tiers: str | None,
    codec: str,
    column_group: int,
    load_order: str,
    formats: str,
    block_size: str,
    error_feedback: str | None,
    prune: float,
    calibration: Path | None,
    imatrix: Path | None,
    no_calibration: bool,
    save_imatrix: Path | None,
    no_measure: bool,
    jobs: int,
    engine: str,
    address: str | None,
    resume: bool,
    force: bool,
    dry_run: bool,
    as_json: bool,
    verbose: bool,
) -> None:
    """Convert the Hugging Face folder CHECKPOINT into one artifact for every budget.

    \b
        edgekit convert ./Llama-3.2-1B -o llama-edge
        edgekit convert ./Llama-3.2-1B -o llama-edge --tiers Q4_K,Q8_0,source --no-calibration
        edgekit convert ./Llama-3.2-1B -o llama-edge --format onnx --no-calibration
    """
    from edgekit.codecs import CODECS
    from edgekit.convert import convert
    from edgekit.convert_options import Options
    from edgekit.convert_preview import preview
    from edgekit.materialize import check_output

    if sum((calibration is not None, imatrix is not None, no_calibration)) > 1:
        raise UsageError(
            "--calibration, --imatrix and --no-calibration exclude each other; give one"
        )
    if "gguf" not in formats and (tiers or codec != "nested" or load_order != "kl"):
        raise UsageError(
            "--tiers, --codec and --load-order are for llama.cpp; leave them out, or add gguf to "
            "--format"
        )
    if block_size != "64" and "onnx" not in formats:
        raise UsageError("--block-size is of ONNX codes; leave it out, or add onnx to --format")
    if save_imatrix is not None and not resume:
        check_output(save_imatrix, force)
    chosen = Options(
        tiers=tuple(tiers.replace(" ", "").split(",")) if tiers else CODECS[codec].tiers,
        codec=codec,
        column_group=column_group,
        load_order=load_order,
        formats=tuple(formats.replace(" ", "").split(",")),
        block_size=int(block_size),
        error_feedback=error_feedback,
        prune=prune,
        calibration=calibration,
        imatrix=imatrix,
        statistics=not no_calibration,
        save_imatrix=save_imatrix,
        measure=not no_measure,
        jobs=jobs,
        engine=engine,
        address=address,
        resume=resume,
        force=force,
    )
    with progress_bars() as progress:
        if dry_run:
            report = preview(checkpoint, output, chosen)
        else:
            report = convert(checkpoint, output, chosen, progress, ["edgekit", *sys.argv[1:]])
    if as_json:
        print_json(asdict(report))
    else:
        _print(report, "would be" if dry_run else "is")


def _print(report: "Report", verb: str) -> None:
    rows = [
        (tier, format_size(row["bytes"]), f"{row['bits_per_weight']:.2f}")
        for tier, row in report.tiers.items()
    ]
    if rows:
        print_table("Weights in memory", ("tier", "bytes", "bits per weight"), rows)
    share = report.artifact_bytes / report.source_bytes
    note(
        f"{report.artifact} {verb} {format_size(report.artifact_bytes)}, {share:.3f} x the "
        f"checkpoint's {format_size(report.source_bytes)}; {report.seconds:.1f} s"
    )
