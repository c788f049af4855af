"""``edgekit prune``."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgekit.cli import options
from edgekit.cli.console import note, print_json, print_table, progress_bars
from edgekit.errors import EdgekitError, UsageError
from edgekit.progress import Progress
from edgekit.sizes import format_size

if TYPE_CHECKING:
    from edgekit.pruning.prune import Options, Report

REPAIRED = "Q2_K"  # the tier that loses most
METRICS = ("condition", "leverage", "magnitude", "wanda", "flap", "taylor")


@click.command()
@click.argument("checkpoint", type=options.FOLDER)
@click.option(
    "-o", "--output", type=options.NEW_PATH, required=True, help="Folder of the new checkpoint."
)
@click.option(
    "--ratio",
    type=click.FloatRange(0, 1, max_open=True),
    required=True,
    help="Share of all parameters to remove, such as 0.2.",
)
@click.option(
    "--metric",
    type=click.Choice(METRICS),
    default="condition",
    show_default=True,
    help="What chooses the neurons and heads that stay.",
)
@click.option(
    "--calibration",
    type=options.FILE,
    help="Text to calibrate on, its first 4 MiB; default: a text that ships with edgekit.",
)
@click.option(
    "--tokens", type=click.IntRange(min=256), default=8192, show_default=True, help="Of the text."
)
@click.option("--no-tuning", is_flag=True, help="Cut only; do not refit what is left.")
@click.option(
    "--multiple",
    type=click.Choice(["32", "64", "128", "256"]),
    default="256",
    show_default=True,
    help="Cut widths to multiples of this; rows below 256 keep K-quants from being used.",
)
@click.option("--layers", type=click.IntRange(min=0), help="Layers to remove; default: measured.")
@click.option(
    "--search",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Generations of an evolutionary search for the layers to remove.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of that search.")
@click.option(
    "--report",
    is_flag=True,
    help="Also measure every metric, and quantization alone: up to 42 prunings.",
)
@click.option(
    "--repair-rank",
    type=click.IntRange(min=1),
    help="Also write a llama.cpp adapter of this rank that repairs --repair-tier.",
)
@click.option("--repair-tier", default=REPAIRED, show_default=True, help="ggml type to repair.")
@click.option("--resume", is_flag=True, help="Go on with the same pruning where it was stopped.")
@options.force
@options.dry_run
@options.as_json
@options.verbose
def prune(
    checkpoint: Path,
    output: Path,
    ratio: float,
    metric: str,
    calibration: Path | None,
    tokens: int,
    no_tuning: bool,
    multiple: str,
    layers: int | None,
    search: int,
    seed: int,
    report: bool,
    repair_rank: int | None,
    repair_tier: str,
    resume: bool,
    force: bool,
    dry_run: bool,
    as_json: bool,
    verbose: bool,
) -> None:
    """Remove layers and neurons of the Hugging Face folder CHECKPOINT; write a smaller one.

    \b
        edgekit prune ./Llama-3.2-1B -o llama-small --ratio 0.2
        edgekit prune ./Llama-3.2-1B -o llama-small --ratio 0.2 --metric flap --no-tuning
    """
    if repair_rank is None and repair_tier != REPAIRED:
        raise UsageError("--repair-tier is of an adapter; give its rank with --repair-rank")
    if seed and not search:
        raise UsageError("--seed is of a search; give its generations with --search")
    try:
        from edgekit.pruning.prune import Options, preview, prune_and_repair
    except ImportError as error:
        raise EdgekitError(f"pruning needs {error.name}; pip install edgekit[convert]") from error
    chosen = Options(
        ratio=ratio,
        metric=metric,
        calibration=calibration,
        tokens=tokens,
        tunes=not no_tuning,
        multiple=int(multiple),
        n_removed=layers,
        search=search,
        seed=seed,
        repair_rank=repair_rank,
        repair_tier=repair_tier,
        resume=resume,
        force=force,
    )
    if dry_run:
        rows = preview(checkpoint, output, chosen)
        if as_json:
            print_json({"candidates": rows})
        else:
            _print_kept(f"{checkpoint} could become", rows)
        return
    with progress_bars() as progress:
        made = prune_and_repair(checkpoint, output, chosen, progress, ["edgekit", *sys.argv[1:]])
        measured = _measured(checkpoint, output, chosen, progress) if report else {}
    if as_json:
        print_json(asdict(made) | {"peak_rss_bytes": _peak()} | measured)
    else:
        _print(made, ratio, measured)


def _print(made: "Report", ratio: float, measured: dict[str, Any]) -> None:
    _print_kept(made.path, [{"kept": made.kept, "ratio": made.ratio}])
    note(
        f"{made.path}: {made.ratio:.1%} removed of {ratio:.1%} asked for, KL {made.kl_mean:.4g}, "
        f"perplexity {made.ref_ppl:.4g} -> {made.ppl:.4g}; {made.seconds:.1f} s, "
        f"{max(made.layer_seconds):.1f} s for the slowest layer, peak {format_size(_peak())}"
    )
    for line in measured.get("verdict", ()):
        note(line)
    if measured:
        note(f"all figures are in {made.path}/report.md and report.json")


def _measured(
    checkpoint: Path, output: Path, chosen: "Options", progress: Progress
) -> dict[str, Any]:
    from edgekit.prune_report import report

    return report(checkpoint, output, chosen, progress)


def _peak() -> int:
    from edgekit.devices.memory import peak_rss_bytes

    return peak_rss_bytes()


def _print_kept(title: str, rows: list[dict[str, Any]]) -> None:
    columns = ("ratio", *rows[0]["kept"])
    print_table(title, columns, [(f"{r['ratio']:.4f}", *r["kept"].values()) for r in rows])
