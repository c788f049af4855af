"""Changes of depth in the middle of a conversation: bit for bit, back on failure, nothing left."""

import errno
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from converted import plain, tiny
from sessions import MIB, ROOMY, WARM, text

import edgekit
from edgekit.assembly import Assembly
from edgekit.devices.pressure import Reading
from edgekit.errors import DoesNotFitError, EdgekitError, RefusedError, UsageError
from edgekit.llama import Context
from edgekit.llama.binding import binding
from edgekit.plan import plan_budget
from edgekit.session import Session
from edgekit.sink import Report, Sink


@pytest.fixture
def artifact(layered_artifact: Path) -> Path:
    return layered_artifact


@pytest.fixture(autouse=True)
def bytes_of_the_model_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Python and the suite hold is left out of plans: budgets choose depths."""
    monkeypatch.setattr("edgekit.session.PROCESS_BYTES", 0)
    monkeypatch.setattr("edgekit.footprint.MODEL_BYTES", 0)
    monkeypatch.setattr("edgekit.footprint.loading_bytes", lambda shape, n_threads: 0)


@pytest.fixture
def session(artifact: Path) -> Iterator[Session]:
    with edgekit.load(artifact, budget=ROOMY, context=512, follow=False) as loaded:
        yield loaded


def lowest(session: Session) -> int:
    """The smallest budget that the session can be resized to."""
    with pytest.raises(DoesNotFitError) as error:
        session.resize(1)
    return int(str(error.value).rpartition("--budget ")[2].partition("MiB")[0]) * MIB


def read(monkeypatch: pytest.MonkeyPatch, look: Callable[[], Reading]) -> None:
    """What both of those that look at memory see."""
    for name in ("session", "shortage"):
        monkeypatch.setattr(f"edgekit.{name}.read_pressure", look)


def test_a_conversation_through_two_depths_goes_on_bit_for_bit(artifact: Path) -> None:
    """Down and up with no token between: the logits are those of a run that nothing disturbed."""
    rows = []
    for is_disturbed in (False, True):
        with edgekit.load(artifact, budget=ROOMY, context=512, follow=False) as session:
            ids = session.model.tokenize("The quick brown fox jumps over the lazy dog. " * 3)
            session.context.decode(ids[:-1])
            if is_disturbed:
                before = session.plan
                session.resize(lowest(session))
                assert session.plan.depths.weights_bytes < before.depths.weights_bytes / 2
                assert session.context.tokens == ids[:-1]
                session.resize(ROOMY)
                assert session.plan == before
            rows.append(session.context.decode(ids[-1:]))
    np.testing.assert_array_equal(rows[0], rows[1])


def test_a_change_in_mid_generation_loses_no_token(session: Session) -> None:
    generation = session.generate("Once upon a time", 60, WARM)
    least, seen = lowest(session), []
    for piece in generation:
        seen.append(piece)
        if generation.timings.n_gen >= 20 and not session.changes:
            session.resize(least)
        if generation.timings.n_gen >= 40 and len(session.changes) == 1:
            session.resize(ROOMY)
    assert len(generation.ids) == 60 and generation.stopped == "length"
    assert session.context.tokens[-59:] == generation.ids[:-1]
    assert "".join(seen) == session.model.detokenize(generation.ids)
    assert [change.reason for change in session.changes] == ["asked", "asked"]
    assert session.changes[0].after_bytes == session.changes[1].before_bytes
    assert session.changes[1].bytes_read == session.plan.depths.weights_bytes


def test_the_depth_that_is_asked_for_is_the_one_that_runs(artifact: Path, session: Session) -> None:
    """Logits after a resize equal those of a model that was loaded at that depth at once."""
    least = lowest(session)
    session.resize(least)
    with edgekit.load(artifact, budget=least, context=512, follow=False) as fresh:
        ids = fresh.model.tokenize("def add(a, b):")
        np.testing.assert_array_equal(session.context.decode(ids), fresh.context.decode(ids))


def test_a_request_is_obeyed_before_the_next_token(session: Session) -> None:
    least, before = lowest(session), session.plan
    generation = session.generate("The", 20, WARM)
    next(generation.pieces)
    session.request(least)
    assert session.plan == before
    "".join(generation)
    assert session.plan.budget_bytes == least and len(generation.ids) == 20


def test_what_does_not_fit_leaves_the_old_depth(session: Session) -> None:
    before, words = session.plan, text(session)
    with pytest.raises(DoesNotFitError, match=r"lowest depth needs .* give --budget \d+MiB"):
        session.resize(1)
    assert session.plan == before and session.changes == []
    session.context.clear()
    assert text(session) == words


@pytest.mark.parametrize(
    "error",
    [
        RefusedError("level Q2_K of a tensor is corrupt"),
        OSError(errno.EROFS, "Read-only file system"),
        RuntimeError("can't start new thread"),
        MemoryError(),
    ],
)
def test_when_loading_fails_the_old_depth_and_the_conversation_come_back(
    session: Session, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    session.context.decode(session.model.tokenize("The quick brown fox"))
    tokens, before, least = list(session.context.tokens), session.plan, lowest(session)
    opened = iter([True, False] * 2)

    class Broken(Assembly):
        def write_to(self, sink: Sink, report: Report) -> None:
            raise error

    def first_broken(*args: Any) -> Assembly:
        return (Broken if next(opened) else Assembly)(*args)

    monkeypatch.setattr("edgekit.engine.Assembly", first_broken)
    with pytest.raises(type(error)):
        session.resize(least)
    assert session.plan == before
    assert session.context.tokens == tokens
    told = list[EdgekitError | None]()
    session.request(least, told.append)
    session.adapt()
    assert len(told) == 1 and str(error)[:10] in str(told[0])
    assert session.plan == before and session.context.tokens == tokens
    assert len(text(session, 5, "The quick brown fox jumps")) > 0


def test_another_cache_type_computes_the_conversation_anew(session: Session) -> None:
    """The engine is asked directly: policies choose when."""
    ids = session.model.tokenize("The quick brown fox jumps over the lazy dog.")
    session.context.decode(ids)
    smaller = plan_budget(session.artifact, ROOMY, 512, "q8_0")
    assert session._engine.load(smaller) == 0  # the weights stay
    assert session.context.tokens == ids
    with edgekit.load(session.artifact.folder, ROOMY, 512, "q8_0", follow=False) as fresh:
        fresh.context.decode(ids)
        np.testing.assert_array_equal(session.context.decode([5]), fresh.context.decode([5]))


def test_pressure_takes_depth_and_gives_it_back(artifact: Path) -> None:
    with edgekit.load(artifact, budget=ROOMY, context=512) as session:
        text(session, 5)
        home = session.plan
        session.adapt(reading=Reading(0), need=10)
        assert [change.reason for change in session.changes] == ["pressure"]
        assert session.plan.total_bytes <= 0.75 * home.total_bytes + MIB  # two eighths stay free
        assert session.context.n_ctx >= len(session.context.tokens) + 10
        deadline = time.monotonic() + 30
        while session.plan != home and time.monotonic() < deadline:
            session.adapt(reading=Reading(4 << 30))
        assert session.plan == home
        assert [change.reason for change in session.changes] == ["pressure", "pressure"]


def test_context_that_was_given_up_comes_back_when_a_prompt_needs_it(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with edgekit.load(artifact, budget=ROOMY, context=2048) as session:
        text(session, 5)
        monkeypatch.setattr("edgekit.governor.Governor.reserve", lambda self, n: n // 4)
        session.adapt(reading=Reading(0), need=10)
        session._governor = None  # memory stays as short as it is
        budget = session.plan.budget_bytes
        assert session.context.n_ctx < 1024
        long = "The quick brown fox jumps over the lazy dog. " * 30
        assert session.context.n_ctx < len(session.model.tokenize(long)) + 20
        generation = session.generate(long, 20, WARM)
        "".join(generation)
        assert len(generation.ids) == 20
        assert session.changes[-1].reason == "context"
        assert budget is not None and session.plan.total_bytes <= budget


def test_at_the_smallest_budget_pressure_plans_nothing_above_it(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with edgekit.load(artifact, budget=ROOMY, context=512, follow=False) as session:
        budget = lowest(session) + MIB
    with edgekit.load(artifact, budget=budget, context=512) as session:
        for free in (1, 5, 20, 100):
            session.adapt(reading=Reading(free * MIB), need=10)
            assert session.is_given_up or session.plan.total_bytes <= budget


def test_a_context_that_llama_cpp_makes_larger_is_used_and_resized(artifact: Path) -> None:
    with edgekit.load(artifact, budget=ROOMY, context=300, follow=False) as session:
        session.context.decode([5] * 400, "none")
        session.resize(lowest(session))
        assert len(session.context.tokens) == 400


def test_without_room_on_disk_a_conversation_is_computed_anew_and_not_copied(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = session.model.tokenize("The quick brown fox jumps over the lazy dog.")
    session.context.decode(ids)
    copied = list[Context]()

    def no_room(**_: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("edgekit.saved.tempfile.TemporaryFile", no_room)
    monkeypatch.setattr(Context, "save", copied.append)
    session.resize(lowest(session))
    assert session.context.tokens == ids and not copied


def test_a_window_that_moved_on_is_computed_anew(tmp_path: Path) -> None:
    """llama.cpp drops the end of a conversation also where its beginning is lost."""
    checkpoint = tiny(tmp_path / "c", "gemma3_text", width="wide", max_position_embeddings=2048)
    made = plain(checkpoint, tmp_path / "a", ("Q8_0",)).artifact
    random = np.random.default_rng(0)
    start, long, end = (random.integers(3, 300, n).tolist() for n in (100, 800, 20))
    with edgekit.load(made, budget=ROOMY, context=1024, follow=False) as session:
        context = session.context
        context.decode(start, "none")
        want = context.decode(end)
        context.truncate(len(start))  # the window still has it
        np.testing.assert_allclose(context.decode(end), want, rtol=0, atol=1e-3)
        context.clear()
        context.decode(start + long, "none")
        with pytest.raises(EdgekitError, match="cannot go back to 100 tokens"):
            context.truncate(len(start))
        rest = session._rewind(start + end)
        np.testing.assert_allclose(context.decode(rest), want, rtol=0, atol=0.2)  # was 3 off


def test_an_interrupt_leaves_no_token_in_the_cache_that_is_not_told(session: Session) -> None:
    lib, context = binding(), session.context
    ids = session.model.tokenize("The quick brown fox jumps over the lazy dog. " * 10)[:200]
    interrupted = 0
    for i in range(40):
        context.clear()
        words = (threading.main_thread().ident, signal.SIGINT)
        timer = threading.Timer(0.0005 * (i % 8), signal.pthread_kill, words)
        try:
            timer.start()
            context.decode(ids, "none")
            time.sleep(0.05)
        except KeyboardInterrupt:
            interrupted += len(context.tokens) < len(ids)
        timer.join()
        n_held = lib.llama_memory_seq_pos_max(lib.llama_get_memory(context.handle), 0) + 1
        assert n_held == len(context.tokens)
    assert interrupted


def test_a_state_that_cannot_be_read_back_is_computed_anew(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = session.model.tokenize("The quick brown fox jumps over the lazy dog.")
    session.context.decode(ids)

    def broken(context: Context, path: Path) -> None:
        context.clear()
        raise EdgekitError("llama.cpp cannot restore the state")

    monkeypatch.setattr(Context, "restore_file", broken)
    session.resize(lowest(session))
    assert session.context.tokens == ids


def test_when_nothing_fits_the_model_goes_and_the_conversation_waits(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readings = iter([Reading(0)] * 10 + [Reading(4 << 30)] * 10_000)
    monkeypatch.setattr(
        "edgekit.governor.Governor.reserve", lambda self, n: 4 * n if n < ROOMY else n // 8
    )
    read(monkeypatch, lambda: Reading(4 << 30))
    with edgekit.load(artifact, budget=ROOMY, context=512) as session:
        total = session.plan.total_bytes
        generation = session.generate("The quick brown", 30, WARM)
        pieces = [next(generation.pieces)]
        read(monkeypatch, lambda: next(readings))
        session._polled = 0.0
        pieces += generation.pieces
        assert len(generation.ids) == 30
        assert session.context.tokens[-29:] == generation.ids[:-1]
        first, last = session.changes[0], session.changes[-1]
        assert (first.before_bytes, first.after_bytes, last.before_bytes) == (total, 0, 0)


def test_memory_that_goes_while_a_depth_loads_ends_the_load(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The load that pressure began is given up half-way; what fits then is loaded instead."""
    monkeypatch.setattr("edgekit.shortage.WATCH_SECONDS", 0.0)
    monkeypatch.setattr("edgekit.governor.Governor.reserve", lambda self, n: n // 3)
    with edgekit.load(artifact, budget=ROOMY, context=512) as session:
        ids = session.model.tokenize("The quick brown fox")
        session.context.decode(ids)
        looks = iter([Reading(1 << 30)] * 3 + [Reading(1 * MIB)] + [Reading(4 << 30)] * 10_000)
        read(monkeypatch, lambda: next(looks))
        session.adapt(reading=Reading(0), need=10)
        assert [c.after_bytes for c in session.changes] == [0, session.plan.total_bytes]
        assert session.context.tokens == ids
        assert next(looks).free_bytes == 4 << 30  # the shortage was seen


def test_memory_that_never_comes_back_ends_with_one_line_and_the_conversation_can_be_kept(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("edgekit.session.PATIENCE_SECONDS", 0.2)
    with edgekit.load(artifact, budget=ROOMY, context=512) as session:
        monkeypatch.setattr("edgekit.governor.Governor.reserve", lambda self, n: 4 * n)
        read(monkeypatch, lambda: Reading(0))
        session.context.decode(session.model.tokenize("what was said stays"))
        tokens = session.context.tokens
        assert not session.is_given_up
        with pytest.raises(DoesNotFitError, match=r"memory did not come back in 0 s"):
            session.adapt(reading=Reading(0))
        assert session.is_given_up
        session.save(tmp_path / "state")
    with edgekit.load(artifact, budget=ROOMY, context=512, follow=False) as session:
        session.restore(tmp_path / "state")
        assert session.context.tokens == tokens


def test_whoever_stops_a_generation_does_not_wait_for_memory(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check() -> None:
        if session.is_given_up:
            raise TimeoutError

    with edgekit.load(artifact, budget=ROOMY, context=512) as session:
        pieces = iter(session.generate("The quick brown fox", 8, chat=False, check=check))
        next(pieces)
        monkeypatch.setattr("edgekit.governor.Governor.reserve", lambda self, n: 4 * n)
        read(monkeypatch, lambda: Reading(0))
        monkeypatch.setattr("edgekit.session.POLL_SECONDS", 0.01)
        with pytest.raises(TimeoutError):
            list(pieces)


def test_messages_reuse_what_the_context_has(artifact: Path, session: Session) -> None:
    with pytest.raises(UsageError, match="no chat template"):
        session.generate([{"role": "user", "content": "hello"}], 3)
    words = "The quick brown fox jumps over the lazy dog."
    n_read = []
    for prompt in (words, words + " Once", words + " Twice", words[:20]):
        generation = session.generate(prompt, 1, WARM)
        "".join(generation)
        n_read.append(generation.timings.n_prompt)
        assert session.context.tokens == session.model.tokenize(prompt)
    whole = len(session.model.tokenize(words))
    assert n_read[0] == whole and max(n_read[1:]) <= 6 < whole
