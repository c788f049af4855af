"""``edgekit trace``."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgekit.cli import options
from edgekit.cli.console import note, print_json, progress_bars
from edgekit.cli.experts import print_experts
from edgekit.errors import UsageError

if TYPE_CHECKING:
    from edgekit.routing.trace import Trace


@click.command()
@click.argument("model", type=options.ANY_PATH)
@click.option(
    "--text",
    type=options.FILE,
    help="UTF-8 text, of which the first 4 MiB count; default: one that ships with edgekit.",
)
@click.option("-o", "--output", type=options.NEW_PATH, required=True, help="File of the trace.")
@click.option(
    "--chunks",
    type=click.IntRange(1, 4096),
    default=16,
    show_default=True,
    help="Sequences of 512 tokens at most.",
)
@options.tier
@options.force
@options.as_json
@options.verbose
def trace(
    model: Path,
    text: Path | None,
    output: Path,
    chunks: int,
    tier: str | None,
    force: bool,
    as_json: bool,
    verbose: bool,
) -> None:
    """Write down which experts the routers of MODEL choose, and tell what a cache would do.

    MODEL is a checkpoint, run by transformers; an artifact (at its highest tier, or at --tier) or a
    GGUF, listened to in llama.cpp; or a trace that is there already, also one of JSON lines with
    layer, token_idx, experts and gating_probs.

    \b
        edgekit trace moe-edge --text my.txt -o my.trace
    """
    from edgekit.materialize import check_output
    from edgekit.routing.summary import summarize
    from edgekit.routing.trace import write_trace

    check_output(output, force)
    with progress_bars() as progress:
        found = _traced(model, text, tier, chunks, progress)
    write_trace(found, output)
    body = summarize(found)
    if as_json:
        print_json({"path": str(output), "bytes": output.stat().st_size} | body)
        return
    print_experts(body)


def _traced(
    model: Path, text: Path | None, tier: str | None, chunks: int, progress: Any
) -> "Trace":
    from edgekit.artifact import open_artifact
    from edgekit.assembly import Assembly
    from edgekit.checkpoint import Checkpoint
    from edgekit.manifest import MANIFEST_NAME
    from edgekit.measure import highest_depths
    from edgekit.plan import plan_tier
    from edgekit.routing.trace import read_trace
    from edgekit.tracing import trace_checkpoint, trace_model

    is_artifact = model.is_dir() and (model / MANIFEST_NAME).is_file()
    if tier is not None and not is_artifact:
        raise UsageError(f"--tier is for artifacts, {model} is none; leave it out")
    if model.is_dir() and not is_artifact:
        checkpoint = Checkpoint.open(model)
        return trace_checkpoint(checkpoint, text, max_chunks=chunks, progress=progress)
    if not is_artifact and not _is_gguf(model):
        if text is not None:
            raise UsageError(f"{model} is replayed as a trace, as it is; leave --text out")
        note(f"{model}: replayed as a trace")
        return read_trace(model)
    if not is_artifact:
        return trace_model(model, text, max_chunks=chunks, name=model.name, progress=progress)
    with open_artifact(model) as artifact:
        depths = plan_tier(artifact, tier).depths if tier else highest_depths(artifact)
        with Assembly(artifact, depths) as source:
            name = artifact.manifest.name
            found = trace_model(source, text, max_chunks=chunks, name=name, progress=progress)
    return replace(found, provenance=found.provenance | {"tier": tier or "highest"})


def _is_gguf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"
