"""``edgekit eval``."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from edgekit.cli import options
from edgekit.cli.console import print_json, print_table
from edgekit.errors import UsageError


@click.command(name="eval")
@click.argument("model", type=options.ANY_PATH)
@options.tier
@click.option("--budget", type=options.Size(), help="Evaluate the plan for this budget.")
@click.option("--reference", type=options.ANY_PATH, help="GGUF or checkpoint to compare with.")
@click.option(
    "--text",
    type=options.FILE,
    required=True,
    help="Text that was not calibrated on; its first 4 MiB count.",
)
@click.option(
    "--runtime",
    type=click.Choice(["llama", "torch", "onnx"]),  # RUNTIMES of edgekit.measure, and onnx
    default="llama",
    show_default=True,
    help="What runs MODEL.",
)
@click.option("--device", default="cpu", show_default=True, help="Where it runs.")
@click.option(
    "--context",
    type=click.IntRange(min=2),
    default=512,
    show_default=True,
    help="Tokens per chunk.",
)
@options.as_json
@options.verbose
def evaluate(
    model: Path,
    tier: str | None,
    budget: int | None,
    reference: Path | None,
    text: Path,
    runtime: str,
    device: str,
    context: int,
    as_json: bool,
    verbose: bool,
) -> None:
    """Perplexity of MODEL (artifact or GGUF) on a text, and its KL divergence to a reference.

    An artifact is evaluated at its highest depth, at --tier or at --budget; without --reference it
    is compared with its own highest depth.

    \b
        edgekit eval llama-edge --tier Q4_K --text heldout.txt
        edgekit eval phone.gguf --reference source.gguf --text heldout.txt
        edgekit eval llama-edge --runtime onnx --text heldout.txt --reference ./Llama-3.2-1B
    """
    from edgekit.measure import evaluate_path

    if tier is not None and budget is not None:
        raise UsageError("--tier and --budget exclude each other; give one")
    common: dict[str, Any] = {
        "tier": tier,
        "budget": budget,
        "reference": reference,
        "context": context,
    }
    if runtime == "onnx":
        if device != "cpu":
            raise UsageError(f"ONNX Runtime runs on the CPU here, not on {device}; drop --device")
        from edgekit.onnx.evaluate import evaluate_onnx

        found = evaluate_onnx(model, text, **common)
    else:
        found = evaluate_path(model, text, **common, runtime=runtime, device=device)
    quality = asdict(found)
    if as_json:
        print_json(quality)
        return
    rows = [(key, "-" if value is None else f"{value:.6g}") for key, value in quality.items()]
    print_table(str(model), ("figure", "value"), rows)
