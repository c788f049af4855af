"""``edgekit run``."""

import contextlib
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgekit.cli import options
from edgekit.cli.console import note, print_json, progress_bars
from edgekit.cli.loading import Loading, loaded, loading_options
from edgekit.cli.supervise import supervised
from edgekit.errors import EdgekitError, RefusedError, UsageError

if TYPE_CHECKING:
    from edgekit.llama import Generation
    from edgekit.session import Session


@click.command()
@click.argument("artifact", type=options.FOLDER)
@click.option(
    "-p", "--prompt", help="Text to continue, - reads it from stdin; without it, a conversation."
)
@click.option(
    "-n",
    "--n-tokens",
    type=click.IntRange(min=0),
    default=128,
    show_default=True,
    help="Tokens at most.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(0, 100),
    default=0.8,
    show_default=True,
    help="0: the likeliest token.",
)
@click.option("--seed", type=click.IntRange(0, 2**32 - 2), default=0, show_default=True)
@click.option("--stop", multiple=True, help="Text that ends the answer; may be repeated.")
@click.option("--ignore-eos", is_flag=True, help="Go on behind the token that ends a text.")
@click.option(
    "--raw", is_flag=True, help="Continue the prompt as it is, without the chat template."
)
@loading_options
@options.runtime
@click.option(
    "--state",
    type=options.NEW_PATH,
    help="With -p: go on from the conversation in this file where it exists, and write it there at "
    "the end, also when an error ends it.",
)
@options.as_json
@options.verbose
def run(
    artifact: Path,
    prompt: str | None,
    n_tokens: int,
    temperature: float,
    seed: int,
    stop: tuple[str, ...],
    ignore_eos: bool,
    raw: bool,
    loading: Loading,
    runtime: str | None,
    state: Path | None,
    as_json: bool,
    verbose: bool,
) -> None:
    """Load ARTIFACT at the depth that fits the budget; continue a prompt, or hold a conversation.

    In a conversation, /budget 900MiB changes the depth and /help tells the other commands. While it
    runs, signal USR1 halves the budget and USR2 brings the first one back.

    \b
        edgekit run llama-edge --budget 1.2GiB -p "Once upon a time" -n 64
        edgekit run llama-edge --runtime onnx --budget 1.2GiB -p "Once upon a time"
    """
    if state is not None and prompt is None:
        raise UsageError("--state keeps the conversation of one prompt; give it with -p")
    if as_json and prompt is None:
        raise UsageError("--json answers one prompt; give it with -p")
    if state is not None and state.exists() and not state.is_file():
        raise UsageError(f"{state} is no plain file; give another --state")
    if state is not None and not state.absolute().parent.is_dir():
        raise UsageError(f"{state.parent} is no folder; make it first, or give another --state")
    text = _from_stdin() if prompt == "-" else prompt
    child = supervised()
    from edgekit.catalog import runtime_of
    from edgekit.cli.chat import Chat
    from edgekit.llama import Sampling

    if state is not None and (runtime or runtime_of(artifact)) != "llama":
        raise UsageError("--state keeps what llama.cpp holds; leave it out with --runtime onnx")
    sampling = Sampling(temperature, seed, ignore_eos=ignore_eos)
    with (
        progress_bars() as progress,
        loaded(artifact, loading, child, progress, runtime=runtime) as session,
    ):
        if text is None:
            Chat(session, n_tokens, sampling, raw, stop).run()
            return
        with _kept(session, state) as more:
            generation = session.generate(text, n_tokens, sampling, chat=not raw, stop=stop, **more)
            pieces = list(_shown(generation, as_json))
            if state is not None:
                _take_last(session, generation)
        if as_json:
            print_json(_report(session, generation, "".join(pieces)))
        else:
            _tell_times(generation)


def _from_stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise RefusedError(
            f"the prompt on stdin is not UTF-8 (byte {error.start}); convert it first"
        ) from error


@contextmanager
def _kept(session: "Session", state: Path | None) -> Iterator[dict[str, Any]]:
    """Go on from the conversation in the file ``state`` and write it there at the end.

    Yields:
        What `generate` must know then.
    """
    if state is None:
        yield {}
        return
    is_old = state.exists()
    if is_old:
        session.restore(state)
    try:
        yield {"after": is_old}
    except BaseException:
        with contextlib.suppress(EdgekitError, OSError):  # the first error is the one to tell
            session.save(state)
        raise
    session.save(state)


def _take_last(session: "Session", generation: "Generation") -> None:
    """Decode the last token where the text was cut off: it is drawn, but not in the context."""
    context = session.context
    if generation.stopped == "length" and generation.ids and len(context.tokens) < context.n_ctx:
        context.decode(generation.ids[-1:], "none")


def _shown(pieces: Iterable[str], is_quiet: bool) -> Iterator[str]:
    """Print pieces as they come."""
    for piece in pieces:
        if not is_quiet:
            click.echo(piece, nl=False)
        yield piece


def _tell_times(generation: "Generation") -> None:
    times = generation.timings
    click.echo()
    note(
        f"{times.n_prompt} prompt tokens at {times.prompt_tokens_per_second:.1f}/s, "
        f"{times.n_gen} tokens at {times.gen_tokens_per_second:.1f}/s"
    )


def _paging(session: "Session") -> dict[str, Any] | None:
    """Counts of experts on demand."""
    stats = session.paging
    return None if stats is None else asdict(stats) | {"hit_rate": round(stats.hit_rate, 4)}


def _report(session: "Session", generation: "Generation", text: str) -> dict[str, Any]:
    from edgekit.devices.memory import peak_rss_bytes

    times = generation.timings
    return {
        "text": text,
        "n_prompt": times.n_prompt,
        "n_gen": times.n_gen,
        "stopped": generation.stopped,
        "prompt_tokens_per_second": round(times.prompt_tokens_per_second, 2),
        "gen_tokens_per_second": round(times.gen_tokens_per_second, 2),
        "load_seconds": round(session.load_seconds, 3),
        "peak_rss_bytes": peak_rss_bytes(),
        "experts": _paging(session),
        "changes": [asdict(change) for change in session.changes],
        "plan": session.plan_json(),
    }
