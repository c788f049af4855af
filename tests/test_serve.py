"""``edgekit serve`` as clients have it: a real process, the official client, a hard limit."""

import asyncio
import json
import re
import signal
import socket
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
import requests
from click.testing import CliRunner
from control_groups import HOG, real_group
from converted import plain
from models import add_tokenizer, make_checkpoint
from served import KEY, TOKEN, Served, serving, told_token
from tiny_artifact import LARGER, make_artifact

import edgekit
from edgekit.cli import main
from edgekit.llama import Sampling
from edgekit.progress import Silent
from edgekit.server import ask as asks
from edgekit.server.app import _Answer
from edgekit.server.error import ApiError
from edgekit.server.worker import MAX_WAITING, Job, Worker

MIB = 1 << 20
ROOMY = "1GiB"
TEMPLATE = (
    "{% if messages[0].role == 'assistant' %}{{ raise_exception('begin with the user') }}"
    "{% endif %}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
)
GREEDY = Sampling(temperature=0, ignore_eos=True)
# what the official client has no argument for
EXACT = {"ignore_eos": True, "cache_prompt": False}
WORDS = ["def", "class", "return", "self", "import", "value", "key", "for"]
WORDS += ["in", "while", "if", "else", "try", "print", "open"]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve")
    fields = {"dtype": "bfloat16", "width": "wide", "num_hidden_layers": 1}
    checkpoint = make_checkpoint("llama", folder / "checkpoint", **fields)
    add_tokenizer(checkpoint, chat_template=TEMPLATE)
    return plain(checkpoint, folder / "artifact").artifact


@pytest.fixture(scope="module")
def served(artifact: Path) -> Iterator[Served]:
    with serving(artifact, "--budget", ROOMY, "--context", "512") as found:
        yield found


@pytest.fixture(scope="module")
def session(artifact: Path) -> Iterator[Any]:
    """The same model in this process: what single runs answer."""
    with edgekit.load(artifact, 1 << 30, 512, n_threads=1, follow=False) as loaded:
        yield loaded


def text_of(stream: Any) -> tuple[str, str, Any]:
    """All pieces of a stream, why it ended, its counts; all chunks belong together."""
    chunks = list(stream)
    assert len({(chunk.id, chunk.model, chunk.created) for chunk in chunks}) == 1
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    pieces = [c.delta.content if hasattr(c, "delta") else c.text for c in choices]
    reasons = [choice.finish_reason for choice in choices]
    assert reasons[:-1] == [None] * (len(reasons) - 1) and reasons[-1] is not None
    usages = [chunk.usage for chunk in chunks if chunk.usage is not None]
    assert len(usages) <= 1
    return "".join(piece or "" for piece in pieces), reasons[-1], usages[0] if usages else None


def wait_for(claim: Any, seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not claim():
        assert time.monotonic() < until, "it did not come true"
        time.sleep(0.02)


def test_200_streams_8_at_a_time_are_neither_lost_nor_mixed(served: Served, session: Any) -> None:
    client = served.client()
    prompts = [f"{WORDS[i % 15]} {WORDS[i // 15]} " * (1 + i % 5) for i in range(200)]

    def ask(prompt: str) -> tuple[str, str, Any]:
        return text_of(
            client.completions.create(
                model="any",
                prompt=prompt,
                max_tokens=10,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
                extra_body=EXACT,
            )
        )

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, prompts))
    assert len({text for text, _, _ in answers}) > 50
    for prompt, (text, reason, usage) in zip(prompts, answers, strict=True):
        generation = session.generate(prompt, 10, GREEDY, chat=False, anew=True)
        assert "".join(generation) == text
        assert (reason, usage.completion_tokens) == ("length", 10)
        assert usage.prompt_tokens == generation.timings.n_prompt


