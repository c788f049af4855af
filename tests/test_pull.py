"""``edgekit pull``: what a budget needs and no more, from any server, believed in nothing."""

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
from click.testing import CliRunner, Result
from static_server import CUT_AFTER, Served, serving
from tiny_artifact import SHAPE, make_artifact

from edgekit import pull as module
from edgekit.artifact import open_artifact, verify
from edgekit.catalog import open_catalog
from edgekit.cli import main
from edgekit.errors import RefusedError
from edgekit.manifest import dumps
from edgekit.manifest_reader import loads
from edgekit.plan import plan_budget
from edgekit.progress import Silent
from edgekit.remote import HttpSource

BASE, LEVELS = "checkpoint-Q2_K.gguf", "checkpoint.levels"
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")


@pytest.fixture(scope="module")
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


def pull(*words: object) -> Result:
    return CliRunner().invoke(main, ["pull", *map(str, words)])


def pulled(*words: object) -> Any:
    result = pull(*words, "--json")
    assert result.exit_code == 0, (result.stderr, result.exception)
    return json.loads(result.stdout)


def check_refused(result: Result, code: int, words: str, out: Path) -> None:
    """One line that says ``words``, and nothing under the final name."""
    assert (result.exit_code, result.stdout) == (code, ""), (result.stderr, result.exception)
    last = result.stderr.splitlines()[-1]
    assert last.startswith("Error: ") and words in last, result.stderr
    assert "Traceback" not in result.stderr and not out.exists()


def budgets(artifact: Path) -> list[int]:
    """Five, from the lowest depth to all of it; bytes."""
    catalog = open_catalog(artifact)
    top = plan_budget(catalog, 1 << 30, 256)
    low = top.memory.total + sum(s.levels[0].n_bytes for s in catalog.manifest.stacks)
    return [low + (top.total_bytes - low) * i // 4 for i in range(5)]


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


def test_a_server_that_is_gone_ends_with_1_and_what_came_stays(
    server: Served, artifact: Path, out: Path
) -> None:
    (server.folder / LEVELS).rename(server.folder / "away")
    try:
        result = pull(server.url, "-o", out, "--budget", "1GiB")
        check_refused(result, 2, f"{LEVELS} does not exist (404); check the URL", out)
    finally:
        (server.folder / "away").rename(server.folder / LEVELS)
    staged = out.with_name(".edge.pull")
    assert (staged / BASE).read_bytes() == (artifact / BASE).read_bytes()
    body = pulled(server.url, "-o", out, "--budget", "1GiB")
    assert body["transferred_bytes"] == body["total_bytes"] - body["base_bytes"]
    assert not staged.exists()
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        result = pull(url, "-o", out.with_name("other"), "--budget", "1GiB")
    check_refused(result, 1, "tried 6 times, repeat the command to go on", out.with_name("other"))


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("whole", "the server has byte ranges, but sends the whole file"),
        ("other range", "were asked for, it sends 'bytes 1-"),
        ("no range told", "were asked for, it sends ''"),
        ("other total", "the manifest says"),
        ("short", "bytes were asked for, it sends"),
        ("long", "bytes were asked for, it sends"),
        ("long in chunks", "bytes came"),
        ("other bytes", "as it comes is corrupt: bytes"),
        ("compressed", "it comes encoded as 'gzip'"),
        ("changes", "it changed on the server since the first request"),
        ("416", "the file is shorter than the manifest says"),
        ("redirect:file:///etc/passwd", "it redirects to 'file:///etc/passwd'"),
        ("redirect:ftp://example.org/x", "it redirects to 'ftp://example.org/x'"),
        ("redirect:/" + LEVELS, "more than 10 redirects"),
    ],
)
def test_a_server_that_lies_is_refused(fault: str, words: str, server: Served, out: Path) -> None:
    server.fault = fault
    check_refused(pull(server.url, "-o", out, "--budget", "1GiB"), 5, words, out)
    server.fault = ""  # nothing bad was kept
    pulled(server.url, "-o", out, "--budget", "1GiB")
    with open_artifact(out) as opened:
        assert verify(opened).ok


