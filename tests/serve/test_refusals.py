"""What ``edgekit serve`` refuses, and how it says so."""

import json
import socket
import sys
from pathlib import Path
from typing import Any

import openai
import pytest
import requests
from click.testing import CliRunner
from served import KEY, ROOMY, TOKEN, Served, serving, told_token

from edgekit.cli import main

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


@pytest.mark.parametrize("budget", ["much", -1, True, None, [1], 1.5])
def test_a_budget_that_is_none_is_told(served: Served, budget: Any) -> None:
    answer = served.resize(budget)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "budget"


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


def test_a_host_that_others_reach_is_warned_of(artifact: Path) -> None:
    words = ["--budget", ROOMY, "--context", "512", "--host", "0.0.0.0"]
    with serving(artifact, *words) as served:
        assert "anyone who reaches 0.0.0.0 may use the model" in served.errors.read_text()
        assert served.get("/health", headers={"Host": "any.example"}).status_code == 200


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
