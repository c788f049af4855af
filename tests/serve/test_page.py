"""What docs/serve.md shows, run as it stands there, on the port of the test."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from served import MIB, ROOMY, TOKEN, Served

PAGE = Path(__file__).parents[2] / "docs/serve.md"


def block(language: str, word: str, served: Served) -> str:
    """The fenced block that has ``word`` in it."""
    text = PAGE.read_text(encoding="utf-8")
    (found,) = (
        b for b in re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S) if word in b
    )
    assert "http://127.0.0.1:8080/" in found
    return str(found.replace("http://127.0.0.1:8080", served.url))


def test_the_client_prints_an_answer(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    exec(block("python", "OpenAI", served), {})
    assert capsys.readouterr().out.strip()


def test_curl_changes_the_budget(served: Served) -> None:
    words = ["bash", "-c", block("bash", "curl", served)]
    environment = os.environ | {"EDGEKIT_BUDGET_TOKEN": TOKEN}
    answer = subprocess.run(words, env=environment, capture_output=True, check=True).stdout
    assert json.loads(answer)["budget_bytes"] == 900 * MIB
    assert served.resize(ROOMY).status_code == 200
