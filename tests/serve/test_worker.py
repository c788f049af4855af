"""The one thread of the server, on a session that waits for memory."""

import threading
from collections.abc import Callable
from typing import Any

from edgekit.llama import Sampling
from edgekit.progress import Silent
from edgekit.server.ask import Ask
from edgekit.server.worker import Job, Worker


class Starved:
    """A session without memory: waits until whoever asked it to does not want that any more."""

    is_given_up = True

    def __init__(self) -> None:
        self.plan: Any = type("Plan", (), {"context": 512})
        self.waits, self.was_stopped = threading.Event(), False

    def generate(self, *_: object, check: Callable[[], None], **__: object) -> None:
        self.adapt(check)

    def adapt(self, check: Callable[[], None]) -> None:
        self.waits.set()
        for _ in range(6000):
            try:
                check()
            except Exception:
                self.was_stopped = True
                raise
            threading.Event().wait(0.01)


def test_a_server_that_waits_for_memory_ends_when_it_is_told_to() -> None:
    session: Any = Starved()
    worker = Worker(session, Silent())
    worker.start()
    assert session.waits.wait(60)
    worker.stop()
    assert session.was_stopped


def test_an_answer_that_waits_for_memory_ends_with_the_server() -> None:
    session: Any = Starved()
    worker = Worker(session, Silent())
    ask = Ask("text", "a", 1, Sampling(), (), stream=True, tells_usage=False, anew=False)
    worker.submit(Job(ask, lambda event: None, threading.Event()))
    worker.start()
    assert session.waits.wait(60)
    worker.stop()
    assert session.was_stopped and worker.totals.answers == {"gone": 1}


def test_a_request_for_another_budget_is_not_kept_waiting() -> None:
    session: Any = Starved()
    worker = Worker(session, Silent())
    worker.start()
    assert session.waits.wait(60)
    session.waits.clear()
    worker.wake()
    assert session.waits.wait(30)  # it came back and began anew
    worker.stop()
