"""``edgekit profile``."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgekit.cli import options
from edgekit.cli.console import note, print_json, progress_bars
from edgekit.errors import EdgekitError, UsageError
from edgekit.sizes import format_size

if TYPE_CHECKING:
    from edgekit.devices.profile import Device
    from edgekit.manifest import Json
    from edgekit.profile import Measurer
    from edgekit.progress import Progress


@click.command()
@click.argument("artifact", type=options.FOLDER)
@click.option("-o", "--output", type=options.NEW_PATH, help="File of the page, .html.")
@click.option(
    "--device",
    "names",
    multiple=True,
    help="A device (edgekit devices) or a .toml file; may be repeated. Default: all known devices.",
)
@click.option("--measure", is_flag=True, help="Probe this machine and try five budgets on it.")
@click.option(
    "--peers",
    type=options.FILE,
    help="Also show other tools' files of this model: what tests/bench/peers writes.",
)
@options.context
@options.kv_type
@options.force
@options.as_json
@options.verbose
def profile(
    artifact: Path,
    output: Path | None,
    names: tuple[str, ...],
    measure: bool,
    peers: Path | None,
    context: int | None,
    kv_type: str,
    force: bool,
    as_json: bool,
    verbose: bool,
) -> None:
    """Write one page that says what each budget of ARTIFACT buys; it needs no network.

    Quality, memory by part, bits per weight, KV cache, and for each device its depth and speed.
    --json prints the same data.

    \b
        edgekit profile llama-edge -o report.html
        edgekit profile llama-edge -o pixel.html --device pixel-8 --device pixel-6a --context 2048
    """
    from edgekit.materialize import check_output
    from edgekit.profile import profile, read_peers

    if output is None and not as_json:
        raise UsageError("give -o FILE for the page, or --json for the data")
    if output is not None:
        check_output(output, force)
    render = _renderer() if output is not None else None
    devices = _devices(names)
    with progress_bars() as progress:
        body = profile(
            artifact,
            devices,
            context=context,
            kv_type=kv_type,
            peers=read_peers(peers) if peers is not None else (),
            measured=_measurer(progress) if measure else None,
        ).as_json()
    if output is not None and render is not None:
        _write(output, render(body))
    if as_json:
        print_json(body)


def _devices(names: Sequence[str]) -> "list[Device]":
    from edgekit.devices.profile import device_names, find_device

    return [find_device(name) for name in dict.fromkeys(names or device_names())]


def _measurer(progress: "Progress") -> "Measurer":
    from edgekit.trials import measured

    return partial(measured, progress=progress)


def _renderer() -> "Callable[[Json], str]":
    try:
        from edgekit.report import render
    except ImportError as error:
        raise EdgekitError(
            f"the page needs {error.name}; pip install edgekit[report], or take --json"
        ) from error
    return render


def _write(output: Path, text: str) -> None:
    from edgekit.spool import write_atomically

    page = text.encode()
    write_atomically(output, page)
    note(f"{output}: {format_size(len(page))}, everything in it")