def test_a_conversation_has_the_models_template_and_its_counts(
    served: Served, session: Any
) -> None:
    client = served.client()
    messages: list[Any] = [
        {"role": "developer", "content": "be brief"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "def "}, {"type": "text", "text": "f"}],
        },
        {"role": "assistant", "content": "return"},
        {"role": "user", "content": "class"},
    ]
    fields: dict[str, Any] = {"temperature": 0, "max_completion_tokens": 12, "extra_body": EXACT}
    answer = client.chat.completions.create(model="any", messages=messages, **fields)
    prompt = "system: be brief\nuser: def f\nassistant: return\nuser: class\nassistant:"
    told = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "def f"}]
    generation = session.generate([*told, *messages[2:]], 12, GREEDY, anew=True)
    assert answer.choices[0].message.content == "".join(generation)
    assert answer.choices[0].message.role == "assistant" and answer.object == "chat.completion"
    ids = session.model.tokenize(prompt, parse_special=True)
    assert answer.usage and answer.usage.prompt_tokens == len(ids) == generation.timings.n_prompt
    assert answer.usage.total_tokens == len(ids) + 12
    stream = client.chat.completions.create(model="any", messages=messages, stream=True, **fields)
    text, reason, usage = text_of(stream)
    assert (text, reason, usage) == (answer.choices[0].message.content, "length", None)


def test_what_the_context_has_of_a_prompt_is_not_computed_again(served: Served) -> None:
    client, first = served.client(), "def add return self import value"
    fields: dict[str, Any] = {"model": "any", "max_tokens": 4, "temperature": 0}
    usages = []
    for prompt in (first, f"{first} key", f"{first} value"):
        answer = client.completions.create(prompt=prompt, **fields)
        assert answer.usage and answer.usage.prompt_tokens_details
        usages.append(
            (answer.usage.prompt_tokens, answer.usage.prompt_tokens_details.cached_tokens)
        )
    assert usages[1][1] >= usages[0][0] - 1 and usages[2][1] >= usages[0][0] - 1
    answer = client.completions.create(prompt=first, extra_body={"cache_prompt": False}, **fields)
    assert answer.usage and answer.usage.prompt_tokens_details
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


def test_seeds_stop_texts_and_limits_do_what_they_say(served: Served) -> None:
    client = served.client()
    fields: dict[str, Any] = {
        "model": "any",
        "prompt": "def",
        "max_tokens": 40,
        "extra_body": EXACT,
    }
    texts = [
        client.completions.create(temperature=1.5, top_p=0.9, seed=seed, **fields).choices[0].text
        for seed in (7, 7, 8, None, None)
    ]
    assert texts[0] == texts[1] and len(set(texts)) == 4
    greedy = client.completions.create(temperature=0, **fields).choices[0]
    tiny = client.completions.create(temperature=2, top_p=0, **fields).choices[0]
    assert tiny.text == greedy.text  # the likeliest only
    stop = greedy.text[10:13]
    for stops in (stop, ["never there", stop]):
        cut = client.completions.create(temperature=0, stop=stops, **fields).choices[0]
        assert cut.text == greedy.text[: greedy.text.index(stop)] and cut.finish_reason == "stop"
    fields.pop("max_tokens")
    whole = client.completions.create(temperature=0, **fields)
    assert whole.usage and whole.usage.total_tokens == 513  # the last is told, not computed
    assert whole.choices[0].finish_reason == "length"


def test_the_model_is_listed(served: Served) -> None:
    client = served.client()
    (model,) = client.models.list().data
    assert client.models.retrieve(model.id) == model
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        client.models.retrieve("other")
    assert served.get("/health").json() == {"status": "ok"}


