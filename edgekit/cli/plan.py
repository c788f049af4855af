"""``edgekit plan``."""

from collections import Counter
from pathlib import Path

import click

from edgekit.cli import options
from edgekit.cli.console import note, print_json, print_table
from edgekit.sizes import format_size


@click.command()
@click.argument("artifact", type=options.FOLDER)
@options.budget_auto
@options.context
@options.kv_type
@options.runtime
@options.as_json
@options.verbose
def plan(
    artifact: Path,
    budget: int | None,
    context: int | None,
    kv_type: str,
    runtime: str | None,
    as_json: bool,
    verbose: bool,
) -> None:
    """Show what ARTIFACT loads within a budget, with every byte accounted for.

    \b
        edgekit plan llama-edge --budget 1.2GiB --context 2048
    """
    from edgekit.catalog import open_catalog
    from edgekit.loader import runtime_of
    from edgekit.onnx_plan import onnx_plan_json, open_part, plan_onnx
    from edgekit.plan import plan_budget, plan_json

    if budget is None:
        from edgekit.devices.memory import auto_budget

        found = auto_budget()
        budget = found.n_bytes
        note(f"budget {format_size(budget)}: {found.source}")
    if (runtime or runtime_of(artifact)) == "onnx":
        part = open_part(artifact)
        body = onnx_plan_json(part, plan_onnx(part, budget, context))
    else:
        catalog = open_catalog(artifact)
        body = plan_json(catalog, plan_budget(catalog, budget, context, kv_type))
    if as_json:
        print_json(body)
        return
    parts = ("weights", "kv", "compute", "overhead", "total", "budget")
    rows = [(part, format_size(body[f"{part}_bytes"])) for part in parts]
    print_table(f"Plan for {artifact}, context {body['context']}", ("part", "bytes"), rows)
    weights: Counter[str] = Counter()
    for tensor in body["tensors"]:
        weights[tensor["tier"]] += tensor["bytes"]
    tiers = [(tier, format_size(n)) for tier, n in weights.most_common()]
    print_table("Weights by tier", ("tier", "bytes"), tiers)
    kl = body["expected_kl"]
    quality = (
        f"expected KL to the source {kl:.4g}" if kl is not None else "quality was not measured"
    )
    note(f"{body['bits_per_weight']:.2f} bits per weight; {quality}")
