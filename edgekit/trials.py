"""Budgets tried on this machine, beside what was predicted for them: `edgekit profile --measure`.

The memory of a shared machine is faster in one minute than in the next. So each budget is tried in
rounds, each time right behind a probe of the ggml types that its plan has, and of all rounds the
one with the median ratio of measured to predicted counts, for tokens and for prompts. The profile
predicts what weights, layers and attention cost. How much more a token of this model takes
(routing, small matrices) is one factor: the median of the other budgets' measured over predicted
seconds. So no budget's own timing is in its prediction.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

from edgekit import probe
from edgekit.catalog import Catalog
from edgekit.devices.profile import Device
from edgekit.manifest import Json
from edgekit.plan import Plan
from edgekit.progress import Progress
from edgekit.speed import prompt_seconds, token_seconds, work_of
from edgekit.trial import N_PROMPT, N_TOKENS, Trial, try_budget

N_TRIALS, N_ROUNDS = 5, 5
LEAST_SHARE = 0.02  # of a plan's bytes that a ggml type has, to be probed for it


@dataclass(frozen=True)
class Attempt:
    """One trial, and what a probe just before it predicts from the model's bytes alone.

    Attributes:
        trial: What was measured.
        token: Predicted seconds of a token where trials time it.
        prompt: Predicted seconds of a token of their prompt.
    """

    trial: Trial
    token: float
    prompt: float

    @property
    def token_ratio(self) -> float:
        """Seconds of a token, measured over predicted."""
        return 1 / self.trial.decode_tokens_per_s / self.token

    @property
    def prompt_ratio(self) -> float:
        """Seconds of a token of the prompt, measured over predicted."""
        return 1 / self.trial.prompt_tokens_per_s / self.prompt


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
    probed = probe.measured(Path(), progress)
    rounds = list[list[Attempt]]()
    for n in range(N_ROUNDS):  # changes of depth are tried in the first one
        progress.start("measure", len(chosen))
        rounds.append([])
        for plan in chosen:
            other = _other(plan, chosen) if n == 0 else None
            rounds[-1].append(_attempt(catalog, plan, other, probed))
            progress.advance(1)
    attempts = [typical(of_budget) for of_budget in zip(*rounds, strict=True)]
    return {
        "device": asdict(probe.described("this-machine", probed)),
        "n_prompt": N_PROMPT,
        "n_tokens": N_TOKENS,
        "checks": [asdict(check) for check in checks(attempts)],
    }


def _attempt(catalog: Catalog, plan: Plan, other: int | None, probed: probe.Measured) -> Attempt:
    now = probe.timed_again(probed, _kinds(catalog, plan), plan.weights_bytes)
    budget = plan.budget_bytes or plan.total_bytes
    trial = try_budget(catalog.folder, budget, other, plan.context, plan.kv_type)
    return attempt_of(catalog, plan, trial, probe.described("now", now))


def attempt_of(catalog: Catalog, plan: Plan, trial: Trial, device: Device) -> Attempt:
    """A trial of ``plan`` beside what the profile of ``device`` says."""
    work, n_prompt = work_of(catalog, plan), min(N_PROMPT, plan.context // 2)
    token = token_seconds(device, work, n_prompt + N_TOKENS // 2)
    return Attempt(trial, token, prompt_seconds(device, work, n_prompt) / n_prompt)


def _kinds(catalog: Catalog, plan: Plan) -> list[str]:
    """The ggml types that make up most of what a token reads, of those that are probed."""
    n_bytes = work_of(catalog, plan).weight_bytes
    least = LEAST_SHARE * sum(n_bytes.values())
    return [kind for kind in probe.TYPES if n_bytes.get(kind, 0) >= least]


def typical(attempts: Sequence[Attempt]) -> Attempt:
    """Of one budget the rounds with the median ratios; the best times, and the highest peak."""
    of_token = sorted(attempts, key=lambda a: a.token_ratio)[len(attempts) // 2]
    of_prompt = sorted(attempts, key=lambda a: a.prompt_ratio)[len(attempts) // 2]
    times = ("load_seconds", "resize_seconds", "return_seconds")
    best = {name: min(getattr(a.trial, name) for a in attempts) for name in times}
    trial = replace(
        attempts[0].trial,
        prompt_tokens_per_s=of_prompt.trial.prompt_tokens_per_s,
        decode_tokens_per_s=of_token.trial.decode_tokens_per_s,
        peak_bytes=max(a.trial.peak_bytes for a in attempts),
        **best,
    )
    return Attempt(trial, of_token.token, of_prompt.prompt)


def _other(plan: Plan, chosen: Sequence[Plan]) -> int:
    """The budget that a change of depth goes to: half of the plan's, as far as there is one."""
    budgets = [p.budget_bytes or p.total_bytes for p in chosen]
    budget = plan.budget_bytes or plan.total_bytes
    lower = [b for b in budgets if b < budget]
    return max((b for b in lower if b <= budget / 2), default=min(lower, default=budgets[-1]))


def checks(attempts: Sequence[Attempt]) -> list[Check]:
    """One attempt per budget: predictions with the factor that the others tell."""
    decode = _left_out([a.token_ratio for a in attempts])
    prompt = _left_out([a.prompt_ratio for a in attempts])
    rows = zip(attempts, decode, prompt, strict=True)
    return [Check(a.trial, 1 / (a.token * d), 1 / (a.prompt * p)) for a, d, p in rows]


def _left_out(ratios: Sequence[float]) -> list[float]:
    """For every row the median ratio of the other rows; 1 where there are none."""
    others = [[*ratios[:i], *ratios[i + 1 :]] or [1.0] for i in range(len(ratios))]
    return list(map(median, others))
