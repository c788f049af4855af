"""The browser sample: the page answers in Chromium, transformers.js on Node gives our tokens.

Needs node, npm and, for the page, Chromium. The packages of samples/web/package-lock.json (470 MB)
are installed beside it once. Node's onnxruntime is often older than Python's: where that matters,
Python's of the same version is installed into a folder.
"""

import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from onnx_models import float_graph, logits_of, onnx_artifact

from edgekit.exporters.onnx_configs import MODEL
from edgekit.llama import Sampling
from edgekit.onnx.artifact import open_onnx
from edgekit.onnx.cache import cached_folder
from edgekit.onnx.materialize import materialize_onnx
from edgekit.onnx_runtime import Tokenizer, open_runner
from edgekit.onnx_runtime.sampler import Sampler

ROOT = Path(__file__).resolve().parents[1]
WEB = ROOT / "samples" / "web"
PROMPT, N = "def read(path):", 64
SECONDS = 300  # of a program, at most
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
FLOAT_EXPERTS = {"ORT_QMOE_CPU_QNBIT_GEMM": "0"}  # as onnxruntime before 1.32 computes 8 bits
pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def node() -> str:
    """Node, with the sample's packages installed."""
    found, npm = shutil.which("node"), shutil.which("npm")
    if found is None or npm is None:
        pytest.skip("node and npm are not installed")
    stamp = WEB / "node_modules" / ".package-lock.json"
    if not stamp.is_file() or stamp.stat().st_mtime < (WEB / "package-lock.json").stat().st_mtime:
        words = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
        done = subprocess.run(words, cwd=WEB, capture_output=True, text=True, timeout=SECONDS)
        if done.returncode:
            pytest.skip(f"npm cannot install the sample's packages: {done.stderr[-300:]}")
    return found


@pytest.fixture(scope="module", params=["tiny-llama", "tiny-moe"])
def made(request, tmp_path_factory):
    """A sample's name, its artifact, and its model folder of 8 bits."""
    folder = tmp_path_factory.mktemp(request.param)
    artifact = onnx_artifact(ROOT / "samples" / request.param, folder / "artifact")
    materialize_onnx(open_onnx(artifact), 8, folder / "model")
    return request.param, artifact, folder / "model"


def prompt_ids(folder: Path) -> list[int]:
    return Tokenizer(folder).encode(PROMPT)


def tokens_in_python(artifact: Path) -> tuple[list[int], list[np.ndarray]]:
    """Greedy tokens in onnxruntime, one by one with the cache, and the logits of each."""
    opened = open_onnx(artifact)
    place, facts = cached_folder(opened, 8), opened.part.facts
    runner, sampler = open_runner(place, facts, 128, 128, 1, genai=False), Sampler(Sampling(0.0))
    found, rows = [], [runner.decode(prompt_ids(artifact / "onnx"))]
    for _ in range(N):
        found.append(sampler.draw(rows[-1]))
        rows.append(runner.decode(found[-1:]))
    runner.close()
    return found, rows


def margin(got: list[int], want: list[int], rows: list[np.ndarray]) -> float:
    """How much Python prefers its token at the first difference; 0 where all are equal."""
    assert len(got) == N
    triples = zip(got, want, rows, strict=False)
    return next((float(row[b] - row[a]) for a, b, row in triples if a != b), 0.0)


def tokens_on_node(node: str, folder: Path) -> list[int]:
    words = [node, "generate.mjs", str(folder), str(N), *map(str, prompt_ids(folder))]
    done = subprocess.run(
        words, cwd=WEB, capture_output=True, text=True, check=True, timeout=SECONDS
    )
    found: list[int] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_node_gives_the_tokens_of_python(node, made, monkeypatch):
    """All of them where experts' activations stay in float32, as onnxruntime-node 1.30 has them.

    From 1.32 on their products round activations to 8 bits: Python leaves Node's tokens at a near
    tie of the two likeliest.
    """
    _, artifact, folder = made
    got, (want, rows) = tokens_on_node(node, folder), tokens_in_python(artifact)
    assert margin(got, want, rows) < 0.02  # seen: 0 for tiny-llama, 0.011 for tiny-moe
    for key, value in FLOAT_EXPERTS.items():
        monkeypatch.setenv(key, value)
    assert tokens_in_python(artifact)[0] == got


