"""A profile with everything that a page can have, of an artifact whose quality is made up."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from edgekit.catalog import open_catalog, read_manifest
from edgekit.devices.profile import Figure, device_names, find_device
from edgekit.manifest import MANIFEST_NAME, dumps
from edgekit.plan import least_bytes, plan_budget
from edgekit.profile import profile
from edgekit.trial import Trial
from edgekit.trials import attempt_of, checks

HOSTILE = "<script>alert(1)</script>&\"'"
CURVES = [
    {"policy": "lru", "experts_per_layer": [1, 2, 4], "hit_rate": [0.25, 0.61, 1.0]},
    {"policy": "belady", "experts_per_layer": [1, 2, 4], "hit_rate": [0.3, 0.7, 1.0]},
]
EXPERTS = {"n_experts": 4, "n_used": 1, "hit_curves": CURVES, "verdict": "benefit: a cache of 2"}
MORE = {"histogram": [[1]], "recommended": {"experts_per_layer": 2}}  # what the page does not show
PEERS = (
    {"tool": HOSTILE, "name": "Q4", "weights_bytes": 700_000, "kl_mean": 0.02},
    {"tool": "llama.cpp", "name": "Q4_K_M", "weights_bytes": 800_000, "kl_mean": 0.01},
)


def with_facts(artifact: Path, folder: Path, **facts: Any) -> Path:
    """A folder with the manifest of ``artifact`` and other facts in it."""
    folder.mkdir()
    manifest = replace(read_manifest(artifact), **facts)
    (folder / MANIFEST_NAME).write_text(dumps(manifest))
    return folder


def measured_quality(artifact: Path) -> tuple[dict[str, Any], ...]:
    """Rows as ``convert`` measures them, of made-up quality."""
    catalog = open_catalog(artifact)
    sizes = [row.weights_bytes for row in profile(artifact, []).tiers]
    return tuple(
        {
            "weights_bytes": n,
            "bits_per_weight": round(8 * n / catalog.manifest.n_parameters, 4),
            "n_tokens": 4080,
            "kl_mean": 0.1 / 4**i if i < len(sizes) - 1 else 0.0,
            "kl_error": 0.001,
            "kl_p99": 0.5,
            "top1_agreement": 0.9 + i / 100,
            "ppl": 60.0 - i,
            "ref_ppl": 53.5,
        }
        for i, n in enumerate(sizes)
    )


def with_quality(artifact: Path, folder: Path) -> Path:
    return with_facts(artifact, folder, quality=measured_quality(artifact))


def full_body(artifact: Path) -> Any:
    """Of the data of a page: a device that nothing fits on is among it."""
    devices = [find_device(name) for name in device_names()[:3]]
    share = replace(devices[0].app_share, value=0.001)
    small = Figure(1 << 22, "measured", "a probe")
    devices.append(replace(devices[0], name="A watch", app_share=share, small_bytes=small))
    catalog = open_catalog(artifact)
    plans = [plan_budget(catalog, least_bytes(catalog, 512) << i, 512) for i in range(3)]
    trials = [trial(plan.budget_bytes or 0, 500.0 - 100 * i) for i, plan in enumerate(plans)]
    rows = zip(plans, trials, strict=True)
    found = checks([attempt_of(catalog, plan, trial, devices[0]) for plan, trial in rows])
    told = {"device": {}, "n_prompt": 256, "n_tokens": 48, "checks": [vars_of(c) for c in found]}
    made = profile(artifact, devices, context=512, peers=PEERS, measured=lambda *_: told)
    return replace(made, experts=EXPERTS).as_json()


def trial(budget: int, rate: float) -> Trial:
    return Trial(budget, budget - 5, budget - 9, 0.5, 2 * rate, rate, budget // 2, 0.1, 0.2)


def vars_of(check: Any) -> dict[str, Any]:
    return {**vars(check), "trial": vars(check.trial)}
