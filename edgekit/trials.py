"""Budgets tried on this machine, beside what was predicted for them: `edgekit profile --measure`.

The machine is probed first: its profile predicts what weights and attention cost. What a token of
this model costs beyond that (norms, routing, small matrices) is measured at the smallest and at the
largest budget: ``seconds = share * predicted + cost``, the share 1 for prompts. The budgets between
are predictions.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from edgekit.catalog import Catalog
from edgekit.devices.profile import Device
from edgekit.manifest import Json
from edgekit.plan import Plan
from edgekit.progress import Progress
from edgekit.speed import prompt_seconds, token_seconds, work_of
from edgekit.trial import N_PROMPT, N_TOKENS, Trial, try_budget

N_TRIALS, N_ROUNDS = 5, 2
LEAST_SPAN = 0.05  # of predictions; below, timings differ by more than what was to be told apart


@dataclass(frozen=True)
class Check:
    """A budget: what was predicted, and what was measured.

    Attributes:
        trial: What was measured.
        is_fitted: The speeds of this row were used to predict those between.
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
    chosen = [
        plans[i] for i in dict.fromkeys(round(k * last / (N_TRIALS - 1)) for k in range(N_TRIALS))
    ]
    progress.start("measure", N_ROUNDS * len(chosen))
    rounds = []
    for _ in range(N_ROUNDS):
        rounds.append(list[Trial]())
        for plan in chosen:
            rounds[-1].append(_tried(catalog.folder, plan, chosen))
            progress.advance(1)
    trials = [least_disturbed(of_budget) for of_budget in zip(*rounds, strict=True)]
    return {
        "device": asdict(device),
        "n_prompt": N_PROMPT,
        "n_tokens": N_TOKENS,
        "checks": [asdict(check) for check in checks(catalog, chosen, trials, device)],
    }


def least_disturbed(trials: Sequence[Trial]) -> Trial:
    """Of one budget the best times and speeds, for other work only slows, and the highest peak."""
    first = trials[0]
    times = ("load_seconds", "resize_seconds", "return_seconds")
    most = ("prompt_tokens_per_s", "decode_tokens_per_s", "peak_bytes")
    best = {name: min(getattr(trial, name) for trial in trials) for name in times}
    best |= {name: max(getattr(trial, name) for trial in trials) for name in most}
    return replace(first, **best)


def _tried(folder: Path, plan: Plan, chosen: Sequence[Plan]) -> Trial:
    budgets = [p.budget_bytes or p.total_bytes for p in chosen]
    budget = plan.budget_bytes or plan.total_bytes
    lower = [b for b in budgets if b < budget]
    other = max((b for b in lower if b <= budget / 2), default=min(lower, default=budgets[-1]))
    return try_budget(folder, budget, other, plan.context, plan.kv_type)


def checks(
    catalog: Catalog, plans: Sequence[Plan], trials: Sequence[Trial], device: Device
) -> list[Check]:
    """Predictions beside ``trials``; the first and the last one are fitted."""
    predicted = [_seconds(catalog, plan, device) for plan in plans]
    decode = _fitted([t for t, _ in predicted], [1 / t.decode_tokens_per_s for t in trials])
    prompt = _shifted([p for _, p in predicted], [1 / t.prompt_tokens_per_s for t in trials])
    ends = (0, len(trials) - 1)
    rows = enumerate(zip(trials, decode, prompt, strict=True))
    return [Check(trial, i in ends, 1 / token, 1 / read) for i, (trial, token, read) in rows]


def _fitted(predicted: Sequence[float], measured: Sequence[float]) -> list[float]:
    """Seconds for every row, with the share and the cost that make the first and last ones true.

    Where predictions differ by less than noise, or timings the other way, the share is 1.
    """
    span = predicted[-1] - predicted[0]
    is_wide = abs(span) > LEAST_SPAN * predicted[0]
    share = (measured[-1] - measured[0]) / span if is_wide else 1.0
    share = share if 0 < share < 2 else 1.0
    return _shifted([share * p for p in predicted], measured)


def _shifted(predicted: Sequence[float], measured: Sequence[float]) -> list[float]:
    """Seconds for every row, plus the cost that the first and last ones lack, in the mean."""
    cost = sum(measured[i] - predicted[i] for i in (0, -1)) / 2
    return [max(p + cost, p / 10) for p in predicted]


def _seconds(catalog: Catalog, plan: Plan, device: Device) -> tuple[float, float]:
    """Of a token where trials time it, and of a token of their prompt."""
    work = work_of(catalog, plan)
    n_prompt = min(N_PROMPT, plan.context // 2)
    token = token_seconds(device, work, n_prompt + N_TOKENS // 2)
    return token, prompt_seconds(device, work, n_prompt) / n_prompt
