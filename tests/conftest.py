"""Settings for the whole suite: no network, few threads, the same examples on every run."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

# Before anything imports torch or tokenizers; the suite runs on small machines.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["OMP_WAIT_POLICY"] = "passive"  # llama.cpp's threads sleep when they wait
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
if not any(Path("/dev").glob("nvidia[0-9]*")):
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("TRITON_INTERPRET", "0")

import json
import signal
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import settings

settings.register_profile("edgekit", deadline=None, derandomize=True, database=None)
settings.load_profile("edgekit")


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_suite(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing is left in the user's cache, and nothing is found there."""
    os.environ["EDGEKIT_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session", autouse=True)
def interrupts_are_heard() -> None:
    """A suite that a shell runs in the background begins with Ctrl-C ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def nothing_held_before() -> Iterator[None]:
    """Torch and all else that this process holds would count in a session's budget."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("loader", "onnx_session"):
            patch.setattr(f"edgekit.{module}.held_bytes", lambda: 0)
        yield


@pytest.fixture(scope="session")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``stored(model_type, dtype)``: a checkpoint, made once."""
    from models import make_checkpoint

    from edgekit.checkpoint import Checkpoint

    cache: dict[tuple[str, str], Checkpoint] = {}

    def make(model_type: str, dtype: str = "float32") -> Checkpoint:
        if (model_type, dtype) not in cache:
            folder = tmp_path_factory.mktemp(f"{model_type}-{dtype}")
            cache[model_type, dtype] = Checkpoint.open(make_checkpoint(model_type, folder, dtype))
        return cache[model_type, dtype]

    return make


@pytest.fixture(scope="session")
def llama_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with rows of 256 as an artifact of the default tiers; to be read only."""
    from converted import tiny, weighted

    folder = tmp_path_factory.mktemp("llama")
    checkpoint = tiny(folder / "checkpoint", dtype="bfloat16", width="wide", num_hidden_layers=1)
    return weighted(checkpoint, folder / "artifact").artifact


@pytest.fixture(scope="session")
def layered_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of six layers, so that budgets of whole MiB reach several depths."""
    from converted import tiny, weighted

    folder = tmp_path_factory.mktemp("layered")
    checkpoint = tiny(folder / "checkpoint", dtype="bfloat16", width="wide", num_hidden_layers=6)
    return weighted(checkpoint, folder / "artifact").artifact


@pytest.fixture(scope="session")
def moe_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3-MoE with narrow rows as an artifact of the default tiers; to be read only."""
    from converted import plain, tiny

    folder = tmp_path_factory.mktemp("moe")
    checkpoint = tiny(folder / "checkpoint", "qwen3_moe", dtype="bfloat16")
    return plain(checkpoint, folder / "artifact").artifact


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of one layer, converted without statistics; to be copied and damaged."""
    from tiny_artifact import make_artifact

    return make_artifact(tmp_path_factory.mktemp("sound"))


@pytest.fixture(scope="module")
def run() -> Iterator[Callable[..., dict[str, Any]]]:
    """Run ``edgekit`` in a child of a warm process, perhaps to be killed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, Path(__file__).with_name("fork_server.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as server:
        assert server.stdin and server.stdout
        stdin, stdout = server.stdin, server.stdout

        def ask(cwd: Path, *args: str, **kill: float) -> dict[str, Any]:
            command = {"cwd": str(cwd), "args": args, "kill_after": None, "kill_at_change": None}
            stdin.write(json.dumps(command | kill) + "\n")
            stdin.flush()
            answer: dict[str, Any] = json.loads(stdout.readline())
            return answer

        yield ask
        stdin.close()
