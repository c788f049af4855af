"""Budgets tried on this machine, beside what was predicted for them: `edgekit profile --measure`.

The memory of a shared machine is faster in one second than in the next. So each budget is timed in
turns with models of the ggml types that its plan has, half a second each, and the turn with the
median ratio of measured to predicted counts, for tokens and for prompts. The profile predicts what
weights, layers and attention cost. How much more a token of this model takes (routing, small
matrices) is one factor: the median of the other budgets' measured over predicted seconds. So no
budget's own timing is in its prediction.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

from edgekit import probe
from edgekit.catalog import Catalog
from edgekit.devices.memory import auto_budget
from edgekit.devices.profile import Device
from edgekit.manifest import Json
from edgekit.plan import Plan
from edgekit.probe_model import ProbeShape
from edgekit.probe_timing import (
    COMMON,
    DEEP,
    SHALLOW,
    SMALL_WIDTH,
    TYPES,
    WIDTH,
    Bench,
    Timings,
    deep_shape,
    expert_pair,
    large_shape,
    small_pair,
)
from edgekit.progress import Progress
from edgekit.speed import Work, prompt_seconds, token_seconds, work_of
from edgekit.trial import N_PROMPT, N_TOKENS, Running, Trial, running

N_TRIALS, N_ROUNDS = 5, 3  # the changes of depth are tried in the first round
N_TOKEN_TURNS, N_PROMPT_TURNS = 5, 3
LEAST_SHARE = 0.02  # of a plan's bytes that a ggml type has, to be timed


@dataclass(frozen=True)
class Attempt:
    """One trial, and what models timed in turns with it predict from the bytes alone.

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
    for n in range(N_ROUNDS):
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
    budget, work = plan.budget_bytes or plan.total_bytes, work_of(catalog, plan)
    n_prompt = min(N_PROMPT, plan.context // 2)
    of_tokens, of_prompts = (Bench(s, probed.threads, keeps=_fits(s, plan)) for s in models(work))

    def token() -> float:
        return _token(_now(probed, of_tokens.with_tokens(probed.timings)), work, n_prompt)

    def prompt() -> float:
        return _prompt(_now(probed, of_prompts.with_prompts(probed.timings)), work, n_prompt)

    with running(catalog.folder, budget, plan.context, plan.kv_type) as child:
        planned, load_seconds = child.loaded()
        child.prompt_seconds()  # warms up; tokens are drawn behind it
        with of_tokens:
            written = middle(turns(child.token_seconds, token, N_TOKEN_TURNS))
        with of_prompts:
            read = middle(turns(child.prompt_seconds, prompt, N_PROMPT_TURNS))
        peak = child.peak_bytes()
        resized, down, back = _changes(child, budget, other)
    trial = Trial(
        budget_bytes=budget,
        planned_bytes=planned,
        peak_bytes=peak,
        load_seconds=load_seconds,
        prompt_tokens_per_s=1 / read.measured,
        decode_tokens_per_s=1 / written.measured,
        resize_bytes=resized,
        resize_seconds=down,
        return_seconds=back,
    )
    return Attempt(trial, written.predicted, read.predicted)


@dataclass(frozen=True)
class Turn:
    """Seconds, measured and predicted at about the same time."""

    measured: float
    predicted: float


def turns(measure: Callable[[], float], predict: Callable[[], float], n: int) -> list[Turn]:
    """Measure and predict in turns; a prediction goes with the mean of both its neighbours."""
    found, before = list[Turn](), measure()
    for _ in range(n):
        predicted, after = predict(), measure()
        found.append(Turn((before + after) / 2, predicted))
        before = after
    return found


def middle(turns: Sequence[Turn]) -> Turn:
    """The turn with the median ratio."""
    return sorted(turns, key=lambda turn: turn.measured / turn.predicted)[len(turns) // 2]


def attempt_of(catalog: Catalog, plan: Plan, trial: Trial, device: Device) -> Attempt:
    """A trial of ``plan`` beside what the profile of ``device`` says."""
    work, n_prompt = work_of(catalog, plan), min(N_PROMPT, plan.context // 2)
    return Attempt(trial, _token(device, work, n_prompt), _prompt(device, work, n_prompt))


def _token(device: Device, work: Work, n_prompt: int) -> float:
    return token_seconds(device, work, n_prompt + N_TOKENS // 2)


def _prompt(device: Device, work: Work, n_prompt: int) -> float:
    return prompt_seconds(device, work, n_prompt) / n_prompt


def _now(probed: probe.Measured, timings: Timings) -> Device:
    return probe.described("now", replace(probed, timings=timings))


def _fits(shapes: Sequence[ProbeShape], plan: Plan) -> bool:
    """Whether all of them may be in memory beside ``plan``, which is not loaded yet."""
    room = auto_budget().n_bytes - plan.total_bytes
    return sum(shape.weights_bytes for shape in shapes) < room


def _changes(child: Running, budget: int, other: int | None) -> tuple[int, float, float]:
    """Total bytes of the plan for ``other``, seconds to it and back."""
    if other is None:
        return 0, math.inf, math.inf
    resized, down = child.resize(other)
    return resized, down, child.resize(budget)[1]


def models(work: Work) -> tuple[tuple[ProbeShape, ...], tuple[ProbeShape, ...]]:
    """The models to time in turns with one that costs ``work``: for its tokens, for its prompts.

    They are of the types that make up most of what a token reads. One that stays in the caches is
    timed beside models that do.
    """
    least = LEAST_SHARE * sum(work.weight_bytes.values())
    kinds = [kind for kind in TYPES if work.weight_bytes.get(kind, 0) >= least]
    is_small = work.model_bytes <= probe.cache_bytes()
    width = SMALL_WIDTH if is_small else WIDTH
    experts = [kind for kind in kinds if kind in work.expert_weights]
    mixed = (COMMON, *experts) if experts else ()
    mixtures = [shape for kind in mixed for shape in expert_pair(kind, width)]
    if is_small:
        pairs = [shape for kind in (COMMON, *kinds) for shape in small_pair(kind)]
        small = dict.fromkeys((DEEP, SHALLOW, *pairs))
        return tuple(small), tuple(dict.fromkeys((*small, *mixtures)))
    return tuple(map(deep_shape, kinds)), (*map(large_shape, kinds), *dict.fromkeys(mixtures))


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