@pytest.fixture(scope="session")
def same_onnxruntime(tmp_path_factory) -> Path:
    """A folder with Python's onnxruntime of the version that Node has."""
    lock = json.loads((WEB / "package-lock.json").read_text())
    version = lock["packages"]["node_modules/onnxruntime-node"]["version"]
    folder = tmp_path_factory.mktemp("onnxruntime")
    words = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder]
    done = subprocess.run(
        [*words, f"onnxruntime=={version}"], capture_output=True, text=True, timeout=SECONDS
    )
    if done.returncode:
        pytest.skip(f"onnxruntime {version} cannot be installed: {done.stderr[-300:]}")
    return folder


@pytest.mark.parametrize("runtime", ["onnxruntime", "onnxruntime-genai"])
def test_all_runtimes_give_the_same_tokens(node, made, same_onnxruntime, runtime):
    """Of one version of onnxruntime, as it is."""
    _, _, folder = made
    ids = prompt_ids(folder)
    words = [sys.executable, Path(__file__).with_name("onnx_tokens.py"), runtime, folder, str(N)]
    done = subprocess.run(
        [*words, *map(str, ids)],
        env={**os.environ, "PYTHONPATH": str(same_onnxruntime)},
        capture_output=True,
        text=True,
        check=True,
        timeout=SECONDS,
    )
    found = json.loads(done.stdout)
    assert Path(found["library"]).is_relative_to(same_onnxruntime)
    assert len(found["tokens"]) == N and found["tokens"] == tokens_on_node(node, folder)


def test_node_gives_the_float_tokens_of_python(node, made, tmp_path):
    """The model as it is, in float32: onnxruntime's greedy tokens, whole text anew each time."""
    name, _, folder = made
    copy = Path(shutil.copytree(folder, tmp_path / "model"))
    graph = float_graph(ROOT / "samples" / name, tmp_path)
    (copy / MODEL).write_bytes(graph.read_bytes())
    (copy / "onnx" / "model.onnx_data").write_bytes((tmp_path / "float.bin").read_bytes())
    renamed(copy / MODEL, "model.onnx_data")
    ids = prompt_ids(folder)
    for _ in range(N):
        ids.append(int(logits_of(graph, np.array([ids]), len(ids))[0, -1].argmax()))
    assert tokens_on_node(node, copy) == ids[-N:]


def renamed(graph: Path, data: str) -> None:
    """Let a graph read its weights from another file."""
    import onnx

    model = onnx.load(graph, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            entry.value = data if entry.key == "location" else entry.value
    graph.write_bytes(model.SerializeToString())


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def page(node, made, tmp_path):
    """Address of the page, served with a model folder beside it."""
    _, _, folder = made
    for path in WEB.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "sample").symlink_to(folder)
    handler = functools.partial(Quiet, directory=str(tmp_path))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/index.html?model=sample&n={N}&run"
    server.shutdown()
    server.server_close()


def test_the_page_answers_in_chromium(page, made, tmp_path, monkeypatch):
    """WebAssembly has kernels of its own, so near ties may fall differently; see docs/onnx.md."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("Chromium is not installed")
    words = [chromium, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}",
             "--virtual-time-budget=300000", "--dump-dom", page]  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS)
    assert 'data-done="yes"' in done.stdout, done.stdout[-2000:]
    got = json.loads(re.search(r'data-tokens="([^"]*)"', done.stdout)[1])
    for key, value in FLOAT_EXPERTS.items():
        monkeypatch.setenv(key, value)
    assert margin(got, *tokens_in_python(made[1])) < 0.02  # seen: 0 for both, all tokens equal
    assert PROMPT in done.stdout
