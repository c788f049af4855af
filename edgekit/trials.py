"""Budgets tried on this machine, beside what was predicted for them: `edgekit profile --measure`.

The machine is probed in rounds, with a round of trials behind each, for the memory of a shared
machine is faster in one minute than in the next, and the best of all rounds is what counts. The
profile that comes of it predicts what weights, layers and attention cost. How much
more a token of this model takes (routing, small matrices, a machine in another mood) is one factor:
the median of the other budgets' measured over predicted seconds. So no budget's own timing is in
its prediction.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

from edgekit.catalog import Catalog
from edgekit.devices.profile import Device
from edgekit.manifest import Json
from edgekit.plan import Plan
from edgekit.probe import probe
from edgekit.progress import Progress
from edgekit.speed import prompt_seconds, token_seconds, work_of
from edgekit.trial import N_PROMPT, N_TOKENS, Trial, try_budget

N_TRIALS, N_ROUNDS = 5, 6


@dataclass(frozen=True)
class Check:
    """A budget: what was predicted, and what was measured.

    Attributes:
        trial: What was measured.
        decode_tokens_per_s: Predicted.
        prompt_tokens_per_s: Predicted.
    """

    trial: Trial
    decode_tokens_per_s: float
    prompt_tokens_per_s: float


def measured(catalog: Catalog, plans: Sequence[Plan], progress: Progress) -> Json:
    """Probe this machine and try `N_TRIALS` of ``plans``.

    Raises:
        EdgekitError: A trial failed.
    """
    last = len(plans) - 1
    chosen = [
        plans[i] for i in dict.fromkeys(round(k * last / (N_TRIALS - 1)) for k in range(N_TRIALS))
    ]
    rounds = list[list[Trial]]()

    def try_all() -> None:
        progress.start("measure", len(chosen))
        others = [None if rounds else _other(plan, chosen) for plan in chosen]
        rounds.append([])
        for plan, other in zip(chosen, others, strict=True):
            budget = plan.budget_bytes or plan.total_bytes
            trial = try_budget(catalog.folder, budget, other, plan.context, plan.kv_type)
            rounds[-1].append(trial)
            progress.advance(1)

    device = probe(Path(), "this-machine", progress, n_rounds=N_ROUNDS, then=try_all)
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


def _other(plan: Plan, chosen: Sequence[Plan]) -> int:
    """The budget that a change of depth goes to: half of the plan's, as far as there is one."""
    budgets = [p.budget_bytes or p.total_bytes for p in chosen]
    budget = plan.budget_bytes or plan.total_bytes
    lower = [b for b in budgets if b < budget]
    return max((b for b in lower if b <= budget / 2), default=min(lower, default=budgets[-1]))


def checks(
    catalog: Catalog, plans: Sequence[Plan], trials: Sequence[Trial], device: Device
) -> list[Check]:
    """Predictions beside ``trials``, each from the device's profile and the other trials."""
    predicted = [_seconds(catalog, plan, device) for plan in plans]
    decode = _left_out([t for t, _ in predicted], [1 / t.decode_tokens_per_s for t in trials])
    prompt = _left_out([p for _, p in predicted], [1 / t.prompt_tokens_per_s for t in trials])
    rows = zip(trials, decode, prompt, strict=True)
    return [Check(trial, 1 / token, 1 / read) for trial, token, read in rows]


def _left_out(predicted: Sequence[float], measured: Sequence[float]) -> list[float]:
    """Seconds for every row, with the factor that the other rows tell; 1 where there are none."""
    ratios = [m / p for m, p in zip(measured, predicted, strict=True)]
    others = [[*ratios[:i], *ratios[i + 1 :]] or [1.0] for i in range(len(ratios))]
    return [p * median(factors) for p, factors in zip(predicted, others, strict=True)]


def _seconds(catalog: Catalog, plan: Plan, device: Device) -> tuple[float, float]:
    """Of a token where trials time it, and of a token of their prompt."""
    work = work_of(catalog, plan)
    n_prompt = min(N_PROMPT, plan.context // 2)
    token = token_seconds(device, work, n_prompt + N_TOKENS // 2)
    return token, prompt_seconds(device, work, n_prompt) / n_prompt
