"""Artifacts with only some of their experts resident, for tests."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from edgekit.artifact import open_artifact
from edgekit.engine import Engine, Settings
from edgekit.expert_plan import plan_paged
from edgekit.paging import Pager
from edgekit.plan import Plan

TRAINED = Path(__file__).parents[1] / "samples/tiny-moe"
N_BATCH = 64


def tokens(n: int) -> list[int]:
    return [int(t) for t in np.random.default_rng(1).integers(3, 320, n)]


@contextmanager
def paged(artifact: Path, cache: int, **settings: object) -> Iterator[tuple[Engine, Plan, Pager]]:
    with open_artifact(artifact) as opened:
        plan = replace(plan_paged(opened, 1 << 40, 512, expert_cache=cache), batch=N_BATCH)
        assert plan.paged is not None
        plan = replace(plan, batch=min(N_BATCH, plan.paged.longest_batch))
        engine = Engine(opened, Settings(1, **settings))  # type: ignore[arg-type]
        try:
            engine.load(plan)
            assert engine.pager is not None
            yield engine, plan, engine.pager
        finally:
            engine.close()