LONG = {"prompt": "def " * 600}
ONE = {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("completions", b"{", 400, "the body is not valid JSON"),
        ("completions", b"[" * 60_000, 400, "the body is not valid JSON"),
        ("completions", b'{"prompt": "a", "top_p": NaN}', 400, "the number NaN"),
        ("completions", b"[]", 400, "needs a JSON object"),
        ("completions", b"\xff\xfe", 400, "the body is not valid JSON"),
        ("completions", {}, 400, "'prompt' is null, needs one text"),
        ("completions", {"prompt": ["a", "b"]}, 400, "needs one text"),
        ("completions", {"prompt": 3}, 400, "'prompt' is 3"),
        ("completions", {"prompt": ""}, 400, "'prompt' is"),
        ("completions", LONG, 400, "tokens, the context 512"),
        ("completions", {"prompt": "a", "max_tokens": -1}, 400, "'max_tokens' is -1"),
        ("completions", {"prompt": "a", "max_tokens": 0}, 400, "an integer, 1 or more"),
        ("completions", {"prompt": "a", "max_tokens": True}, 400, "'max_tokens' is true"),
        ("completions", {"prompt": "a", "max_tokens": 1 << 40}, 400, "'max_tokens'"),
        ("completions", {"prompt": "a", "n": -1}, 400, "'n' is -1, needs 1"),
        ("completions", {"prompt": "a", "n": 2}, 400, "'n' is 2, needs 1"),
        ("completions", {"prompt": "a", "temperature": -0.1}, 400, "a number from 0 to 2"),
        ("completions", {"prompt": "a", "temperature": "hot"}, 400, "'temperature' is \"hot\""),
        ("completions", {"prompt": "a", "top_p": 1.5}, 400, "a number from 0 to 1"),
        ("completions", {"prompt": "a", "seed": 1.5}, 400, "'seed' is 1.5, needs an integer"),
        ("completions", {"prompt": "a", "stop": [""]}, 400, "'stop'"),
        ("completions", {"prompt": "a", "stop": 3}, 400, "'stop' is 3"),
        ("completions", {"prompt": "a", "stream": "yes"}, 400, "'stream' is \"yes\""),
        ("completions", {"prompt": "a", "echo": True}, 400, "'echo' is true"),
        ("completions", {"prompt": "a", "logprobs": 3}, 400, "'logprobs' is 3"),
        ("completions", {"prompt": "a", "stream_options": {}}, 400, "needs stream: true"),
        ("completions", {"prompt": "a", "model": 3}, 400, "'model' is 3, needs a name"),
        ("completions", {"prompt": "a" * 80_000}, 413, "the body has more than"),
        ("chat/completions", {}, 400, "'messages' is null"),
        ("chat/completions", {"messages": []}, 400, "'messages' is []"),
        ("chat/completions", {"messages": ["a"]}, 400, "messages[0]"),
        ("chat/completions", {"messages": [{"role": "user"}]}, 400, "messages[0].content"),
        ("chat/completions", {"messages": [ONE | {"role": "king"}]}, 400, "messages[0].role"),
        ("chat/completions", {"messages": [ONE | {"content": [{"type": "image_url"}]}]}, 400,
         "a part of type text; others are not supported"),
        ("chat/completions", {"messages": [ONE | {"role": "assistant"}]}, 400,
         "chat template fails: begin with the user"),
        ("chat/completions", {"messages": [ONE], "tools": [{}]}, 400, "'tools'"),
        ("chat/completions", {"messages": [ONE], "response_format": {"type": "json_object"}}, 400,
         "'response_format'"),
        ("nonsense", {}, 404, "Not Found"),
        ("models", {}, 405, "Method Not Allowed"),
    ],
)  # fmt: skip
def test_malformed_requests_are_told_what_is_wrong(
    served: Served, path: str, body: Any, status: int, words: str
) -> None:
    data = body if isinstance(body, bytes) else json.dumps(body)
    headers = {"Content-Type": "application/json"}
    answer = requests.post(f"{served.url}/v1/{path}", data=data, headers=headers, timeout=60)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert words in error["message"] and error["type"] == "invalid_request_error"
    assert set(error) == {"message", "type", "param", "code"}
    assert "Traceback" not in served.errors.read_text()


def test_errors_arrive_in_the_official_client(served: Served) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        served.client().completions.create(model="any", prompt=str(LONG["prompt"]), stream=True)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as caught:
        served.client().completions.create(model="any", prompt="a", temperature=3)
    assert caught.value.param == "temperature"


def test_fields_that_nobody_knows_are_ignored(served: Served) -> None:
    body = {"prompt": ["a"], "max_tokens": 1, "user": "me", "keep_alive": 3, "n": 1, "tools": []}
    assert served.post("/v1/completions", body).status_code == 200


def test_a_web_page_cannot_ask(served: Served) -> None:
    """Neither by a form's content type, nor under a name of its own that leads to loopback."""
    data = json.dumps({"prompt": "a", "max_tokens": 1})
    url = f"{served.url}/v1/completions"
    answer = requests.post(url, data=data, headers={"Content-Type": "text/plain"}, timeout=60)
    assert answer.status_code == 415
    for path in ("/v1/models", "/health", "/metrics", "/budget"):
        for host in ("evil.example:80", "[::1", "localhost.evil.example"):
            answer = served.get(path, headers={"Host": host})
            assert answer.status_code == 421 and "ask for localhost" in answer.text
    port = served.url.rpartition(":")[2]
    assert served.get("/health", headers={"Host": f"localhost:{port}"}).status_code == 200
    assert not [name for name in answer.headers if name.lower().startswith("access-control")]


