"""The process of ``edgekit serve``: its line, its end, its signals, a hard limit."""

import asyncio
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
import requests
from control_groups import HOG, real_group
from served import EXACT, MIB, ROOMY, WORDS, serving, smallest, text_of, wait_for
from tiny_artifact import LARGER, make_artifact

from edgekit.loader import load
from edgekit.progress import Silent
from edgekit.server import ask as asks
from edgekit.server.app import _Answer
from edgekit.server.bodies import server_bytes
from edgekit.server.error import ApiError
from edgekit.server.worker import MAX_WAITING, Job, Worker

# answers without end, on a port that it prints
ENDLESS = """
import asyncio
from starlette.applications import Starlette
from starlette.responses import StreamingResponse
from starlette.routing import Route
from edgekit.server.listen import bind, listen

async def blocks():
    while True:
        yield "x" * 100_000
        await asyncio.sleep(0.01)

async def answer(request):
    return StreamingResponse(blocks())

bound = bind("127.0.0.1", 0)
app = Starlette(routes=[Route("/", answer)])
listen(app, bound, lambda: print(bound.getsockname()[1], flush=True))
"""


def test_too_many_at_once_are_turned_away(session: Any) -> None:
    """A worker that has not begun; the one over the line is told to come again."""
    worker, ask = Worker(session, Silent()), asks.text({"prompt": "def"})
    jobs = [Job(ask, lambda event: None, threading.Event()) for _ in range(MAX_WAITING)]
    for job in jobs:
        worker.submit(job)
    with pytest.raises(ApiError, match="requests wait already; try again later") as caught:
        worker.submit(job)
    assert caught.value.status == 429 and worker.n_waiting == MAX_WAITING
    jobs[3].is_gone.set()  # its client does not wait any more, and its place is free
    worker.forget_gone()
    worker.submit(job)
    assert worker.totals.answers == {"turned away": 1, "gone": 1}


def test_a_client_that_does_not_read_holds_one_text_and_no_request(session: Any) -> None:
    async def check() -> None:
        worker, ask = Worker(session, Silent()), asks.text({"prompt": "def"})
        answer, job = _Answer(worker, ask), worker._jobs.get()
        assert job is not None
        for piece in ("one ", "by ", "one"):
            job.tell(piece)
        held = weakref.ref(ask)
        del job, ask
        assert await answer.next() == "one by one"
        assert held() is None

    asyncio.run(check())


def test_a_termination_finishes_what_was_asked_and_ends_with_0(artifact: Path) -> None:
    with (
        serving(artifact, "--budget", ROOMY, "--context", "512") as served,
        ThreadPoolExecutor(5) as pool,
    ):
        client = served.client()

        def ask(word: str) -> tuple[str, str, Any]:
            fields: dict[str, Any] = {"model": "any", "max_tokens": 200, "extra_body": EXACT}
            return text_of(client.completions.create(prompt=word, stream=True, **fields))

        answers = [pool.submit(ask, word) for word in WORDS[:5]]
        wait_for(lambda: served.metrics()["edgekit_requests_waiting"] == 4)
        served.process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        with pytest.raises(requests.ConnectionError):
            served.get("/health")
        assert [answer.result(timeout=300)[1] for answer in answers] == ["length"] * 5
        assert served.process.wait(timeout=120) == 0
        assert not psutil.pid_exists(served.pid)
        assert "Traceback" not in served.errors.read_text()


def test_a_second_termination_breaks_off_what_was_asked(artifact: Path) -> None:
    with (
        serving(artifact, "--budget", ROOMY, "--context", "100000") as served,
        ThreadPoolExecutor(3) as pool,
    ):
        fields: dict[str, Any] = {"model": "any", "max_tokens": 90_000, "extra_body": EXACT}
        ask = lambda word: served.client().completions.create(prompt=word, **fields)  # noqa: E731
        answers = [pool.submit(ask, word) for word in WORDS[:3]]
        wait_for(lambda: served.metrics()["edgekit_requests_waiting"] == 2)
        for _ in range(2):
            served.process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
        assert served.process.wait(timeout=120) == 0
        for answer in answers:
            with pytest.raises((openai.APIConnectionError, openai.InternalServerError)):
                answer.result(timeout=20)
        assert "Traceback" not in served.errors.read_text()


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_does_not_wait_for_a_client_that_does_not_read(second: int) -> None:
    """Uvicorn alone would, from Python 3.12 on."""
    command = [sys.executable, "-c", ENDLESS]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout and process.stderr
        try:
            port = int(process.stdout.readline())
            with socket.create_connection(("127.0.0.1", port)) as client:
                client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
                assert client.recv(1)
                process.send_signal(signal.SIGTERM)
                with pytest.raises(subprocess.TimeoutExpired):
                    process.wait(timeout=0.5)
                process.send_signal(second)
                assert process.wait(timeout=20) == 0
            assert process.stderr.read() == ""
        finally:
            process.kill()


