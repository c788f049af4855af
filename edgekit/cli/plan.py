"""``edgekit plan``."""

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgekit.cli import options
from edgekit.cli.console import note, print_json, print_table
from edgekit.errors import UsageError
from edgekit.sizes import format_size

if TYPE_CHECKING:
    from edgekit.devices.profile import Device


@click.command()
@click.argument("artifact", type=options.FOLDER)
@options.budget_auto
@click.option("--device", help="Take the budget of a device (edgekit devices), or of a .toml file.")
@options.context
@options.kv_type
@options.as_json
@options.verbose
def plan(
    artifact: Path,
    budget: int | None,
    device: str | None,
    context: int | None,
    kv_type: str,
    as_json: bool,
    verbose: bool,
) -> None:
    """Show what ARTIFACT loads within a budget, with every byte accounted for.

    \b
        edgekit plan llama-edge --budget 1.2GiB --context 2048
        edgekit plan llama-edge --device pixel-8
    """
    from edgekit.catalog import open_catalog
    from edgekit.plan import plan_budget, plan_json
    from edgekit.speed import predict

    profile = _profile(device, budget)
    catalog = open_catalog(artifact)
    if profile is not None:
        budget = profile.budget_bytes
        note(f"budget {format_size(budget)}: {profile.name}, {profile.app_share.source}")
    elif budget is None:
        from edgekit.devices.memory import auto_budget

        found = auto_budget()
        budget = found.n_bytes
        note(f"budget {format_size(budget)}: {found.source}")
    planned = plan_budget(catalog, budget, context, kv_type)
    body = plan_json(catalog, planned)
    if profile is not None:
        body["device"] = profile.id
        body["predicted"] = asdict(predict(profile, catalog, planned))
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
    if profile is not None:
        note(_speeds(body["predicted"], body["context"]))


def _profile(name: str | None, budget: int | None) -> "Device | None":
    if name is None:
        return None
    if budget is not None:
        raise UsageError("--budget and --device both name a budget; give one")
    from edgekit.devices.profile import find_device

    return find_device(name)


def _speeds(predicted: dict[str, float], context: int) -> str:
    return (
        f"predicted: {predicted['decode_tokens_per_s']:.3g} tokens/s, "
        f"{predicted['late_tokens_per_s']:.3g} with {context} tokens before, prompts "
        f"{predicted['prompt_tokens_per_s']:.3g} tokens/s; reading the artifact takes at least "
        f"{predicted['read_seconds']:.2g} s"
    )
