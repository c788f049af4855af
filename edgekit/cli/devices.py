"""``edgekit devices`` and ``edgekit devices probe``."""

from dataclasses import asdict
from pathlib import Path

import click

from edgekit.cli import options
from edgekit.cli.console import note, print_json, print_table, progress_bars
from edgekit.errors import UsageError
from edgekit.sizes import format_size


@click.group(invoke_without_command=True)
@options.as_json
@options.verbose
@click.pass_context
def devices(ctx: click.Context, as_json: bool, verbose: bool) -> None:
    """List the devices that --device takes; probe measures this machine and writes its profile.

    \b
        edgekit devices --json
    """
    if ctx.invoked_subcommand is not None:
        if as_json:
            raise UsageError("--json stands before probe; give it behind")
        return
    from edgekit.devices.profile import device_names, find_device

    known = [find_device(name) for name in device_names()]
    if as_json:
        print_json({"devices": [asdict(d) | {"budget_bytes": d.budget_bytes} for d in known]})
        return
    rows = [
        (
            device.id,
            format_size(device.total_memory_bytes.value),
            format_size(device.budget_bytes),
            f"{device.memory_bytes_per_s.value / 1e9:.0f} GB/s",
            f"{device.storage_bytes_per_s.value / 1e9:.2g} GB/s",
            f"{device.cores.value:.0f}",
            device.system,
        )
        for device in known
    ]
    columns = ("device", "memory", "budget", "memory speed", "storage speed", "cores", "system")
    print_table("Devices", columns, rows)


@devices.command()
@click.option(
    "-o", "--output", type=options.NEW_PATH, help="File of the profile, .toml; default: stdout."
)
@options.force
@click.option("--threads", type=click.IntRange(1, 512), help="Threads; default: physical cores.")
@options.as_json
@options.verbose
def probe(
    output: Path | None, force: bool, threads: int | None, as_json: bool, verbose: bool
) -> None:
    """Measure this machine: memory, storage, and what llama.cpp makes of them; three minutes.

    The profile says what is free now and how fast each ggml type decodes and reads prompts here.
    Give it to --device. Close other programs before.

    \b
        edgekit devices probe -o this-machine.toml
    """
    if output is not None and output.suffix != ".toml":
        raise UsageError(f"{output} does not end in .toml, by which --device knows a file")
    from edgekit.devices.profile import as_toml
    from edgekit.materialize import check_output
    from edgekit.probe import probe as measure
    from edgekit.spool import write_atomically

    if output is not None:
        check_output(output, force)
    folder = output.parent if output is not None else Path()
    name = output.stem if output is not None else "this-machine"
    with progress_bars() as progress:
        device = measure(folder, name, progress, threads)
    if output is not None:
        write_atomically(output, as_toml(device).encode())
    if as_json:
        print_json(asdict(device) | {"budget_bytes": device.budget_bytes})
    elif output is None:
        click.echo(as_toml(device), nl=False)
    rates = (device.memory_bytes_per_s, device.storage_bytes_per_s, device.decode_bytes_per_s)
    memory, storage, weights = (f"{rate.value / 1e9:.3g} GB/s" for rate in rates)
    note(
        f"{device.processor}: memory {memory}, storage {storage} cold, weights {weights}, "
        f"budget {format_size(device.budget_bytes)}"
    )
