"""When a budget changes: curves of free memory in, budgets out; no clock but the curve's."""

import pytest

from edgekit.devices.pressure import Reading
from edgekit.governor import BACKOFF_LIMIT, CALM_SECONDS, Governor, Home

MIB = 1 << 20
STEP = 0.05  # seconds between two readings


class Machine:
    """Memory that a model and others share; the model takes what it is told, in whole MiB."""

    def __init__(self, memory: int, budget: int, *, is_cap: bool = True) -> None:
        self.memory, self.others, self.now = memory, 0, 0.0
        self.total = budget
        self.stalled = 0.0
        home = Home(budget, budget, is_cap)
        self.governor = Governor(home, self.reading())
        self.changes: list[int] = []

    def reading(self) -> Reading:
        return Reading(self.memory - self.others - self.total, self.stalled)

    def run(self, seconds: float) -> None:
        for _ in range(round(seconds / STEP)):
            self.now += STEP
            assert self.reading().free_bytes >= 0, "the kernel would have killed it"
            budget = self.governor.decide(self.now, self.reading(), self.total)
            if budget is not None and budget != self.total:
                self.total = budget
                self.changes.append(budget)
                self.governor.changed(0.02)


def test_a_quiet_machine_changes_nothing() -> None:
    for memory in (1006 * MIB, 1010 * MIB, 4000 * MIB):
        machine = Machine(memory, 1000 * MIB)
        machine.run(60)
        assert machine.changes == []


def test_it_falls_before_memory_is_gone_and_leaves_twice_the_reserve() -> None:
    machine = Machine(1200 * MIB, 1000 * MIB)
    reserve = machine.governor.reserve(1200 * MIB)
    assert reserve == 100 * MIB  # half of what was free at the start
    while not machine.changes:
        machine.others += 10 * MIB
        machine.run(STEP)
    assert machine.reading().free_bytes >= 2 * reserve - 10 * MIB
    assert machine.total < 1000 * MIB


def test_the_last_resort_of_a_capped_budget_is_not_above_it() -> None:
    for is_cap in (True, False):
        machine = Machine(1050 * MIB, 1000 * MIB, is_cap=is_cap)
        budget = machine.governor.last_resort(Reading(50 * MIB), 1000 * MIB)
        assert (budget <= 1000 * MIB) == is_cap


def test_it_ends_where_it_began_and_the_number_of_changes_is_bounded() -> None:
    """Ten steps down to a third and ten up: at most one fall per step, few rises."""
    machine = Machine(1300 * MIB, 1000 * MIB)
    steps = [70 * MIB * i for i in range(1, 11)]
    for others in [*steps, *reversed(steps), 0]:
        machine.others = others
        machine.run(2)
    machine.run(30)
    assert machine.total == 1000 * MIB
    assert 2 <= len(machine.changes) <= 2 * len(steps) + 2
    assert min(machine.changes) >= 1300 * MIB - steps[-1] - 300 * MIB


def test_without_a_cap_it_grows_beyond_its_start_when_memory_comes() -> None:
    for is_cap, expected in ((True, []), (False, [3200 * MIB])):
        machine = Machine(1200 * MIB, 1000 * MIB, is_cap=is_cap)
        machine.memory = 3400 * MIB
        machine.run(3)
        assert machine.changes == expected


def test_a_small_gain_is_not_worth_a_load() -> None:
    machine = Machine(2000 * MIB, 1000 * MIB)
    machine.others = 990 * MIB
    machine.run(1)
    fallen = machine.total
    assert fallen < 1000 * MIB
    machine.others -= round(0.04 * fallen)
    machine.run(20)
    assert machine.total == fallen


def test_growth_waits_for_calm() -> None:
    machine = Machine(2000 * MIB, 1000 * MIB)
    machine.others = 1000 * MIB
    machine.run(1)
    fallen = machine.total
    for _ in range(20):  # free again and again, never for long
        machine.others = 0
        machine.run(CALM_SECONDS - 2 * STEP)
        machine.others = 1000 * MIB
        machine.run(2 * STEP)
    assert machine.total == fallen
    machine.others = 0
    machine.run(2 * CALM_SECONDS)
    assert machine.total == 1000 * MIB


def test_growth_that_is_taken_back_makes_the_next_wait_longer() -> None:
    """Memory that vanishes whenever the model grows: rises come after 1, 2, 4, ... calm times."""
    machine = Machine(2000 * MIB, 1000 * MIB)
    machine.others = 1000 * MIB
    machine.run(1)
    seconds = 120
    for _ in range(round(seconds / STEP)):
        machine.others = 0 if machine.total < 1000 * MIB else 1000 * MIB
        machine.run(STEP)
    # doubling from half a second up to 32 seconds: 7 rises in the first 64, 2 more in the rest
    assert 6 <= len(machine.changes) <= 2 * 10 + 1
    assert machine.governor.calm_seconds <= BACKOFF_LIMIT * CALM_SECONDS


def test_a_slow_change_needs_a_longer_calm() -> None:
    machine = Machine(2000 * MIB, 1000 * MIB)
    machine.governor.changed(4.0)
    assert machine.governor.calm_seconds == pytest.approx(8.0)
    machine.governor.changed(0.001)
    assert machine.governor.calm_seconds == CALM_SECONDS


def test_stalls_cut_once_per_window_and_only_where_memory_is_scarce() -> None:
    machine = Machine(1100 * MIB, 1000 * MIB)
    machine.stalled = 0.5
    machine.run(5)
    assert len(machine.changes) == 1 and machine.changes[0] <= 900 * MIB
    roomy = Machine(9000 * MIB, 1000 * MIB)
    roomy.stalled = 0.5
    roomy.run(5)
    assert roomy.changes == []


def test_an_unloaded_model_is_told_at_once_what_fits() -> None:
    governor = Governor(Home(1000 * MIB, 1000 * MIB, True), Reading(500 * MIB))
    alone = 60 * MIB  # of the process without a model
    for free, budget in ((100, 120), (700, 570), (1600, 1000)):
        told = governor.decide(1.0, Reading(free * MIB), alone, is_loaded=False)
        assert told == pytest.approx(budget * MIB)
