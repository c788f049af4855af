"""Where the jobs of a conversion run: threads of this process, or the workers of a Ray cluster.

An engine is given the encoder, the tensors to encode in the order to begin them, and yields each
one's number when it is done. Jobs do not depend on each other and leave their result in the spool,
so that order, place and repetition of a job change nothing in it.
"""

import socket
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

from edgekit.codecs import CODECS
from edgekit.codecs.job import one_by_one
from edgekit.encode import Encoder, Task, open_encoder
from edgekit.errors import EdgekitError

REACH_SECONDS = 10
RETRIES = 5  # of a job whose worker is lost
Engine = Callable[[Encoder, Task, Sequence[int], int, str | None], Iterator[int]]


def encode_alone(task: Task, index: int) -> int:
    """Encode a tensor in a process that has only the files of ``task``."""
    with _one_thread():
        open_encoder(task).encode(index, one_by_one)
    return index


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread of the linear algebra in this process: its sums depend on their number."""
    try:
        from threadpoolctl import threadpool_limits
    except ImportError as error:
        raise EdgekitError(
            f"converting needs {error.name}; pip install 'edgekit[convert]'"
        ) from error
    with threadpool_limits(1, "blas"):
        yield


def run_local(
    encoder: Encoder, task: Task, indices: Sequence[int], n_jobs: int, address: str | None
) -> Iterator[int]:
    """Run on ``n_jobs`` threads of this process."""
    n_tensors = CODECS[task.codec].tensors_at_once or n_jobs
    pool, chunks = ThreadPoolExecutor(n_tensors), ThreadPoolExecutor(n_jobs)
    in_order = partial(_in_order, chunks, max(1, 2 * n_jobs // n_tensors))

    def run(index: int) -> int:
        encoder.encode(index, in_order)
        return index

    with _one_thread():
        try:
            for done in as_completed([pool.submit(run, index) for index in indices]):
                yield done.result()
        finally:
            pool.shutdown(cancel_futures=True)
            chunks.shutdown(cancel_futures=True)


def _in_order(pool: Executor, n_ahead: int, tasks: Iterable[Callable[[], Any]]) -> Iterator[Any]:
    """Run tasks on a pool, some ahead of the one that is yielded: that bounds memory."""
    todo = iter(tasks)
    running: deque[Future[Any]] = deque(pool.submit(task) for task in islice(todo, n_ahead))
    try:
        while running:
            result = running.popleft().result()
            running.extend(pool.submit(task) for task in islice(todo, 1))
            yield result
    finally:
        for future in running:
            future.cancel()


def run_on_ray(
    encoder: Encoder, task: Task, indices: Sequence[int], n_jobs: int, address: str | None
) -> Iterator[int]:
    """Run on the workers of a Ray cluster, each of which sees checkpoint and spool.

    Args:
        encoder: Of this process; workers open one of their own.
        task: What they open.
        indices: Tensors.
        n_jobs: Processors of the cluster that is started where there is no address.
        address: Of a running cluster, or ``None``.

    Raises:
        EdgekitError: Ray is not installed, or the cluster cannot be reached or lost a job for good.
    """
    try:
        import ray
    except ImportError as error:
        raise EdgekitError("--engine ray needs Ray; pip install 'edgekit[cluster]'") from error
    started = not ray.is_initialized()
    if started:
        _join(ray, n_jobs, address)
    try:
        yield from _results(ray, task, indices)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        raise (
            cause
            if isinstance(cause, EdgekitError)
            else EdgekitError(f"a job failed on the cluster: {cause}")
        ) from error
    except ray.exceptions.RayError as error:
        raise EdgekitError(f"the cluster lost a job {RETRIES} times: {error}") from error
    finally:
        if started:
            ray.shutdown()


def _join(ray: Any, n_jobs: int, address: str | None) -> None:
    _reach(address)
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        if address is None:
            ray.init(num_cpus=n_jobs, include_dashboard=False, **quiet)
        else:
            ray.init(address=address, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        told = str(error).splitlines()[0]
        raise EdgekitError(
            f"no Ray cluster at {address or 'this machine'}: {told}; start one with: ray start "
            "--head"
        ) from error


def _reach(address: str | None) -> None:
    """Ask for the port of a cluster before Ray does, which would wait for minutes."""
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if not colon or not port.isdecimal():  # none is given, or it is a word such as "auto"
        return
    try:
        socket.create_connection((host, int(port)), timeout=REACH_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise EdgekitError(
            f"no Ray cluster at {address}: {error}; start one with: ray start --head"
        ) from error


def _results(ray: Any, task: Task, indices: Sequence[int]) -> Iterator[int]:
    remote = ray.remote(encode_alone).options(num_cpus=1, max_retries=RETRIES)
    running = [remote.remote(task, index) for index in indices]
    while running:
        done, running = ray.wait(running)
        yield from ray.get(done)


ENGINES: Mapping[str, Engine] = {"local": run_local, "ray": run_on_ray}
