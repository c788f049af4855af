"""Budgets tried on this machine, beside what was predicted for them: `edgekit profile --measure`.

The machine is probed first. Its profile predicts what weights and attention cost; what a token of
this model costs beyond that (norms, routing, small matrices) is measured at the smallest budget and
taken as the same at all others: those are predictions, the first row is not.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from edgekit.catalog import Catalog
from edgekit.devices.profile import Device
from edgekit.manifest import Json
from edgekit.plan import Plan
from edgekit.progress import Progress
from edgekit.speed import prompt_seconds, token_seconds, work_of
from edgekit.trial import N_PROMPT, N_TOKENS, Trial, try_budget

N_TRIALS = 5


@dataclass(frozen=True)
class Check:
    """A budget: what was predicted, and what was measured.

    Attributes:
        trial: What was measured.
        is_fitted: The speeds of this row were used to predict the others.
        decode_tokens_per_s: Predicted.
        prompt_tokens_per_s: Predicted.
    """

    trial: Trial
    is_fitted: bool
    decode_tokens_per_s: float
    prompt_tokens_per_s: float


def measured(catalog: Catalog, plans: Sequence[Plan], device: Device, progress: Progress) -> Json:
    """Try `N_TRIALS` of ``plans``; ``device`` is this machine, probed.

    Raises:
        EdgekitError: A trial failed.
    """
    last = len(plans) - 1
    chosen = [plans[i] for i in dict.fromkeys(round(k * last / (N_TRIALS - 1)) for k in range(5))]
    progress.start("measure", len(chosen))
    trials = []
    for plan in chosen:
        trials.append(_tried(catalog.folder, plan, chosen))
        progress.advance(1)
    return {
        "device": asdict(device),
        "n_prompt": N_PROMPT,
        "n_tokens": N_TOKENS,
        "checks": [asdict(check) for check in checks(catalog, chosen, trials, device)],
    }


def _tried(folder: Path, plan: Plan, chosen: Sequence[Plan]) -> Trial:
    budgets = [p.budget_bytes or p.total_bytes for p in chosen]
    budget = plan.budget_bytes or plan.total_bytes
    lower = [b for b in budgets if b < budget]
    other = max((b for b in lower if b <= budget / 2), default=min(lower, default=budgets[-1]))
    return try_budget(folder, budget, other, plan.context, plan.kv_type)


def checks(
    catalog: Catalog, plans: Sequence[Plan], trials: Sequence[Trial], device: Device
) -> list[Check]:
    """Predictions beside ``trials``; the first one gives what a token costs beyond its bytes."""
    predicted = [_seconds(catalog, plan, device) for plan in plans]
    first = trials[0]
    token = 1 / first.decode_tokens_per_s - predicted[0][0]
    prompt = 1 / first.prompt_tokens_per_s - predicted[0][1]
    return [
        Check(trial, i == 0, 1 / max(t + token, t / 4), 1 / max(p + prompt, p / 4))
        for i, (trial, (t, p)) in enumerate(zip(trials, predicted, strict=True))
    ]


def _seconds(catalog: Catalog, plan: Plan, device: Device) -> tuple[float, float]:
    """Of a token where trials time it, and of a token of their prompt."""
    work = work_of(catalog, plan)
    n_prompt = min(N_PROMPT, plan.context // 2)
    token = token_seconds(device, work, n_prompt + N_TOKENS // 2)
    return token, prompt_seconds(device, work, n_prompt) / n_prompt
