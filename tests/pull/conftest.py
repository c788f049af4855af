"""A small artifact, a server of it, and a place for what is pulled."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
from static_server import Served, serving
from tiny_artifact import SHAPE, make_artifact

from edgekit import pull as module


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1.4 MiB, of which 0.9 are levels."""
    shape = dataclasses.replace(SHAPE, num_hidden_layers=2, intermediate_size=512)
    return make_artifact(tmp_path_factory.mktemp("pull"), shape)


@pytest.fixture
def server(artifact: Path) -> Iterator[Served]:
    with serving(artifact) as served:
        yield served


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(module, "LONGEST_WAIT", 0.01)
    return tmp_path / "edge"