@pytest.mark.parametrize(
    "header", ["", TOKEN, f"Bearer {TOKEN[:-1]}", f"Basic {TOKEN}", "Bearer é"]
)
def test_the_budget_asks_for_its_token(served: Served, header: str) -> None:
    headers = {"Authorization": header.encode()}
    before = served.metrics()["edgekit_budget_bytes"]
    for answer in (
        served.get("/budget", headers=headers),
        served.post("/budget", {"budget": "200MiB"}, headers=headers),
    ):
        assert answer.status_code == 401 and answer.headers["WWW-Authenticate"] == "Bearer"
        assert answer.json()["error"]["code"] == "invalid_api_key"
    assert served.metrics()["edgekit_budget_bytes"] == before


def smallest(served: Served) -> int:
    """The budget in bytes that a refusal names."""
    answer = served.resize(1)
    match = re.search(r"the old depth stays: .* give --budget (\d+)MiB", answer.text)
    assert answer.status_code == 422 and match, answer.text
    return int(match[1]) * MIB


def test_a_lowered_budget_keeps_streams_alive(served: Served) -> None:
    client, least = served.client(), smallest(served)
    fields: dict[str, Any] = {"model": "any", "max_tokens": 150, "temperature": 0, "stream": True}
    resizes = 'edgekit_resizes_total{reason="asked"}'
    before = served.metrics().get(resizes, 0)
    with ThreadPoolExecutor(4) as pool:
        streams = [
            pool.submit(
                lambda p: text_of(client.completions.create(prompt=p, extra_body=EXACT, **fields)),
                word,
            )
            for word in WORDS[:4]
        ]
        sizes = []
        for budget in (least, "1GiB", least + 1, "2GiB"):
            answer = served.resize(budget)
            assert answer.status_code == 200, answer.text
            sizes.append(answer.json()["total_bytes"])
            if isinstance(budget, int):
                assert sizes[-1] <= budget
        assert sizes[0] < sizes[1] > sizes[2] < sizes[3]
        for stream in streams:
            text, reason, _ = stream.result(timeout=300)
            assert reason == "length" and len(text) > 150
    assert served.metrics()[resizes] == before + 4
    assert served.resize(ROOMY).status_code == 200


@pytest.mark.parametrize("budget", ["much", -1, True, None, [1], 1.5])
def test_a_budget_that_is_none_is_told(served: Served, budget: Any) -> None:
    answer = served.resize(budget)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "budget"


def gone(served: Served) -> float:
    return served.metrics().get('edgekit_answers_total{end="gone"}', 0)


def is_idle(served: Served) -> bool:
    now = served.metrics()
    return now["edgekit_requests_running"] == now["edgekit_requests_waiting"] == 0


def test_a_client_that_goes_away_stops_the_generation(served: Served) -> None:
    before, tokens = gone(served), served.metrics()["edgekit_generated_tokens_total"]
    fields: dict[str, Any] = {"model": "any", "prompt": "def", "extra_body": EXACT}
    fields |= {"max_tokens": 500}
    stream = served.client().completions.create(stream=True, **fields)
    next(iter(stream))
    with pytest.raises(openai.APITimeoutError):  # waits in line, in one piece
        served.client(timeout=0.05).completions.create(**fields)
    stream.close()
    wait_for(lambda: gone(served) == before + 2 and is_idle(served))
    assert served.metrics()["edgekit_generated_tokens_total"] < tokens + 900
    with pytest.raises(openai.APITimeoutError):  # while it is generated
        served.client(timeout=0.05).completions.create(**fields)
    wait_for(lambda: gone(served) == before + 3 and is_idle(served))


