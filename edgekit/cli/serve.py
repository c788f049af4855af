"""``edgekit serve``."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgekit.cli import options
from edgekit.cli.console import note, print_json, progress_bars
from edgekit.cli.run import obey_signals, tell_loaded
from edgekit.cli.supervise import supervised
from edgekit.errors import UsageError
from edgekit.sizes import format_size

if TYPE_CHECKING:
    from edgekit.server.access import Access
    from edgekit.session import Session


@click.command()
@click.argument("artifact", type=options.FOLDER)
@options.budget_auto
@options.context
@options.kv_type
@options.residency
@options.follow
@options.repack
@options.threads
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8080,
    show_default=True,
    help="0 takes one that is free.",
)
@click.option(
    "--api-key-file",
    type=options.FILE,
    help="File with the key that /v1 asks for; else EDGEKIT_API_KEY; without either, none.",
)
@click.option(
    "--budget-token-file",
    type=options.FILE,
    help="File with the token that /budget asks for; else EDGEKIT_BUDGET_TOKEN; else a new one.",
)
@options.as_json
@options.verbose
def serve(
    artifact: Path,
    budget: int | None,
    context: int | None,
    kv_type: str,
    residency: Any,
    follow: bool,
    repack: bool,
    threads: int | None,
    host: str,
    port: int,
    api_key_file: Path | None,
    budget_token_file: Path | None,
    as_json: bool,
    verbose: bool,
) -> None:
    """Answer OpenAI's API for ARTIFACT at the depth that fits the budget.

    Clients set base_url to http://127.0.0.1:8080/v1. Signal TERM finishes what was asked and ends;
    USR1 halves the budget and USR2 brings the first one back; so does a POST to /budget.

    \b
        edgekit serve llama-edge --budget 1.2GiB --port 8080
    """
    child = supervised()
    try:
        from edgekit.server.app import make_app
        from edgekit.server.bodies import server_bytes
        from edgekit.server.listen import bind, listen, url_of
    except ImportError as error:
        raise UsageError(f"serving needs more ({error}); pip install 'edgekit[serve]'") from error
    from edgekit.devices.memory import auto_budget
    from edgekit.loader import load
    from edgekit.plan import DEFAULT_CONTEXT
    from edgekit.server.worker import Worker

    access = _access(host, api_key_file, budget_token_file)
    if budget is None:
        found = auto_budget()
        note(f"budget {format_size(found.n_bytes)}: {found.source}")
    with (
        bind(host, port) as bound,
        progress_bars() as progress,
        load(
            artifact,
            budget,
            context,
            kv_type,
            threads,
            residency,
            follow,
            repack,
            progress=progress,
            besides=server_bytes(context or DEFAULT_CONTEXT),
        ) as session,
    ):
        child.needs(session.plan.total_bytes, session.plan.budget_bytes or 0)
        obey_signals(session)
        tell_loaded(session)
        worker = Worker(session, progress)
        worker.start()
        try:
            url = url_of(bound)
            listen(make_app(worker, access), bound, lambda: _tell_ready(session, url, as_json))
        finally:
            worker.stop()


def _access(host: str, api_key_file: Path | None, budget_token_file: Path | None) -> "Access":
    """The secrets; a new token for the budget is told once, here."""
    from edgekit.server import access

    key = access.read_secret(api_key_file, access.API_KEY)
    token = access.read_secret(budget_token_file, access.BUDGET_TOKEN)
    if token is None:
        token = access.new_secret()
        note(f"token for /budget: {token}")
    if key is None and not access.is_loopback(host):
        note(f"anyone who reaches {host} may use the model; give it a key with --api-key-file")
    return access.Access(host, token, key)


def _tell_ready(session: "Session", url: str, as_json: bool) -> None:
    plan, name = session.plan, session.artifact.manifest.name
    note(f"serving {name} at {url}/v1")
    if as_json:
        body = {"url": url, "model": name, "pid": os.getpid()}
        print_json(body | {"total_bytes": plan.total_bytes, "context": plan.context})
