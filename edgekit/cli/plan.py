"""``edgekit plan``."""

from collections import Counter
from pathlib import Path
from typing import Any

import click

from edgekit.cli import options
from edgekit.cli.console import note, print_json, print_table
from edgekit.sizes import format_size


@click.command()
@click.argument("artifact", type=options.FOLDER)
@options.budget_auto
@options.context
@options.kv_type
@options.expert_cache
@options.no_pager
@options.runtime
@options.as_json
@options.verbose
def plan(
    artifact: Path,
    budget: int | None,
    context: int | None,
    kv_type: str,
    expert_cache: int | None,
    no_pager: bool,
    runtime: str | None,
    as_json: bool,
    verbose: bool,
) -> None:
    """Show what ARTIFACT loads within a budget, with every byte accounted for.

    \b
        edgekit plan llama-edge --budget 1.2GiB --context 2048
    """
    from edgekit.catalog import open_catalog
    from edgekit.expert_plan import plan_any
    from edgekit.loader import runtime_of
    from edgekit.onnx_plan import onnx_plan_json, open_part, plan_onnx
    from edgekit.plan import plan_json

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
        found_plan = plan_any(
            catalog, budget, context, kv_type, expert_cache=expert_cache, pager=not no_pager
        )
        body = plan_json(catalog, found_plan)
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
    if body["experts"]:
        _tell_experts(body["experts"])
    kl = body["expected_kl"]
    quality = (
        f"expected KL to the source {kl:.4g}" if kl is not None else "quality was not measured"
    )
    note(f"{body['bits_per_weight']:.2f} bits per weight; {quality}")


def _tell_experts(experts: dict[str, Any]) -> None:
    """What of the experts is resident, and what a token is expected to read."""
    rate, n_bytes = experts["expected_hit_rate"], experts["bytes_read_per_token"]
    expected = (
        f"expected hit rate {rate:.0%}, {format_size(n_bytes)} read per token"
        if rate is not None
        else "no trace tells the hit rate"
    )
    pool, whole = format_size(experts["pool_bytes"]), format_size(experts["experts_bytes"])
    note(
        f"{experts['experts_per_layer']} of {experts['n_experts']} experts per layer are resident: "
        f"{pool} of {whole}; {expected}"
    )
