"""What was hashed once is not hashed again, unless the file or the manifest is another one."""

import hashlib
import os
import shutil
from pathlib import Path

import pytest
from converted import plain, tiny

from edgekit import artifact as artifact_module
from edgekit.artifact import open_artifact, verify
from edgekit.assembly import Assembly
from edgekit.cache import cache_folder
from edgekit.errors import RefusedError
from edgekit.plan import plan_tier
from edgekit.receipts import Receipt
from edgekit.stack import Part


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("receipts")
    return plain(tiny(folder / "c", "llama", width="wide"), folder / "a", ("Q4_K", "Q8_0")).artifact


@pytest.fixture
def artifact(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path / "cache"))
    return Path(shutil.copytree(made, tmp_path / "a"))


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Part]:
    """The parts that are hashed, as they are."""
    parts: list[Part] = []
    check = artifact_module.Artifact._check

    def counted(self: object, part: Part, *rest: object) -> None:
        parts.append(part)
        check(self, part, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(artifact_module.Artifact, "_check", counted)
    return parts


def read_all(folder: Path, tier: str, *, remember: bool = True) -> bytes:
    with open_artifact(folder, remember=remember) as opened:
        assembly = Assembly(opened, plan_tier(opened, tier).depths)
        return assembly.read(0, assembly.size)


def test_parts_are_hashed_once_and_only_those_that_are_used(artifact: Path, hashed: list) -> None:
    first = read_all(artifact, "Q4_K")
    n_tensors = len(hashed)
    assert read_all(artifact, "Q4_K") == first
    assert len(hashed) == n_tensors > 10
    read_all(artifact, "Q8_0")
    assert 0 < len(hashed) - n_tensors <= n_tensors  # the levels above; the base was checked
    read_all(artifact, "Q8_0", remember=False)
    assert len(hashed) > 2 * n_tensors


@pytest.mark.parametrize("name", ["levels", "gguf"])
def test_a_file_that_changed_is_hashed_again_and_refused(artifact: Path, name: str) -> None:
    read_all(artifact, "Q8_0")
    (file,) = artifact.glob(f"*.{name}")
    data = bytearray(file.read_bytes())
    times = file.stat()
    data[-40] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # its change time tells all the same
    with pytest.raises(RefusedError, match="is corrupt: its sha256 differs"):
        read_all(artifact, "Q8_0")


def test_a_copy_is_another_file(artifact: Path, tmp_path: Path, hashed: list) -> None:
    read_all(artifact, "Q4_K")
    n = len(hashed)
    read_all(Path(shutil.copytree(artifact, tmp_path / "copy")), "Q4_K")
    assert len(hashed) == 2 * n


def test_a_file_that_takes_the_name_while_the_artifact_is_opened_is_hashed(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (base,) = artifact.glob("*.gguf")
    check = artifact_module.Artifact._check_base

    def swaps(self: artifact_module.Artifact) -> object:
        header = check(self)
        data = bytearray(base.read_bytes())
        data[-40] ^= 1
        other = base.with_suffix(".other")
        other.write_bytes(data)
        other.replace(base)
        return header

    with monkeypatch.context() as patched:
        patched.setattr(artifact_module.Artifact, "_check_base", swaps)
        read_all(artifact, "Q4_K")  # of the file that was there first
    with pytest.raises(RefusedError, match="is corrupt"):
        read_all(artifact, "Q4_K")


def test_another_manifest_for_the_same_file_is_not_vouched_for(tmp_path: Path, artifact) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(1000))
    Receipt(file, "a" * 64).keep([Part(0, 500, "")])
    assert Receipt(file, "a" * 64).covers(Part(100, 400, ""))
    assert not Receipt(file, "a" * 64).covers(Part(100, 401, ""))
    assert not Receipt(file, "b" * 64).covers(Part(100, 400, ""))


def test_verify_hashes_everything_always(artifact: Path, hashed: list) -> None:
    read_all(artifact, "Q8_0")
    hashed.clear()
    with open_artifact(artifact) as opened:
        assert verify(opened).ok
    assert len(hashed) >= 20


def test_ranges_join_over_padding_only(tmp_path: Path, artifact: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(4000))
    Receipt(file, "a").keep([Part(0, 100, ""), Part(128, 100, ""), Part(1000, 100, "")])
    receipt = Receipt(file, "a")
    assert receipt.covers(Part(0, 228, "")) and receipt.covers(Part(1000, 100, ""))
    assert not receipt.covers(Part(200, 900, "")) and not receipt.covers(Part(1100, 1, ""))


@pytest.mark.parametrize("junk", [b"", b"{", b"[]", b'{"identity": [], "ranges": [["a", 1]]}'])
def test_a_damaged_receipt_vouches_for_nothing(tmp_path: Path, artifact: Path, junk) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"1234")
    Receipt(file, "a").keep([Part(0, 4, "")])
    name = hashlib.sha256(os.fsencode(file.resolve())).hexdigest()[:32]
    (cache_folder() / "receipts" / f"{name}.json").write_bytes(junk)
    assert not Receipt(file, "a").covers(Part(0, 4, ""))


def test_a_cache_that_cannot_be_written_costs_only_time(artifact, monkeypatch, hashed) -> None:
    monkeypatch.setenv("EDGEKIT_CACHE", "/proc/nowhere")
    first = read_all(artifact, "Q4_K")
    n = len(hashed)
    assert read_all(artifact, "Q4_K") == first and len(hashed) == 2 * n
