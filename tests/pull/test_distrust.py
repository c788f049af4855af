"""What ``edgekit pull`` refuses: servers that lie, hostile manifests, unsound bytes on disk."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import requests
from pulling import BASE, LEVELS, budgets, check_refused, damage, pull, pulled
from static_server import Served, serving

from edgekit import pull as module
from edgekit.artifact import open_artifact, verify
from edgekit.errors import RefusedError
from edgekit.manifest import dumps
from edgekit.manifest_reader import loads
from edgekit.progress import Silent
from edgekit.remote import HttpSource


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
    ("target", "words"),
    [
        ("http://[::1/x", f"{LEVELS}: Invalid IPv6 URL"),
        ("http://\xad/x", f"{LEVELS}: invalid start byte"),
        ("http://localhost:99999/x", "Error: http://localhost:99999/x: "),
        (f"http://{'a' * 70}/x", f"http://{'a' * 70}/x: "),
    ],
)
def test_a_redirect_to_no_url_is_told_in_one_line(
    target: str, words: str, server: Served, out: Path
) -> None:
    """Requests lets some errors through that are not its own."""
    server.fault = f"redirect:{target}"
    check_refused(pull(server.url, "-o", out, "--budget", "1GiB"), 1, words, out)


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
    server.fault = "no HTTP"
    result = pull(server.url, "-o", out, "--budget", "1GiB")
    check_refused(result, 1, rf"{LEVELS}: \x1b[31mred\r\n; tried 6 times", out)
    answer = requests.Response()
    answer.url, answer.headers["Location"] = "http://a.example/x", "/\x1b[31m"
    target = HttpSource(answer.url, Silent())._redirected(answer)
    assert target == "http://a.example/%1B[31m"


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
