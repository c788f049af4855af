"""Hit rates that are foretold are those of the pager, and on other text within two points."""

from pathlib import Path

import numpy as np
import pytest
from converted import plain
from paged import TRAINED, paged, tokens

from edgekit.artifact import open_artifact
from edgekit.assembly import Assembly
from edgekit.llama import Context, Listener, open_model
from edgekit.measure import highest_depths
from edgekit.routing.facts import hit_rate
from edgekit.routing.replay import hit_rates
from edgekit.routing.summary import summarize
from edgekit.routing.trace import Trace, trace_of
from edgekit.samples import CALIBRATION_TEXT, HELDOUT_TEXT
from edgekit.tracing import trace_model


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    return plain(TRAINED, tmp_path_factory.mktemp("trained") / "artifact", ("Q8_0",)).artifact


def traced(artifact: Path, text: Path) -> Trace:
    with open_artifact(artifact) as opened, Assembly(opened, highest_depths(opened)) as source:
        return trace_model(source, text, n_threads=1)


def heard(artifact: Path, ids: list[int]) -> Trace:
    """What routers choose when all experts are resident, token by token."""
    rows: list[np.ndarray] = []
    listener = Listener(4, 8, lambda *_: rows.append(listener.topk()[0].copy()), always=True)
    with (
        open_artifact(artifact) as opened,
        Assembly(opened, highest_depths(opened)) as source,
        open_model(source) as model,
        Context(model, 512, n_threads=1, listener=listener) as context,
    ):
        for token in ids:
            context.decode([token])
    return trace_of(np.stack(rows).reshape(len(ids), 4, 2), 8)


@pytest.mark.parametrize("cache", [2, 3, 6])
def test_a_replay_has_the_hits_of_the_pager(trained, cache):
    ids = tokens(300)
    with paged(trained, cache) as (engine, _, pager):
        for token in ids:
            engine.context.decode([token])
        measured = pager.stats.hit_rate
    assert measured == pytest.approx(hit_rates(heard(trained, ids), "pool", [cache]).mean())


def test_the_hit_rate_that_is_promised_holds_on_other_text(trained):
    facts = summarize(traced(trained, CALIBRATION_TEXT))
    other = traced(trained, HELDOUT_TEXT)
    for cache in (2, 3, 4, 6):
        promised, found = hit_rate(facts, cache), hit_rates(other, "pool", [cache]).mean()
        assert promised == pytest.approx(found, abs=0.02), cache
