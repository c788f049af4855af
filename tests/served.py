"""``edgekit serve`` as a process of its own, for tests and benchmarks."""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import psutil
import requests

MIB = 1 << 20
ROOMY = "1GiB"  # more than the small models of the tests need
# what the official client has no argument for
EXACT = {"ignore_eos": True, "cache_prompt": False}
WORDS = ["def", "class", "return", "self", "import", "value", "key", "for"]
WORDS += ["in", "while", "if", "else", "try", "print", "open"]
TOKEN, KEY = "a token for the budget", "a key for the models"
Start = Callable[..., "subprocess.Popen[str]"]


@dataclass(frozen=True)
class Served:
    """A server that is ready.

    Attributes:
        process: Its parent process; signals are passed on.
        pid: Of the process that holds the model.
        url: ``http://127.0.0.1:port``.
        errors: What it writes to stderr.
    """

    process: "subprocess.Popen[str]"
    pid: int
    url: str
    errors: Path

    def client(self, key: str = "none", **options: Any) -> openai.OpenAI:
        """The official client, without retries."""
        options = {"max_retries": 0, "timeout": 300} | options
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, **options)

    def post(self, path: str, body: Any = None, **options: Any) -> requests.Response:
        """Send ``body`` as JSON."""
        return requests.post(self.url + path, json=body, timeout=120, **options)

    def get(self, path: str, **options: Any) -> requests.Response:
        """Read."""
        return requests.get(self.url + path, timeout=120, **options)

    def resize(self, budget: int | str) -> requests.Response:
        """Ask for another budget."""
        return self.post(
            "/budget", {"budget": budget}, headers={"Authorization": f"Bearer {TOKEN}"}
        )

    def metrics(self) -> dict[str, float]:
        """Every sample by name and labels."""
        rows = (line.rsplit(" ", 1) for line in self.get("/metrics").text.splitlines())
        return {row[0]: float(row[1]) for row in rows if not row[0].startswith("#")}


@contextmanager
def serving(
    artifact: Path, *words: str, start: Start = subprocess.Popen, environment: bool = True
) -> Iterator[Served]:
    """Serve ``artifact`` on a free port; killed at the end if it still runs.

    One thread, unless ``words`` say otherwise: a second one waits for it on a busy machine.
    """
    command = [sys.executable, "-m", "edgekit", "serve", str(artifact), "--port", "0", "--json"]
    command += ["--threads", "1"]
    secrets = {"EDGEKIT_BUDGET_TOKEN": TOKEN} if environment else {}
    with (
        tempfile.TemporaryDirectory() as folder,
        Path(folder, "log").open("w") as log,
        start(
            [*command, *words],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=os.environ | secrets,
        ) as process,
    ):
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, Path(log.name).read_text()
        body = json.loads(line)
        try:
            yield Served(process, body["pid"], body["url"], Path(log.name))
        finally:
            process.kill()
            with suppress(psutil.NoSuchProcess):  # it ends with its parent
                psutil.Process(body["pid"]).wait(20)


def told_token(served: Served) -> str:
    """The token that the server made and told."""
    found = re.search(r"token for /budget: (\S+)", served.errors.read_text())
    assert found
    return found[1]


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
    """Until ``claim()`` is true."""
    until = time.monotonic() + seconds
    while not claim():
        assert time.monotonic() < until, "it did not come true"
        time.sleep(0.02)


def smallest(served: Served) -> int:
    """The budget in bytes that a refusal names."""
    answer = served.resize(1)
    match = re.search(r"the old depth stays: .* give --budget (\d+)MiB", answer.text)
    assert answer.status_code == 422 and match, answer.text
    return int(match[1]) * MIB
