"""``edgekit materialize``."""

from dataclasses import asdict
from pathlib import Path

import click

from edgekit.cli import options
from edgekit.cli.console import note, print_json
from edgekit.errors import UsageError
from edgekit.sizes import format_size


@click.command()
@click.argument("artifact", type=options.FOLDER)
@options.tier
@click.option("--budget", type=options.Size(), help="The best file for a process of this size.")
@click.option(
    "--target-size", type=options.Size(), help="The best file with at most these bytes of weights."
)
@click.option("-o", "--output", type=options.NEW_PATH, required=True, help="The GGUF to write.")
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
    output: Path,
    context: int | None,
    kv_type: str,
    force: bool,
    dry_run: bool,
    as_json: bool,
    verbose: bool,
) -> None:
    """Write an ordinary GGUF from ARTIFACT; any llama.cpp app opens it.

    \b
        edgekit materialize llama-edge --tier Q4_K -o phone.gguf
        edgekit materialize llama-edge --budget 900MiB -o phone.gguf
    """
    from edgekit.artifact import open_artifact
    from edgekit.materialize import materialize, preview
    from edgekit.plan import plan_budget, plan_tier, plan_weights

    if sum(choice is not None for choice in (tier, budget, target_size)) != 1:
        raise UsageError("say what to write: give one of --tier, --budget or --target-size")
    with open_artifact(artifact) as opened:
        if tier is not None:
            chosen = plan_tier(opened, tier)
        elif budget is not None:
            chosen = plan_budget(opened, budget, context, kv_type)
        else:
            chosen = plan_weights(opened, target_size or 0)
        if dry_run:
            made = preview(opened, chosen.depths, output)
        else:
            made = materialize(opened, chosen.depths, output, force=force)
    if as_json:
        print_json(asdict(made))
        return
    verb = "would be" if dry_run else "is"
    note(f"{made.path} {verb} {format_size(made.bytes)}; {made.seconds:.1f} s")
