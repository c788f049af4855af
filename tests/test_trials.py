"""Budgets tried in processes of their own, and the predictions that they are set beside."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from profiles import trial, with_quality

from edgekit.catalog import open_catalog
from edgekit.devices.profile import find_device
from edgekit.errors import EdgekitError
from edgekit.plan import least_bytes, plan_budget
from edgekit.probe import Measured
from edgekit.probe_timing import (
    COMMON,
    DEEP,
    SHALLOW,
    SMALL_WIDTH,
    TYPES,
    WIDTH,
    deep_shape,
    expert_pair,
    large_shape,
    small_pair,
)
from edgekit.profile import profile
from edgekit.progress import Silent
from edgekit.speed import work_of
from edgekit.trial import running
from edgekit.trials import (
    N_ROUNDS,
    Attempt,
    Turn,
    attempt_of,
    checks,
    measured,
    middle,
    models,
    turns,
    typical,
)


@pytest.fixture(scope="module")
def artifact(llama_artifact, tmp_path_factory) -> Path:
    return with_quality(llama_artifact, tmp_path_factory.mktemp("profile") / "edge")


def test_a_prediction_takes_one_factor_from_the_other_budgets_and_nothing_from_its_own(artifact):
    catalog, device = open_catalog(artifact), find_device("pixel-8")
    rows = profile(artifact, [], context=512).budgets[::4]
    plans = [plan_budget(catalog, row.budget_bytes, 512) for row in rows]
    plain = [attempt_of(catalog, plan, trial(1000, 1.0), device) for plan in plans]
    attempts = [
        replace(
            a,
            trial=replace(
                a.trial,
                decode_tokens_per_s=1 / (1.5 * a.token),
                prompt_tokens_per_s=1 / (0.8 * a.prompt),
            ),
        )
        for a in plain
    ]
    rates = [a.trial.decode_tokens_per_s for a in attempts]
    disturbed = replace(attempts[1].trial, decode_tokens_per_s=7.0)
    attempts[1] = replace(attempts[1], trial=disturbed)
    found = checks(attempts)
    assert [c.decode_tokens_per_s for c in found] == pytest.approx(rates)
    assert [c.prompt_tokens_per_s for c in found] == pytest.approx(
        [a.trial.prompt_tokens_per_s for a in attempts]
    )
    alone = checks(attempts[:1])  # nothing to take a factor from
    assert alone[0].decode_tokens_per_s == pytest.approx(1 / plain[0].token)


def test_of_all_rounds_those_with_the_median_ratios_count():
    """A slow machine is slow in both; one that changed in between is left out."""
    speeds = ((50.0, 0.02, 0.5), (25.0, 0.05, 0.4), (99.0, 0.04, 0.3))
    rounds = [
        Attempt(replace(trial(1000, rate), load_seconds=load, peak_bytes=int(rate)), token, 0.01)
        for rate, token, load in speeds
    ]
    found = typical(rounds)
    assert (found.trial.decode_tokens_per_s, found.token) == (25.0, 0.05)
    assert found.prompt == 0.01 and found.trial.prompt_tokens_per_s == 100.0
    assert (found.trial.load_seconds, found.trial.peak_bytes) == (0.3, 99)


def test_a_prediction_goes_with_what_was_measured_before_and_after_it():
    clock = iter([1.0, 10.0, 3.0, 20.0, 5.0])
    found = turns(lambda: next(clock), lambda: next(clock), 2)
    assert found == [Turn(2.0, 10.0), Turn(4.0, 20.0)]
    assert middle([Turn(1.0, 1.0), Turn(9.0, 3.0), Turn(4.0, 2.0)]) == Turn(4.0, 2.0)


def test_models_are_of_the_types_that_a_plan_has_and_of_its_size(moe_artifact):
    catalog = open_catalog(moe_artifact)
    small = work_of(catalog, plan_budget(catalog, least_bytes(catalog, 512), 512))
    large = replace(small, model_bytes=1 << 40)
    kinds = set(small.weight_bytes) & set(TYPES)
    experts = set(small.expert_weights)
    assert experts and experts < kinds
    of_tokens, of_prompts = map(set, models(small))
    assert of_tokens == {DEEP, SHALLOW} | {s for k in {COMMON, *kinds} for s in small_pair(k)}
    mixtures = {s for kind in {COMMON, *experts} for s in expert_pair(kind, SMALL_WIDTH)}
    assert of_prompts == of_tokens | mixtures
    of_tokens, of_prompts = map(set, models(large))
    assert of_tokens == set(map(deep_shape, kinds))
    mixtures = {s for kind in {COMMON, *experts} for s in expert_pair(kind, WIDTH)}
    assert of_prompts == set(map(large_shape, kinds)) | mixtures


def test_a_trial_measures_what_it_is_asked_for_in_a_process_of_its_own(llama_artifact):
    catalog = open_catalog(llama_artifact)
    least = least_bytes(catalog, 512)
    with running(llama_artifact, 4 * least, 512, "f16") as child:
        planned, seconds = child.loaded()
        assert planned == plan_budget(catalog, 4 * least, 512).total_bytes and seconds > 0
        assert 0 < child.prompt_seconds() < child.token_seconds() < 1
        for _ in range(3):  # more tokens than the context has
            assert child.token_seconds() > 0
        assert least // 2 < child.peak_bytes() <= planned + (16 << 20)
        resized, seconds = child.resize(least)
        assert resized <= least and seconds > 0 and child.token_seconds() > 0


def test_a_trial_that_fails_tells_why_in_the_childs_words(llama_artifact):
    with (
        pytest.raises(EdgekitError, match=r"at 1000 bytes failed: .*lowest depth needs"),
        running(llama_artifact, 1000, 512, "f16") as child,
    ):
        child.loaded()
    with running(llama_artifact, 1 << 30, 512, "f16") as child:
        child.loaded()
        with pytest.raises(EdgekitError, match="lowest depth needs"):
            child.resize(1)


def test_every_budget_is_tried_in_rounds_and_the_first_one_changes_depths(artifact, monkeypatch):
    catalog, device = open_catalog(artifact), find_device("pixel-8")
    told = list[Any]()
    plans = [plan_budget(catalog, n, 512) for n in (1 << 28, 1 << 29, 1 << 30)]
    seconds = {"prompt": 0.01, "token": 0.02}

    class Child:
        def __init__(self, budget: int) -> None:
            self.budget = budget

        def loaded(self) -> tuple[int, float]:
            return self.budget - 1, 1.5

        def prompt_seconds(self) -> float:
            return seconds["prompt"]

        def token_seconds(self) -> float:
            return seconds["token"]

        def peak_bytes(self) -> int:
            return 990

        def resize(self, budget: int) -> tuple[int, float]:
            told.append((self.budget, budget))
            return budget, 0.1

    @contextmanager
    def running(_folder: Path, budget: int, *_: Any) -> Iterator[Child]:
        yield Child(budget)

    monkeypatch.setattr("edgekit.probe.measured", lambda *_: Measured(1, 1e10, (1e9, 1e9), {}))
    monkeypatch.setattr("edgekit.probe.described", lambda *_: device)
    monkeypatch.setattr("edgekit.trials.running", running)
    monkeypatch.setattr("edgekit.trials.Bench.with_tokens", lambda _self, timings: timings)
    monkeypatch.setattr("edgekit.trials.Bench.with_prompts", lambda _self, timings: timings)
    trials = [c["trial"] for c in measured(catalog, plans, Silent())["checks"]]
    budgets, others = [1 << 28, 1 << 29, 1 << 30], [1 << 30, 1 << 28, 1 << 29]
    there_and_back = [
        pair for b, o in zip(budgets, others, strict=True) for pair in ((b, o), (b, b))
    ]
    assert told == there_and_back and N_ROUNDS > 1
    assert [(t["resize_bytes"], t["return_seconds"]) for t in trials] == [(o, 0.1) for o in others]
    assert {(t["prompt_tokens_per_s"], t["decode_tokens_per_s"]) for t in trials} == {(100.0, 50.0)}
    assert [t["planned_bytes"] for t in trials] == [b - 1 for b in budgets]
