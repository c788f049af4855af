"""The one thread that uses the session: requests in order, changes of depth in between."""

import queue
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from edgekit.errors import DoesNotFitError, EdgekitError, TooLongError, UsageError
from edgekit.llama import Timings
from edgekit.llama.generation import StopReason
from edgekit.progress import Progress
from edgekit.server.ask import Ask
from edgekit.server.error import ApiError
from edgekit.session import Session

MAX_WAITING = 32  # requests; more are turned away
IDLE_SECONDS = 0.1  # between two looks at memory pressure while nobody asks


@dataclass(frozen=True)
class Done:
    """The end of an answer."""

    stopped: StopReason | None
    timings: Timings


Event = str | Done | ApiError  # a piece of text, or what ends the answer


class GoneError(Exception):
    """The client went away."""


class _WantedError(Exception):
    """Something else is to be done than to wait for memory."""


@dataclass(frozen=True, eq=False)
class Job:
    """A request on its way.

    Attributes:
        ask: What is asked for.
        tell: Takes the events, called in the worker's thread; ``Done`` or an error is the last.
        is_gone: Set by the client's side: nobody waits for it any more.
    """

    ask: Ask
    tell: Callable[[Event], None]
    is_gone: threading.Event


@dataclass
class Totals:
    """What the worker did so far."""

    answers: Counter[str] = field(default_factory=Counter)  # by how they ended
    counting: threading.Lock = field(default_factory=threading.Lock)
    held_tokens: int = 0
    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    gen_tokens: int = 0
    gen_seconds: float = 0.0
    last: Timings = field(default_factory=Timings)  # of the last answer

    def count(self, end: str) -> None:
        """Count how an answer ended; in any thread."""
        with self.counting:
            self.answers[end] += 1

    def add(self, timings: Timings) -> None:
        """Count an answer, also one that was broken off."""
        self.held_tokens += timings.n_held
        self.prompt_tokens += timings.n_prompt
        self.prompt_seconds += timings.prompt_seconds
        self.gen_tokens += timings.n_gen
        self.gen_seconds += timings.gen_seconds
        self.last = timings


class Worker:
    """Runs jobs on a session, first come, first served.

    Attributes:
        session: Loaded; nobody else calls it while the worker runs, but for `Session.request`.
        totals: Counts.
        is_busy: Whether a job is running.
    """

    def __init__(self, session: Session, progress: Progress) -> None:
        """Start nothing yet."""
        self.session, self.totals, self.is_busy = session, Totals(), False
        self._progress, self._context = progress, session.plan.context
        self._jobs: queue.Queue[Job | None] = queue.Queue()
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run, name="worker")

    @property
    def n_waiting(self) -> int:
        """Jobs that have not begun."""
        return self._jobs.qsize()

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End after the job that runs; the application has waited for all it wants."""
        self._ends.set()
        self._jobs.put(None)
        self._thread.join()

    def submit(self, job: Job) -> None:
        """Put a job at the end of the line.

        Raises:
            ApiError: The line is too long.
        """
        if self.n_waiting >= MAX_WAITING:
            self.totals.count("turned away")
            raise ApiError(429, f"{MAX_WAITING} requests wait already; try again later")
        self._jobs.put(job)

    def forget_gone(self) -> None:
        """Take the jobs that nobody waits for out of the line."""
        with self._jobs.mutex:
            line = self._jobs.queue
            gone = [job for job in line if job is not None and job.is_gone.is_set()]
            for job in gone:
                line.remove(job)
        for _ in gone:
            self.totals.count("gone")

    def wake(self) -> None:
        """Look at once at what was requested of the session."""
        self._jobs.put(None)

    def _run(self) -> None:
        while not self._ends.is_set():
            try:
                job = self._jobs.get(timeout=IDLE_SECONDS)
            except queue.Empty:
                job = None
            if job is not None:
                self.is_busy = True
                self._do(job)
                self.is_busy = False
            else:
                self._idle()

    def _idle(self) -> None:
        def check() -> None:
            if self._ends.is_set() or self.n_waiting:
                raise _WantedError

        try:
            self.session.adapt(check=check)
        except _WantedError:
            return
        except Exception as error:  # no memory, mostly; the next request may find more
            self._progress.note(str(error) or type(error).__name__)

    def _do(self, job: Job) -> None:
        try:
            done = self._answer(job)
            self.totals.count(done.stopped or "end")
            job.tell(done)
        except GoneError:
            self.totals.count("gone")
        except Exception as error:  # one request fails, the server goes on
            self.totals.count("failed")
            job.tell(_api_error(error))

    def _answer(self, job: Job) -> Done:
        def check() -> None:
            if job.is_gone.is_set() or (self._ends.is_set() and self.session.is_given_up):
                raise GoneError

        check()
        ask = job.ask
        is_text = isinstance(ask.prompt, str)
        generation = self.session.generate(
            ask.prompt if isinstance(ask.prompt, str) else self.session.prompt_of(ask.prompt),
            self._context if ask.n_tokens is None else ask.n_tokens,
            ask.sampling,
            chat=not is_text,
            stop=ask.stop,
            anew=ask.anew,
            check=check,
        )
        try:
            for piece in generation:
                job.tell(piece)
        finally:
            self.totals.add(generation.timings)
        return Done(generation.stopped, generation.timings)


def _api_error(error: Exception) -> ApiError:
    match error:
        case TooLongError():
            return ApiError(400, str(error), code="context_length_exceeded")
        case UsageError():
            return ApiError(400, str(error))
        case DoesNotFitError():
            return ApiError(503, str(error), code="out_of_memory")
        case EdgekitError():
            return ApiError(500, str(error))
    return ApiError(500, f"{type(error).__name__}: {error}; this is a bug, please report it")
