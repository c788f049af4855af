"""What ``edgekit pull`` leaves on disk, whatever stops it, and how it is to be asked."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pulling import BASE, LEVELS, budgets, check_refused, damage, pull, pulled
from static_server import Served, serving

from edgekit import pull as module
from edgekit.artifact import open_artifact, verify
from edgekit.catalog import open_catalog


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
