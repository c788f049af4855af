"""The jobs of a conversion in other processes: same bytes, also when a worker is killed."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from bench.checkpoints import Shape, make_checkpoint
from converted import unmeasured

from edgekit.arch import map_checkpoint
from edgekit.checkpoint import Checkpoint
from edgekit.convert import convert
from edgekit.encode import Task, open_encoder
from edgekit.errors import EdgekitError, RefusedError
from edgekit.progress import Silent
from edgekit.spool import Spool
from edgekit.workers import run_local

SHAPE = Shape(2, 256, 512, 4, 2, 64, 512)
TIERS = ("Q2_K", "B1", "B2", "source")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("workers") / "model", SHAPE)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def task_of(checkpoint: Path, folder: Path) -> Task:
    spool = Spool(folder / "spool")
    spool.open({}, [], resume=False)
    return Task(checkpoint, spool.folder, "bitstack", TIERS, 0, None, None)


def test_a_process_that_has_only_the_files_writes_the_same_bytes(checkpoint, tmp_path):
    ours, theirs = (tmp_path / name for name in ("ours", "theirs"))
    task, other = task_of(checkpoint, ours), task_of(checkpoint, theirs)
    n = len(map_checkpoint(Checkpoint.open(checkpoint)).tensors)
    assert sorted(run_local(open_encoder(task), task, range(n), 2, None)) == list(range(n))
    code = (
        "import sys; from pathlib import Path; from edgekit.encode import Task; "
        "from edgekit.workers import encode_alone; a, b = map(Path, sys.argv[1:3]); "
        f"t = Task(a, b, 'bitstack', {TIERS}, 0, None, None); "
        f"[encode_alone(t, i) for i in range({n})]"
    )
    subprocess.run([sys.executable, "-c", code, checkpoint, other.spool], check=True)
    wanted = contents(task.spool)
    assert len(wanted) == 2 * n + 1 and contents(other.spool) == wanted


def test_a_job_done_twice_at_once_is_done_once(checkpoint, tmp_path):
    task = task_of(checkpoint, tmp_path)
    encoder = open_encoder(task)
    list(run_local(encoder, task, [2] * 6, 3, None))
    assert len(contents(task.spool)) == 3  # data, record, the conversion's own file


def test_the_first_error_of_a_job_ends_the_conversion(checkpoint, tmp_path):
    class Broken:
        def encode(self, index: int, in_order: object) -> None:
            raise RefusedError("tensor has NaN")

    with pytest.raises(RefusedError, match="has NaN"):
        list(run_local(Broken(), task_of(checkpoint, tmp_path), range(9), 2, None))


def test_without_ray_the_message_says_what_to_install(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    options = unmeasured(TIERS, statistics=False, codec="bitstack", engine="ray")
    with pytest.raises(EdgekitError, match=r"pip install 'edgekit\[cluster\]'"):
        convert(checkpoint, tmp_path / "edge", options, Silent())


@pytest.fixture
def cluster():
    """Two nodes with one processor each, on this machine; yields their address."""
    ray = pytest.importorskip("ray", reason="pip install 'edgekit[cluster]'")
    from ray.cluster_utils import Cluster

    environment = {k: os.environ.pop(k, None) for k in ("PYTHONPATH",)}
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    made.add_node(num_cpus=1)
    yield made.address
    ray.shutdown()
    made.shutdown()
    for key, value in environment.items():
        os.environ.pop(key) if value is None else os.environ.update({key: value})


def kill_a_worker(stop: threading.Event, killed: list[int]) -> None:
    """Kill the first process that works on a job for Ray."""
    while not stop.is_set() and not killed:
        for process in psutil.process_iter(["cmdline"]):
            if "ray::encode_alone" in " ".join(process.info["cmdline"] or ()):
                process.send_signal(signal.SIGKILL)
                killed.append(process.pid)
                break
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["bitstack", "nested"])
def test_a_worker_killed_in_the_middle_changes_nothing(checkpoint, tmp_path, cluster, codec):
    tiers = TIERS if codec == "bitstack" else ("Q2_K", "Q4_K", "source")
    base = unmeasured(tiers, statistics=False, codec=codec)
    convert(checkpoint, tmp_path / "edge", base, Silent())
    wanted = contents(tmp_path / "edge")
    (tmp_path / "edge").rename(tmp_path / "local")
    on_ray = unmeasured(tiers, statistics=False, codec=codec, engine="ray", address=cluster)
    stop, killed = threading.Event(), list[int]()
    killer = threading.Thread(target=kill_a_worker, args=(stop, killed))
    killer.start()
    try:
        convert(checkpoint, tmp_path / "edge", on_ray, Silent())
    finally:
        stop.set()
        killer.join()
    assert killed
    assert contents(tmp_path / "edge") == wanted


def test_a_cluster_that_is_not_there_is_told(checkpoint, tmp_path):
    pytest.importorskip("ray", reason="pip install 'edgekit[cluster]'")
    options = unmeasured(
        TIERS, statistics=False, codec="bitstack", engine="ray", address="127.0.0.1:1"
    )
    with pytest.raises(EdgekitError, match=r"no Ray cluster at 127.0.0.1:1"):
        convert(checkpoint, tmp_path / "edge", options, Silent())