def test_signals_halve_the_budget_and_bring_it_back(artifact: Path) -> None:
    with serving(artifact, "--budget", ROOMY, "--context", "512") as served:
        for number, budget in ((signal.SIGUSR1, 1 << 29), (signal.SIGUSR2, 1 << 30)):
            served.process.send_signal(number)
            wait_for(lambda b=budget: served.metrics()["edgekit_budget_bytes"] == b)
        served.process.send_signal(signal.SIGINT)  # the terminal's
        psutil.Process(served.pid).send_signal(signal.SIGINT)
        assert served.process.wait(timeout=120) == 0


def test_inside_a_group_of_exactly_the_budget_a_flood_does_not_kill_it(artifact: Path) -> None:
    with serving(artifact, "--budget", ROOMY, "--context", "512") as served:
        budget = smallest(served) + 2 * MIB
    with real_group(budget) as group:
        words = ["--budget", str(budget), "--context", "512"]
        with serving(artifact, *words, start=group.start) as served, ThreadPoolExecutor(32) as pool:
            client = served.client()

            def ask(i: int) -> int:
                try:
                    if i % 3 == 0:  # JSON that takes 30 times its bytes
                        data = '{"prompt": [' + ",".join(["{}"] * 20_000) + "]}"
                        headers = {"Content-Type": "application/json"}
                        url = f"{served.url}/v1/completions"
                        return requests.post(url, data, headers=headers, timeout=60).status_code
                    fields: dict[str, Any] = {"model": "any", "max_tokens": 20}
                    prompt = "def add " * 60
                    text_of(client.completions.create(prompt=prompt, stream=True, **fields))
                except openai.APIStatusError as error:
                    return error.status_code
                return 200

            codes = list(pool.map(ask, range(90)))
            assert served.process.poll() is None
            assert set(codes) <= {200, 400, 429, 503} and codes.count(200) > 15
            assert served.metrics()["edgekit_peak_resident_bytes"] <= budget


def test_what_serving_takes_besides_the_model_is_planned_for(artifact: Path) -> None:
    def plan(budget: int, besides: int) -> Any:
        options: Any = {"besides": besides, "follow": False, "n_threads": 1}
        with load(artifact, budget, 512, **options) as loaded:
            return loaded.plan

    alone, besides = plan(1 << 30, 0), server_bytes(512)
    assert plan(1 << 30, besides).total_bytes == alone.total_bytes + besides
    tight = plan(alone.total_bytes, 1 << 18)  # the weights make room
    assert tight.total_bytes <= alone.total_bytes
    assert tight.depths.weights_bytes < alone.depths.weights_bytes
    with serving(artifact, "--budget", ROOMY, "--context", "512") as served:
        assert served.metrics()["edgekit_planned_bytes"] == alone.total_bytes + besides


@pytest.mark.slow
def test_memory_pressure_changes_the_depth_while_streams_go_on(tmp_path: Path) -> None:
    """A neighbour in the same group eats what was free; the depth comes back after it."""
    larger, context = make_artifact(tmp_path, LARGER), ["--context", "1536"]
    with serving(larger, "--budget", ROOMY, *context) as served:
        size = smallest(served) + 110 * MIB
    budget, pressure = size - 30 * MIB, 'edgekit_resizes_total{reason="pressure"}'
    with (
        real_group(size) as group,
        serving(larger, "--budget", str(budget), *context, start=group.start) as served,
        ThreadPoolExecutor(4) as pool,
    ):
        before = served.metrics()["edgekit_weights_bytes"]
        fields: dict[str, Any] = {"model": "any", "max_tokens": 700, "extra_body": EXACT}
        create = served.client(timeout=300).completions.create
        streams = [
            pool.submit(lambda p: text_of(create(prompt=p, stream=True, **fields)), word)
            for word in WORDS[:4]
        ]
        hog = group.start([sys.executable, "-c", HOG, str(90 * MIB)])
        wait_for(lambda: served.metrics().get(pressure, 0) >= 1)
        hog.communicate()
        assert [stream.result(timeout=300)[1] for stream in streams] == ["length"] * 4
        assert (hog.returncode, served.process.poll()) == (0, None)
        wait_for(lambda: served.metrics()["edgekit_weights_bytes"] == before)
        assert served.get("/health").status_code == 200
