"""When to change the budget of a running model: shrink before the kernel kills, grow when calm.

A `Governor` sees one reading of memory after another and answers with a new budget or none. It
reads nothing itself, so recorded curves test it.

A *reserve* of memory stays free. Once less is free, the budget falls at once, so far that twice the
reserve is free again. It rises only after a calm time in which every reading would have allowed it,
and a rise that had to be taken back doubles the calm time that the next one needs.

Bound: under readings that stay the same there is at most one fall; rises that are taken back come
after calm times of 1, 2, 4, ... units, so ``n`` of them take ``2**n`` units.
"""

from collections import deque
from dataclasses import dataclass

from edgekit.devices.memory import auto_margin
from edgekit.devices.pressure import Reading

LEAST_GAIN = 0.05  # of the present total; growing by less is not worth loading again
LEAST_RESERVE = 200  # of what is available, one part of so many is defended at least
STALLED = 0.1  # share of time in which no task got on; beyond, there is no calm
STALL_CUT = 0.1  # of the total, given up when stalled
STALL_SECONDS = 10.0  # the window of that share: until it is over, old stalls show
CALM_SECONDS = 0.5  # at least; a change that takes longer needs proportionally more
CALM_PER_CHANGE = 2.0  # seconds of calm per second that the last change took
BACKOFF_LIMIT = 64.0  # the calm time doubles no further than this


@dataclass(frozen=True)
class Home:
    """Where the model began: it grows back to this and, with a cap, no further.

    Attributes:
        budget: Bytes it was planned for.
        total: Bytes that its plan takes.
        is_cap: The user named the budget; else it was what was free then, and may grow beyond.
    """

    budget: int
    total: int
    is_cap: bool


class Governor:
    """Decides on budgets, one reading after another."""

    def __init__(self, home: Home, reading: Reading) -> None:
        """Start after the model is loaded: half of what is free then is defended, at most.

        Args:
            home: Where it began.
            reading: Of memory, less what the model will take but has not touched yet.
        """
        self.home = home
        margin = auto_margin(reading.free_bytes + home.total)
        self._reserve = min(margin, reading.free_bytes) // 2
        self._targets: deque[tuple[float, int]] = deque()
        self._change_seconds = 0.0
        self._backoff = 1.0
        self._grew_at: float | None = None
        self._stall_until = -1.0

    def reserve(self, available: int) -> int:
        """Bytes that should stay free of ``available``, what the model takes included."""
        return min(max(self._reserve, available // LEAST_RESERVE), available // 8)

    def last_resort(self, reading: Reading, total: int) -> int:
        """The budget below which the model is unloaded: only a quarter of the reserve stays free.

        Arguments are those of `decide`.
        """
        available = reading.free_bytes + total
        budget = available - self.reserve(available) // 4
        return min(budget, self.home.budget) if self.home.is_cap else budget

    @property
    def calm_seconds(self) -> float:
        """How long memory must have been free before the budget rises."""
        return self._backoff * max(CALM_SECONDS, CALM_PER_CHANGE * self._change_seconds)

    def changed(self, seconds: float) -> None:
        """A change of depth took ``seconds``."""
        self._change_seconds = seconds
        self._targets.clear()

    def decide(
        self, now: float, reading: Reading, total: int, *, is_loaded: bool = True
    ) -> int | None:
        """The new budget in bytes, or ``None`` to stay.

        Args:
            now: Seconds on a clock that never goes back.
            reading: Of memory.
            total: Bytes that the present plan takes; without a model, those of the process alone.
            is_loaded: Whether there is a model; without one, what fits is told at once.
        """
        available = reading.free_bytes + total
        reserve = self.reserve(available)
        target = available - 2 * reserve
        if self.home.is_cap:
            target = min(target, self.home.budget)
        if not is_loaded:
            return target
        if reading.free_bytes < reserve and target < total:
            return self._fall(now, target)
        if self._is_stalled(now, reading, reserve):
            self._stall_until = now + STALL_SECONDS
            return self._fall(now, min(target, round((1 - STALL_CUT) * total)))
        if reading.stalled > STALLED:
            self._targets.clear()  # no calm
            return None
        return self._rise(now, target, total, reserve)

    def _is_stalled(self, now: float, reading: Reading, reserve: int) -> bool:
        """Stalls count where memory is scarce too: they may be another program's own limit."""
        is_scarce = reading.free_bytes < 4 * reserve
        return reading.stalled > STALLED and is_scarce and now >= self._stall_until

    def _fall(self, now: float, target: int) -> int:
        if self._grew_at is not None and now - self._grew_at < 2 * self.calm_seconds:
            self._backoff = min(2 * self._backoff, BACKOFF_LIMIT)
        self._grew_at = None
        self._targets.clear()
        return max(0, target)

    def _rise(self, now: float, target: int, total: int, reserve: int) -> int | None:
        self._targets.append((now, target))
        if now - self._targets[0][0] < self.calm_seconds:
            return None
        while len(self._targets) > 1 and now - self._targets[1][0] >= self.calm_seconds:
            self._targets.popleft()
        budget = self._risen(min(target for _, target in self._targets), total, reserve)
        if budget is not None:
            self._targets.clear()
            self._grew_at = now
        return budget

    def _risen(self, target: int, total: int, reserve: int) -> int | None:
        """The budget to rise to: home when it is in reach, so that a model ends as it began."""
        home = self.home
        is_beyond = not home.is_cap and target >= (1 + LEAST_GAIN) * home.budget
        if total < home.total <= target + reserve // 2:
            return target if is_beyond else home.budget
        is_worth_it = target >= (1 + LEAST_GAIN) * total
        return target if is_worth_it and (total < home.total or is_beyond) else None