def test_redirects_in_the_web_are_followed(server: Served, artifact: Path, out: Path) -> None:
    with serving(artifact) as other:
        server.fault = f"redirect:{other.url}{LEVELS}"
        pulled(server.url, "-o", out, "--budget", "1GiB")
        assert [name for name, _ in other.requests] == [LEVELS]


@pytest.mark.parametrize(
    ("begin", "target", "is_followed"),
    [
        ("https://a.example/x", "http://a.example/x", False),
        ("https://a.example/x", "https://b.example/y", True),
        ("http://a.example/x", "https://a.example/x", True),
        ("http://a.example/x", "/y", True),
    ],
)
def test_no_redirect_leads_from_tls_to_plain_text(
    begin: str, target: str, is_followed: bool
) -> None:
    answer = requests.Response()
    answer.url, answer.headers["Location"] = begin, target
    source = HttpSource(begin, Silent())
    if is_followed:
        assert source._redirected(answer).endswith(target)
    else:
        with pytest.raises(RefusedError, match=r"it redirects to 'http://a\.example/x'"):
            source._redirected(answer)


def test_what_a_server_says_does_not_reach_the_terminal_as_it_is(server: Served, out: Path) -> None:
    server.fault = "rude"
    result = pull(server.url, "-o", out, "--budget", "1GiB")
    check_refused(result, 1, r"the server answers 403 \x1b[31mred", out)
    answer = requests.Response()
    answer.url, answer.headers["Location"] = "http://a.example/x", "/\x1b[31m"
    target = HttpSource(answer.url, Silent())._redirected(answer)
    assert target == "http://a.example/%1B[31m"


