"""``edgekit plan``."""

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
@options.expert_cache
@options.no_pager
@options.runtime
@options.as_json
@options.verbose
def plan(
    artifact: Path,
    budget: int | None,
    device: str | None,
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
        edgekit plan llama-edge --device pixel-8
    """
    profile, runtime = _profile(device, budget), runtime or _runtime_of(artifact)
    if runtime == "onnx":
        _refuse_llamas(kv_type=kv_type != "f16", expert_cache=expert_cache is not None)
    if profile is not None:
        budget = profile.budget_bytes
        note(f"budget {format_size(budget)}: {profile.name}, {profile.app_share.source}")
    elif budget is None:
        from edgekit.devices.memory import auto_budget

        found = auto_budget()
        budget = found.n_bytes
        note(f"budget {format_size(budget)}: {found.source}")
    if runtime == "onnx":
        body = _onnx_plan(artifact, budget, context)
    else:
        experts = {"expert_cache": expert_cache, "pager": not no_pager}
        body = _llama_plan(artifact, budget, context, kv_type, experts, profile)
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
    if body.get("experts"):
        _tell_experts(body["experts"])
    kl = body["expected_kl"]
    quality = (
        f"expected KL to the source {kl:.4g}" if kl is not None else "quality was not measured"
    )
    note(f"{body['bits_per_weight']:.2f} bits per weight; {quality}")
    if "predicted" in body:
        note(_speeds(body["predicted"], body["context"]))


def _runtime_of(artifact: Path) -> str:
    from edgekit.catalog import runtime_of

    return runtime_of(artifact)


def _refuse_llamas(**given: bool) -> None:
    from edgekit.wish import refuse_llamas

    refuse_llamas(**given)


def _onnx_plan(artifact: Path, budget: int, context: int | None) -> dict[str, Any]:
    from edgekit.exporters.onnx_store import DEPTHS
    from edgekit.onnx.artifact import OnnxArtifact, described
    from edgekit.onnx.plan import onnx_plan_json, plan_onnx
    from edgekit.onnx_part import FOLDER

    manifest, part = described(artifact)
    is_here = (artifact / FOLDER).exists()  # else only the manifest is: all depths can be had
    depths = OnnxArtifact(artifact, manifest, part).depths if is_here else DEPTHS
    return onnx_plan_json(part, plan_onnx(part, budget, context, depths=depths))


def _llama_plan(
    artifact: Path,
    budget: int,
    context: int | None,
    kv_type: str,
    experts: dict[str, Any],
    profile: "Device | None",
) -> dict[str, Any]:
    from edgekit.catalog import open_catalog
    from edgekit.expert_plan import plan_any
    from edgekit.plan import plan_json

    catalog = open_catalog(artifact)
    planned = plan_any(catalog, budget, context, kv_type, **experts)
    body = plan_json(catalog, planned)
    if profile is not None:
        from edgekit.speed import predict

        body["device"] = profile.id
        body["predicted"] = asdict(predict(profile, catalog, planned))
    return body


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