def test_metrics_are_prometheus_text(served: Served) -> None:
    answer = served.get("/metrics")
    assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    sample = re.compile(r'edgekit_\w+(\{\w+="[\w ]+"\})? -?[\d.e+]+')
    names = []
    for line in answer.text.splitlines():
        assert line.startswith(("# HELP edgekit_", "# TYPE edgekit_")) or sample.fullmatch(line)
        names += re.findall(r"^# TYPE (\w+) (?:gauge|counter)$", line)
    assert len(names) == len(set(names)) == answer.text.count("# HELP ")
    now = served.metrics()
    assert now["edgekit_resident_bytes"] <= now["edgekit_budget_bytes"]
    assert now["edgekit_tokens_per_second"] > 0 < now["edgekit_depth_bits_per_weight"]


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


def test_signals_halve_the_budget_and_bring_it_back(artifact: Path) -> None:
    with serving(artifact, "--budget", ROOMY, "--context", "512") as served:
        for number, budget in ((signal.SIGUSR1, 1 << 29), (signal.SIGUSR2, 1 << 30)):
            served.process.send_signal(number)
            wait_for(lambda b=budget: served.metrics()["edgekit_budget_bytes"] == b)
        served.process.send_signal(signal.SIGINT)  # the terminal's
        psutil.Process(served.pid).send_signal(signal.SIGINT)
        assert served.process.wait(timeout=120) == 0


def test_a_key_is_asked_for_and_a_token_is_made_and_told(artifact: Path, tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text(f"{KEY}\n")
    words = ["--budget", ROOMY, "--context", "512", "--api-key-file", str(path)]
    with serving(artifact, *words, environment=False) as served:
        for key in ("", "wrong", KEY[:-1]):
            headers = {"Authorization": f"Bearer {key}"}
            assert served.get("/v1/models", headers=headers).status_code == 401
            body = {"prompt": "a", "max_tokens": 1}
            answer = served.post("/v1/completions", body, headers=headers)
            assert answer.status_code == 401
        assert served.get("/health").status_code == 200
        client = served.client(KEY)
        assert client.completions.create(model="any", prompt="a", max_tokens=1).choices
        token = {"Authorization": f"Bearer {told_token(served)}"}
        assert served.get("/budget", headers=token).json()["budget_bytes"] == 1 << 30
        assert served.get("/budget", headers={"Authorization": f"Bearer {KEY}"}).status_code == 401


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


def invoke(*words: str) -> Any:
    return CliRunner().invoke(main, ["serve", *words])


def test_what_cannot_be_served_is_told_in_one_line(artifact: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        result = invoke(str(artifact), "--budget", ROOMY, "--port", port)
    assert result.exit_code == 1 and "cannot listen on 127.0.0.1 port" in result.stderr
    short = tmp_path / "short"
    short.write_text("abc")
    result = invoke(str(artifact), "--budget", ROOMY, "--api-key-file", str(short))
    assert result.exit_code == 2 and "has 3 characters; a token needs 8" in result.stderr
    result = invoke(str(artifact), "--budget", "1MiB", "--port", "0")
    assert result.exit_code == 3 and "give --budget" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("Error: ")


def test_without_its_libraries_it_tells_what_to_install(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [n for n in sys.modules if n.split(".")[0] in ("uvicorn", "starlette")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("edgekit.server.app", "edgekit.server.bodies", "edgekit.server.listen"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "starlette", None)
    result = invoke(str(artifact), "--budget", ROOMY)
    assert result.exit_code == 2 and "pip install 'edgekit[serve]'" in result.stderr


def test_a_host_that_others_reach_is_warned_of(artifact: Path) -> None:
    words = ["--budget", ROOMY, "--context", "512", "--host", "0.0.0.0"]
    with serving(artifact, *words) as served:
        assert "anyone who reaches 0.0.0.0 may use the model" in served.errors.read_text()
        assert served.get("/health", headers={"Host": "any.example"}).status_code == 200


def test_a_model_without_a_template_gets_the_texts(llama_artifact: Path) -> None:
    with serving(llama_artifact, "--budget", ROOMY, "--context", "512") as served:
        fields: dict[str, Any] = {"model": "any", "temperature": 0, "max_tokens": 8}
        messages: Any = [{"role": "user", "content": word} for word in ("def", "add")]
        client = served.client()
        chat = client.chat.completions.create(messages=messages, extra_body=EXACT, **fields)
        text = client.completions.create(prompt="def\nadd", extra_body=EXACT, **fields)
        assert chat.choices[0].message.content == text.choices[0].text