def damage(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("where", [0, 100, -1])
def test_what_lies_there_is_trusted_by_its_hash_only(
    where: int, server: Served, artifact: Path, out: Path
) -> None:
    staged = out.with_name(".edge.pull")
    staged.mkdir()
    (staged / "of another version").write_text("")
    for name in (BASE, LEVELS):
        data = (artifact / name).read_bytes()
        (staged / name).write_bytes(data[: 2 * len(data) // 3])
        damage(staged / name, where)
    body = pulled(server.url, "-o", out, "--budget", "1GiB")
    assert {path.name for path in out.iterdir()} == {BASE, LEVELS, "edgekit.json", "origin.json"}
    for name in (BASE, LEVELS):
        assert (out / name).read_bytes() == (artifact / name).read_bytes()
    assert (where == -1) == (body["transferred_bytes"] < body["total_bytes"])


def test_what_is_longer_than_needed_is_cut(server: Served, artifact: Path, out: Path) -> None:
    """Left by a try with a larger budget, or by somebody else."""
    staged = out.with_name(".edge.pull")
    staged.mkdir()
    for name in (BASE, LEVELS):
        (staged / name).write_bytes((artifact / name).read_bytes() + b"more")
    body = pulled(server.url, "-o", out, "--budget", budgets(artifact)[2], "--context", 256)
    assert body["transferred_bytes"] == body["manifest_bytes"]
    assert (out / BASE).read_bytes() == (artifact / BASE).read_bytes()
    assert (out / LEVELS).stat().st_size == body["levels_bytes"]


def test_a_corrupt_artifact_does_not_grow_and_stays_as_it_is(
    server: Served, artifact: Path, out: Path
) -> None:
    pulled(server.url, "-o", out, "--budget", budgets(artifact)[2], "--context", 256)
    damage(out / LEVELS, 5)
    before = (out / LEVELS).read_bytes()
    result = pull("--grow", "-o", out, "--budget", "1GiB")
    assert result.exit_code == 5 and "is corrupt" in result.stderr and "--force" in result.stderr
    assert (out / LEVELS).read_bytes() == before
    pulled(server.url, "-o", out, "--budget", "1GiB", "--force")
    with open_artifact(out) as opened:
        assert verify(opened).ok


def test_a_half_level_at_the_end_is_completed_or_fetched_anew(
    server: Served, artifact: Path, out: Path
) -> None:
    for flip in (False, True):
        shutil.rmtree(out, ignore_errors=True)
        pulled(server.url, "-o", out, "--budget", "1GiB")
        end = max(level.end for s in open_catalog(out).stacks for level in s.levels[1:])
        os.truncate(out / LEVELS, end - 10)
        if flip:
            damage(out / LEVELS, -1)
        body = pulled("--grow", "-o", out, "--budget", "1GiB")
        assert (out / LEVELS).read_bytes() == (artifact / LEVELS).read_bytes()
        assert (body["transferred_bytes"] == body["manifest_bytes"] + 10) == (not flip)


def test_a_kill_at_any_moment_leaves_what_the_same_command_completes(
    artifact: Path, tmp_path: Path
) -> None:
    out = tmp_path / "edge"
    words = [sys.executable, "-m", "edgekit", "pull", "--budget", "1GiB", "-o", str(out)]
    with serving(artifact, "cut") as served:
        for i in range(4):
            seen = len(served.requests)
            process = subprocess.Popen([*words, served.url], stderr=subprocess.DEVNULL)
            while len(served.requests) < seen + 3 + i and process.poll() is None:
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert not out.exists()
        served.fault = ""
        seen = served.n_sent
        subprocess.run([*words, served.url], check=True)
        whole = sum((artifact / name).stat().st_size for name in (BASE, LEVELS))
        assert served.n_sent - seen < whole
    with open_artifact(out) as opened:
        assert verify(opened).ok and verify(opened).missing == 0


def test_two_at_once_do_not_write_the_same_files(server: Served, out: Path) -> None:
    staged = out.with_name(".edge.pull")
    staged.mkdir()
    with module.held_alone(staged):
        result = pull(server.url, "-o", out, "--budget", "1GiB")
    check_refused(result, 2, "another edgekit works in", out)
    assert list(staged.iterdir()) == []


def relabelled(artifact: Path, place: Path, change: Any) -> Path:
    """A copy whose manifest was changed and hashed anew, as a hostile server would."""
    shutil.copytree(artifact, place)
    manifest = loads((artifact / "edgekit.json").read_bytes())
    (place / "edgekit.json").write_text(dumps(change(manifest)))
    return place


def renamed(record: str, name: str) -> Any:
    def change(m: Any) -> Any:
        return dataclasses.replace(
            m, **{record: dataclasses.replace(getattr(m, record), name=name)}
        )

    return change


def overlapping(m: Any) -> Any:
    """The last level as stored begins where the one before does."""
    (tensor, tier), (other, other_tier) = m.stored_order[-1], m.stored_order[-2]
    at = m.level(other, other_tier).parts[0].offset

    def moved(level: Any) -> Any:
        if (level.tensor, level.tier) != (tensor, tier):
            return level
        part = dataclasses.replace(level.parts[0], offset=at)
        return dataclasses.replace(level, parts=(part,))

    stacks = (dataclasses.replace(s, levels=tuple(map(moved, s.levels))) for s in m.stacks)
    return dataclasses.replace(m, stacks=tuple(stacks))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (renamed("base", "edgekit.json"), "would replace another"),
        (renamed("levels", "Origin.JSON"), "would replace another"),
        (renamed("levels", BASE), "would replace another"),
        (renamed("levels", "../x.levels"), "is not a plain file name"),
        (renamed("base", "/etc/x"), "is not a plain file name"),
        (overlapping, "overlap or leave a hole"),
    ],
)
def test_a_hostile_manifest_is_refused(change, words, artifact, tmp_path, out) -> None:
    place = relabelled(artifact, tmp_path / "hostile", change)
    check_refused(pull(place.as_uri(), "-o", out, "--budget", "1GiB"), 5, words, out)


def test_a_size_beyond_the_disk_is_refused_before_a_byte_comes(artifact, tmp_path, out) -> None:
    def huge(m: Any) -> Any:
        def grown(level: Any) -> Any:
            if (level.tensor, level.tier) != m.stored_order[-1]:
                return level
            part = dataclasses.replace(level.parts[0], n_bytes=1 << 60)
            return dataclasses.replace(level, parts=(part,))

        stacks = tuple(dataclasses.replace(s, levels=tuple(map(grown, s.levels))) for s in m.stacks)
        levels = dataclasses.replace(m.levels, n_bytes=1 << 61)
        return dataclasses.replace(m, stacks=stacks, levels=levels)

    with serving(relabelled(artifact, tmp_path / "hostile", huge)) as served:
        result = pull(served.url, "-o", out, "--budget", "1GiB")
        assert [name for name, _ in served.requests] == ["edgekit.json"]
    check_refused(result, 4, "make room or choose another place with -o", out)


def test_a_manifest_without_end_is_refused(artifact, tmp_path, out, monkeypatch) -> None:
    monkeypatch.setattr(module, "MAX_MANIFEST_BYTES", 1000)
    with serving(artifact) as served:
        for url in (served.url, artifact.as_uri()):
            check_refused(pull(url, "-o", out, "--budget", "1GiB"), 5, "more than 1000 bytes", out)


def test_another_version_does_not_grow_into_this_one(artifact, tmp_path, out) -> None:
    pulled(artifact.as_uri(), "-o", out, "--budget", budgets(artifact)[0], "--context", 256)
    change = lambda m: dataclasses.replace(m, tool={"edgekit": "other"})  # noqa: E731
    other = relabelled(artifact, tmp_path / "other", change)
    result = pull(other.as_uri(), "--grow", "-o", out, "--budget", "1GiB")
    assert result.exit_code == 5 and "another version" in result.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ftp://example.org/x"], "is no URL of the kind http://, https:// or file:///"),
        (["."], "is no URL of the kind http://, https:// or file:///; give file:///"),
        (["file://example.org/x"], "is no URL of the kind"),
        (["http://[::1/x"], "is no URL: Invalid IPv6 URL"),
        (["http://localhost:99999/x"], "is no URL: Port out of range"),
        (["file:///nowhere"], "/nowhere holds no edgekit.json; check the URL"),
        ([], "say where the artifact is: give a URL"),
        (["--grow"], "holds no artifact to grow; pull it without --grow"),
    ],
)
def test_wrong_usage_ends_with_2(words, message, out: Path) -> None:
    check_refused(pull(*words, "-o", out, "--budget", "1GiB"), 2, message, out)


