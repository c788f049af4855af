"""``edgekit serve``."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgekit.cli import options
from edgekit.cli.console import note, print_json, progress_bars
from edgekit.cli.loading import Loading, loaded, loading_options
from edgekit.cli.supervise import supervised
from edgekit.errors import UsageError

if TYPE_CHECKING:
    from edgekit.server.access import Access
    from edgekit.session import Session


@click.command()
@click.argument("artifact", type=options.FOLDER)
@loading_options
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
    loading: Loading,
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
    from edgekit.plan import DEFAULT_CONTEXT
    from edgekit.server.worker import Worker

    access = _access(host, api_key_file, budget_token_file)
    besides = server_bytes(loading.context or DEFAULT_CONTEXT)
    with (
        bind(host, port) as bound,
        progress_bars() as progress,
        loaded(artifact, loading, child, progress, runtime="llama", besides=besides) as session,
    ):
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
