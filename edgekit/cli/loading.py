"""What `run` and `serve` share: the options that a load takes, and loading with them."""

import functools
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.cli import options
from edgekit.cli.console import note
from edgekit.cli.supervise import Supervised
from edgekit.sizes import format_size

if TYPE_CHECKING:
    from edgekit.progress import Progress
    from edgekit.session import Session

Command = Callable[..., None]


@dataclass(frozen=True)
class Loading:
    """The options of `loading_options`, by the names of `edgekit.load`'s arguments but one."""

    budget: int | None
    context: int | None
    kv_type: str
    residency: Any
    follow: bool
    repack: bool
    expert_cache: int | None
    no_pager: bool
    prefetch: Any
    n_threads: int | None


def loading_options(command: Command) -> Command:
    """Add the options; the command gets them as one argument ``loading``."""

    @functools.wraps(command)
    def grouped(**words: Any) -> None:
        chosen = Loading(**{field.name: words.pop(field.name) for field in fields(Loading)})
        command(loading=chosen, **words)

    shown = (
        options.budget_auto, options.context, options.kv_type, options.residency, options.follow,
        options.repack, options.expert_cache, options.no_pager, options.prefetch, options.threads,
    )  # fmt: skip
    for option in reversed(shown):
        grouped = option(grouped)
    return grouped


@contextmanager
def loaded(
    artifact: Path, loading: Loading, child: Supervised, progress: "Progress", **more: Any
) -> Iterator["Session"]:
    """Load and tell of it; signals ask the session for other budgets from then on.

    Args:
        artifact: The folder.
        loading: What was asked for on the command line.
        child: Told what the plan needs.
        progress: Told how far each load is.
        more: Other arguments of `edgekit.load`.
    """
    from edgekit.devices.memory import auto_budget
    from edgekit.loader import load

    if loading.budget is None:
        found = auto_budget()
        note(f"budget {format_size(found.n_bytes)}: {found.source}")
    words = {field.name: getattr(loading, field.name) for field in fields(Loading)}
    pager = not words.pop("no_pager")
    with load(artifact, **words, pager=pager, progress=progress, **more) as session:
        child.needs(session.plan.total_bytes, session.plan.budget_bytes or 0)
        _obey_signals(session)
        _tell_loaded(session)
        yield session


def _obey_signals(session: "Session") -> None:
    """USR1 halves the budget, USR2 brings the first one back; Windows has neither."""
    first = session.plan.budget_bytes or session.plan.total_bytes

    def halve(number: int, frame: object) -> None:
        session.request((session.plan.budget_bytes or first) // 2)

    def restore(number: int, frame: object) -> None:
        session.request(first)

    for name, handler in (("SIGUSR1", halve), ("SIGUSR2", restore)):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), handler)


def _tell_loaded(session: "Session") -> None:
    plan = session.plan
    note(
        f"loaded {format_size(plan.weights_bytes)} of weights at "
        f"{plan.bits_per_weight:.2f} bits per weight in {session.load_seconds:.2f} s; "
        f"total {format_size(plan.total_bytes)} planned"
    )