def test_what_exists_is_not_replaced_unasked(artifact: Path, out: Path) -> None:
    out.mkdir()
    result = pull(artifact.as_uri(), "-o", out, "--budget", "1GiB")
    assert (result.exit_code, list(out.iterdir())) == (2, [])
    assert "fetch more of it with --grow, or replace it with --force" in result.stderr


def test_a_dry_run_reads_the_manifest_and_writes_nothing(server: Served, out: Path) -> None:
    body = pulled(server.url, "-o", out, "--budget", "1GiB", "--dry-run")
    assert body["transferred_bytes"] == body["manifest_bytes"]
    assert list(out.parent.iterdir()) == [] and len(server.requests) == 1
    result = pull(server.url, "-o", out, "--budget", "1MiB")
    check_refused(result, 3, "give --budget", out)


def test_secrets_in_a_url_are_not_kept_nor_told(artifact: Path, out: Path) -> None:
    with serving(artifact) as served:
        url = served.url.replace("//", "//me:secret@")
        body = pulled(url, "-o", out, "--budget", "1GiB")
        assert body["url"] == served.url and not (out / "origin.json").exists()
        result = pull("--grow", "-o", out, "--budget", "1GiB")
        assert result.exit_code == 2 and "does not tell where it came from" in result.stderr
        served.fault = "whole"
        os.truncate(out / LEVELS, 0)
        result = pull("--grow", url, "-o", out, "--budget", "1GiB")
        assert result.exit_code == 5 and "secret" not in result.stderr


def test_a_full_disk_ends_with_4_and_with_room_one_goes_on(server: Served, tmp_path: Path) -> None:
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    out = place / "edge"
    try:
        (place / "filler").write_bytes(bytes(2 << 20))
        check_refused(pull(server.url, "-o", out, "--budget", "1GiB"), 4, "make room", out)
        (place / "filler").unlink()
        pulled(server.url, "-o", out, "--budget", "1GiB")
    finally:
        subprocess.run(["umount", str(place)], check=True)
