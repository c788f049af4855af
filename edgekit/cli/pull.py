"""``edgekit pull``."""

from dataclasses import asdict
from pathlib import Path

import click

from edgekit.cli import options
from edgekit.cli.console import note, print_json, progress_bars
from edgekit.errors import UsageError
from edgekit.sizes import format_size


@click.command()
@click.argument("url", required=False)
@click.option("-o", "--output", type=options.NEW_PATH, required=True, help="The artifact's folder.")
@options.budget_auto
@options.context
@options.kv_type
@click.option(
    "--grow",
    is_flag=True,
    help="Fetch more of an artifact that is here; URL may be left out.",
)
@options.force
@options.dry_run
@options.as_json
@options.verbose
def pull(
    url: str | None,
    output: Path,
    budget: int | None,
    context: int | None,
    kv_type: str,
    grow: bool,
    force: bool,
    dry_run: bool,
    as_json: bool,
    verbose: bool,
) -> None:
    """Fetch the artifact whose folder is at URL, as deep as a budget needs.

    URL is http, https or file. What was cut off goes on with the same command.

    \b
        edgekit pull https://example.org/llama-edge -o phone-edge --budget 1.2GiB
    """
    from edgekit.devices.memory import auto_budget
    from edgekit.pull import Wish
    from edgekit.pull import pull as fetch

    if url is None and not grow:
        raise UsageError("say where the artifact is: give a URL")
    if budget is None:
        found = auto_budget()
        budget = found.n_bytes
        note(f"budget {format_size(budget)}: {found.source}")
    wish = Wish(budget, context, kv_type, grow, force, dry_run)
    with progress_bars() as progress:
        pulled = fetch(url, output, wish, progress)
    if as_json:
        print_json(asdict(pulled))
        return
    if not dry_run:
        came = f"{format_size(pulled.transferred_bytes)} came in {pulled.seconds:.1f} s"
        note(f"{output} has {format_size(pulled.total_bytes)}; {came}")
    note(f"licence of the model: {pulled.license or 'not stated by its source'}")
