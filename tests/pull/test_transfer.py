"""What ``edgekit pull`` transfers: what a budget needs and no more, from any server."""

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from pulling import BASE, LEVELS, budgets, pull, pulled
from static_server import CUT_AFTER, Served, serving

from edgekit import pull as module
from edgekit.artifact import open_artifact, verify
from edgekit.catalog import open_catalog
from edgekit.expert_plan import plan_any
from edgekit.plan import least_bytes, plan_budget
from edgekit.progress import Silent
from edgekit.sizes import format_size

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")


def is_beginning(part: Path, whole: Path) -> bool:
    return whole.read_bytes().startswith(part.read_bytes())


@contextmanager
def python_server(folder: Path) -> Iterator[str]:
    """``python -m http.server``, which has no ranges."""
    command = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1"]
    with subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().split("(")[1].split(")")[0]
        finally:
            process.terminate()


@contextmanager
def nginx(folder: Path, place: Path) -> Iterator[str]:
    if NGINX is None:
        pytest.skip("nginx is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    temporary = "".join(
        f"{kind}_temp_path {place};"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    conf = place / "nginx.conf"
    conf.write_text(
        f"daemon off; master_process off; pid {place}/pid; error_log {place}/log;"
        f"events {{}} http {{ access_log off; {temporary}"
        f"server {{ listen 127.0.0.1:{port}; root {folder}; }} }}"
    )
    command = [NGINX, "-e", f"{place}/log", "-c", str(conf)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.02)
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


@contextmanager
def source(kind: str, artifact: Path, place: Path) -> Iterator[str]:
    """The URL of the artifact, served in one of four ways."""
    if kind == "file":
        yield artifact.as_uri()
    elif kind == "ranges":
        with serving(artifact) as served:
            yield served.url
    else:
        server = nginx(artifact, place) if kind == "nginx" else python_server(artifact)
        with server as url:
            yield url


@pytest.mark.parametrize("kind", ["file", "ranges", "nginx", "python"])
def test_five_budgets_transfer_what_their_plans_name_and_load_like_the_whole(
    kind: str, artifact: Path, tmp_path: Path
) -> None:
    with source(kind, artifact, tmp_path) as url:
        needed = []
        for i, budget in enumerate(budgets(artifact)):
            out = tmp_path / f"edge{i}"
            body = pulled(url, "-o", out, "--budget", budget, "--context", 256)
            extra = 1 << 16 if kind == "python" else 0  # the block in which the stream was left
            most = 1.01 * body["total_bytes"] + extra
            assert body["total_bytes"] <= body["transferred_bytes"] <= most
            here = [out / "edgekit.json", out / BASE, out / LEVELS]
            assert sum(path.stat().st_size for path in here) == body["total_bytes"]
            assert is_beginning(out / LEVELS, artifact / LEVELS)
            whole = plan_budget(open_catalog(artifact), budget, 256)
            with open_artifact(out) as opened:
                found = plan_budget(opened, budget, 256)
                assert found.depths == whole.depths and found.batch >= whole.batch
                assert verify(opened).ok
            needed.append(body["levels_bytes"])
        assert needed == sorted(set(needed))  # each more than the one before
        assert needed[0] == 0 and needed[-1] == (artifact / LEVELS).stat().st_size


def test_what_the_plan_passes_over_is_told_before_it_comes(
    server: Served, artifact: Path, out: Path
) -> None:
    lowest, *_, highest = budgets(artifact)
    passed_over = {}
    for budget in range(lowest, highest, (highest - lowest) // 16):
        body = pulled(server.url, "-o", out, "--budget", budget, "--context", 256, "--dry-run")
        passed_over[budget] = body["passed_over_bytes"]
    budget = max(passed_over, key=lambda budget: passed_over[budget])
    told = []

    class Told(Silent):
        def note(self, text: str) -> None:
            told.append((text, server.requests[n_before:]))

    n_before = len(server.requests)
    module.pull(server.url, out, module.Wish(budget, 256), Told())
    ((text, asked),) = told
    assert asked == [("edgekit.json", "")]
    assert f" of levels ({format_size(passed_over[budget])} of them for other budgets)" in text
    with open_artifact(out) as opened:
        tiers = plan_budget(opened, budget, 256).depths.tiers
        unused = [
            level.n_bytes
            for stack in opened.stacks
            for level in stack.levels[stack.tiers.index(tiers[stack.name]) + 1 :]
        ]
    assert passed_over[budget] == sum(unused) > 0


def test_a_budget_for_some_experts_gets_what_their_plan_loads(
    moe_artifact: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgekit.expert_plan.PAGING_BYTES", 0)  # more than this model's experts
    whole = open_catalog(moe_artifact)
    budget = least_bytes(whole, 256) - 1
    body = pulled(moe_artifact.as_uri(), "-o", out, "--budget", budget, "--context", 256)
    plan = plan_any(whole, budget, 256)
    assert plan.paged is not None
    assert {t["name"]: t["tier"] for t in body["plan"]["tensors"]} == plan.depths.tiers
    with open_artifact(out) as opened:
        assert plan_any(opened, budget, 256).depths == plan.depths


@pytest.mark.parametrize("kind", ["file", "ranges", "nginx", "python"])
def test_an_artifact_grows_where_it_stands(kind: str, artifact: Path, tmp_path: Path) -> None:
    out = tmp_path / "edge"
    _, _, middle, *_ = budgets(artifact)
    with source(kind, artifact, tmp_path) as url:
        first = pulled(url, "-o", out, "--budget", middle, "--context", 256)
        inode = (out / LEVELS).stat().st_ino
        again = pulled("--grow", "-o", out, "--budget", middle, "--context", 256)
        assert again["transferred_bytes"] == first["manifest_bytes"]
        more = pulled("--grow", "-o", out, "--budget", "1GiB")
    if kind != "python":  # reads from the start, and says so
        new = more["levels_bytes"] - first["levels_bytes"]
        assert more["transferred_bytes"] == first["manifest_bytes"] + new
    assert (out / LEVELS).stat().st_ino == inode
    assert (out / LEVELS).read_bytes() == (artifact / LEVELS).read_bytes()


def test_a_server_without_ranges_is_told_of_when_bytes_come_twice(artifact, tmp_path) -> None:
    out = tmp_path / "edge"
    with python_server(artifact) as url:
        pulled(url, "-o", out, "--budget", budgets(artifact)[2], "--context", 256)
        result = pull("--grow", "-o", out, "--budget", "1GiB")
    assert result.exit_code == 0
    assert "has no byte ranges" in result.stderr and "come again" in result.stderr


def test_a_cut_connection_goes_on_where_it_was_cut(server: Served, out: Path) -> None:
    server.fault = "cut"
    body = pulled(server.url, "-o", out, "--budget", "1GiB")
    ranges = [asked for name, asked in server.requests if name == LEVELS]
    assert len(ranges) > body["levels_bytes"] / CUT_AFTER > 3
    assert body["transferred_bytes"] == body["total_bytes"]
    with open_artifact(out) as opened:
        assert verify(opened).ok and verify(opened).missing == 0


def test_a_busy_server_is_asked_again(server: Served, out: Path) -> None:
    server.fault = "busy"
    assert pulled(server.url, "-o", out, "--budget", "1GiB")["levels_bytes"]
