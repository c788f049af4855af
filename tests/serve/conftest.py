"""A small model with a chat template: served, and in this process to compare with."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from converted import plain
from models import add_tokenizer, make_checkpoint
from served import ROOMY, Served, serving

import edgekit
from edgekit.session import Session

TEMPLATE = (
    "{% if messages[0].role == 'assistant' %}{{ raise_exception('begin with the user') }}"
    "{% endif %}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
)


@pytest.fixture(scope="session")
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
def session(artifact: Path) -> Iterator[Session]:
    """The same model in this process: what single runs answer."""
    with edgekit.load(artifact, 1 << 30, 512, n_threads=1, follow=False) as loaded:
        yield loaded
