"""``edgekit run``."""

import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgekit.cli import options
from edgekit.cli.console import note, print_json, progress_bars
from edgekit.cli.supervise import supervised
from edgekit.errors import UsageError
from edgekit.sizes import format_size

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
@options.budget_auto
@options.context
@options.kv_type
@options.residency
@options.follow
@options.repack
@options.expert_cache
@options.no_pager
@click.option(
    "--prefetch",
    type=click.Choice(["off", "gate", "table"]),
    default="off",
    show_default=True,
    help="Guess experts of the next layer, by its router or by the trace, and read them ahead.",
)
@click.option(
    "--state",
    type=options.NEW_PATH,
    help="With -p: go on from the conversation in this file where it exists, and write it there at "
    "the end, also when an error ends it.",
)
@options.threads
@options.runtime
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
    budget: int | None,
    context: int | None,
    kv_type: str,
    residency: Any,
    follow: bool,
    repack: bool,
    expert_cache: int | None,
    no_pager: bool,
    prefetch: Any,
    state: Path | None,
    threads: int | None,
    runtime: str | None,
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
    child = supervised()
    from edgekit.cli.chat import Chat
    from edgekit.devices.memory import auto_budget
    from edgekit.llama import Sampling
    from edgekit.loader import load, runtime_of

    runtime = runtime or runtime_of(artifact)
    if state is not None and runtime != "llama":
        raise UsageError(f"--state keeps what llama.cpp holds; leave it out with {runtime}")
    if budget is None:
        found = auto_budget()
        note(f"budget {format_size(found.n_bytes)}: {found.source}")
    sampling = Sampling(temperature, seed, ignore_eos=ignore_eos)
    with (
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
            expert_cache,
            not no_pager,
            prefetch,
            progress,
            runtime=runtime,
        ) as session,
    ):
        child.needs(session.plan.total_bytes, session.plan.budget_bytes or 0)
        obey_signals(session)
        tell_loaded(session)
        if prompt is None:
            Chat(session, n_tokens, sampling, raw, stop).run()
            return
        text = sys.stdin.read() if prompt == "-" else prompt
        more: dict[str, Any] = {"after": True} if _restored(session, state) else {}
        pieces = []
        try:
            generation = session.generate(text, n_tokens, sampling, chat=not raw, stop=stop, **more)
            for piece in generation:
                pieces.append(piece)
                if not as_json:
                    click.echo(piece, nl=False)
        finally:
            if state is not None:
                session.save(state)
        if as_json:
            print_json(_report(session, generation, "".join(pieces)))
        else:
            _tell_times(generation)


def obey_signals(session: "Session") -> None:
    """USR1 halves the budget, USR2 brings the first one back; Windows has neither."""
    first = session.plan.budget_bytes or session.plan.total_bytes

    def halve(number: int, frame: object) -> None:
        session.request((session.plan.budget_bytes or first) // 2)

    def restore(number: int, frame: object) -> None:
        session.request(first)

    for name, handler in (("SIGUSR1", halve), ("SIGUSR2", restore)):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), handler)


def _restored(session: "Session", state: Path | None) -> bool:
    """Whether a conversation was there to go on from."""
    if state is None or not state.exists():
        return False
    session.restore(state)
    return True


def tell_loaded(session: "Session") -> None:
    """One line about what was loaded."""
    plan = session.plan
    note(
        f"loaded {format_size(plan.weights_bytes)} of weights at "
        f"{plan.bits_per_weight:.2f} bits per weight in {session.load_seconds:.2f} s; "
        f"total {format_size(plan.total_bytes)} planned"
    )


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
