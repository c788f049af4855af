"""``edgekit run``."""

import sys
from pathlib import Path

import click

from edgekit.cli import options
from edgekit.cli.console import note, print_json
from edgekit.sizes import format_size


@click.command()
@click.argument("artifact", type=options.FOLDER)
@click.option("-p", "--prompt", default="", help="Text to continue; read from stdin when it is -.")
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
@click.option(
    "--raw", is_flag=True, help="Continue the prompt as it is, without the chat template."
)
@options.budget_auto
@options.context
@options.kv_type
@click.option("--threads", type=click.IntRange(1, 1024), help="Threads; default: all cores.")
@options.as_json
@options.verbose
def run(
    artifact: Path,
    prompt: str,
    n_tokens: int,
    temperature: float,
    seed: int,
    raw: bool,
    budget: int | None,
    context: int | None,
    kv_type: str,
    threads: int | None,
    as_json: bool,
    verbose: bool,
) -> None:
    """Load ARTIFACT at the depth that fits the budget and continue a prompt.

    \b
        edgekit run llama-edge --budget 1.2GiB -p "Once upon a time" -n 64
    """
    from edgekit.artifact import open_artifact
    from edgekit.llama import Sampling
    from edgekit.loader import auto_budget, load, peak_rss_bytes
    from edgekit.plan import plan_json

    if budget is None:
        found = auto_budget()
        budget = found.n_bytes
        note(f"budget {format_size(budget)}: {found.source}")
    text = sys.stdin.read() if prompt == "-" else prompt
    with load(artifact, budget, context, kv_type, threads) as session:
        plan = session.plan
        note(
            f"loaded {format_size(plan.depths.weights_bytes)} of weights at "
            f"{plan.bits_per_weight:.2f} bits per weight in {session.load_seconds:.2f} s; "
            f"total {format_size(plan.total_bytes)} planned"
        )
        generation = session.generate(text, n_tokens, Sampling(temperature, seed), chat=not raw)
        pieces = []
        for piece in generation:
            pieces.append(piece)
            if not as_json:
                click.echo(piece, nl=False)
        times = generation.timings
        if not as_json:
            click.echo()
            note(
                f"{times.n_prompt} prompt tokens at {times.prompt_tokens_per_second:.1f}/s, "
                f"{times.n_gen} tokens at {times.gen_tokens_per_second:.1f}/s"
            )
            return
        with open_artifact(artifact) as opened:
            body = plan_json(opened, plan)
        print_json(
            {
                "text": "".join(pieces),
                "n_prompt": times.n_prompt,
                "n_gen": times.n_gen,
                "prompt_tokens_per_second": round(times.prompt_tokens_per_second, 2),
                "gen_tokens_per_second": round(times.gen_tokens_per_second, 2),
                "load_seconds": round(session.load_seconds, 3),
                "peak_rss_bytes": peak_rss_bytes(),
                "plan": body,
            }
        )
