"""A session in a process of its own: the same answers, and its death is an error, not ours."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import edgekit
from edgekit.errors import DoesNotFitError, EdgekitError, UnknownNameError
from edgekit.isolated import IsolatedSession
from edgekit.llama import Sampling

GREEDY = Sampling(temperature=0, ignore_eos=True)
ROOMY = 1 << 30


@pytest.fixture
def session(llama_artifact: Path) -> Iterator[IsolatedSession]:
    with edgekit.load_isolated(llama_artifact, budget=ROOMY, context=512, follow=False) as loaded:
        yield loaded


def test_it_answers_as_a_session_here_does(session: IsolatedSession, llama_artifact: Path) -> None:
    theirs = session.generate("The quick brown", 20, GREEDY)
    text = "".join(theirs)
    with edgekit.load(llama_artifact, ROOMY, 512, follow=False) as here:
        ours = here.generate("The quick brown", 20, GREEDY)
        assert "".join(ours) == text
        assert (ours.ids, ours.stopped) == (theirs.ids, theirs.stopped)
        assert theirs.timings.n_gen == 20 and theirs.timings.gen_tokens_per_second > 0
        assert session.plan is not None
        assert session.plan.depths == here.plan.depths


def test_depth_changes_between_two_pieces(session: IsolatedSession) -> None:
    generation = session.generate("The quick brown", 20, GREEDY)
    pieces = [next(generation.pieces)]
    before = session.plan
    plan = session.resize(ROOMY // 2)
    assert before is not None and plan.budget_bytes == ROOMY // 2
    pieces += generation.pieces
    assert len(generation.ids) == 20
    assert [change.reason for change in session.changes] == ["asked"]
    session.adapt()


def test_errors_of_the_child_arrive_as_what_they_are(session, llama_artifact: Path) -> None:
    with pytest.raises(DoesNotFitError, match=r"lowest depth needs .* give --budget"):
        session.resize(1)
    assert "".join(session.generate("The", 3, GREEDY)) is not None  # it goes on
    with pytest.raises(UnknownNameError, match="unknown residency 'maped'"):
        edgekit.load_isolated(llama_artifact, residency="maped")
    with pytest.raises(DoesNotFitError):
        edgekit.load_isolated(llama_artifact, budget=1)


@pytest.mark.parametrize(
    ("number", "kind", "words"),
    [
        (signal.SIGKILL, DoesNotFitError, r"killed by the memory manager: it needed .* MiB of"),
        (signal.SIGABRT, EdgekitError, r"process ended with SIGABRT; load again"),
    ],
)
def test_its_death_is_an_error_here(session: IsolatedSession, number, kind, words) -> None:
    generation = session.generate("The quick brown", 400, GREEDY)
    next(generation.pieces)
    os.kill(session._child.pid, number)
    with pytest.raises(kind, match=words):
        "".join(generation)
    session.close()


def test_an_interrupt_and_a_closed_session_leave_no_process(session: IsolatedSession) -> None:
    os.kill(session._child.pid, signal.SIGINT)
    assert "".join(session.generate("The", 3, GREEDY)) is not None
    session.close()
    assert session._child.returncode == 0
    with pytest.raises(EdgekitError, match="ended with exit code 0; load again"):
        session.adapt()


def test_an_interrupted_call_ends_the_session_as_its_answer_would_go_to_the_next(
    session: IsolatedSession,
) -> None:
    generation = session.generate("The quick brown", 400, GREEDY)
    next(generation.pieces)
    session._child.send_signal(signal.SIGSTOP)  # so the interrupt comes before the answer
    interrupt = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    goes_on = threading.Timer(0.5, session._child.send_signal, (signal.SIGCONT,))
    with pytest.raises(KeyboardInterrupt):
        interrupt.start()
        goes_on.start()
        session.resize(ROOMY // 2)
    goes_on.join()
    with pytest.raises(EdgekitError, match="process ended with SIGTERM; load again"):
        session.adapt()
