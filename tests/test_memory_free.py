"""Free memory under control groups: trees of files as the kernel shows them, and a real group."""

import resource
import sys
from pathlib import Path

import psutil
import pytest
from control_groups import real_group

from edgekit.devices.memory import auto_budget, auto_margin, free_memory
from edgekit.devices.pressure import TRIM_LEVELS, read_pressure

MIB = 1 << 20
V1_UNLIMITED = 9223372036854771712  # what the kernel writes for no limit, pages of 4096


def write(folder: Path, **files: object) -> None:
    """Files of a control group; ``_`` in a name stands for a dot."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("_", ".", 1)).write_text(f"{content}\n")


def v2(
    folder: Path, limit: object, use: int, inactive: int = 0, active: int = 0, mapped: int = 0,
    shmem: int = 0, high: object = "max",
) -> None:  # fmt: skip
    stat = f"anon 1\nfile 2\nfile_mapped {mapped}\nactive_file {active}\ninactive_file {inactive}"
    stat += f"\nshmem {shmem}"
    write(folder, memory_max=limit, memory_high=high, memory_current=use, memory_stat=stat)


def v1(
    folder: Path, limit: object, use: int, inactive: int = 0, active: int = 0, mapped: int = 0,
    shmem: int = 0,
) -> None:  # fmt: skip
    # the counters without total_ are of the group alone, those with it of the groups below it too
    stat = f"cache 1\ninactive_file 0\ntotal_inactive_file {inactive}\nmapped_file 0"
    stat += f"\ntotal_active_file {active}\ntotal_mapped_file {mapped}\ntotal_shmem {shmem}"
    write(folder, memory_limit_in_bytes=limit, memory_usage_in_bytes=use, memory_stat=stat)


def found(tmp_path: Path, membership: str) -> tuple[int, str]:
    path = tmp_path / "membership"
    path.write_text(membership)
    free = free_memory(tmp_path / "cgroup", path)
    return free.n_bytes, free.source


@pytest.mark.parametrize("make", [v1, v2])
def test_room_is_limit_less_use_and_cache_that_nobody_maps_is_free(tmp_path: Path, make) -> None:
    group = tmp_path / "cgroup" / ("memory/docker/abc" if make is v1 else "app.slice/run")
    lines = "12:cpu,cpuacct:/other\n4:memory:/docker/abc\n0::/\n"
    lines = lines if make is v1 else "0::/app.slice/run\n"
    for inactive, active, mapped, free in ((2, 0, 0, 5), (2, 3, 1, 7), (2, 3, 3, 5), (0, 1, 2, 3)):
        make(group, 10 * MIB, 7 * MIB, inactive * MIB, active * MIB, mapped * MIB)
        assert found(tmp_path, lines) == (free * MIB, f"control group {group}")
        # a model in memory is mapped too, and hides no cache that can be had back
        make(group, 10 * MIB, 7 * MIB, *(n * MIB for n in (inactive, active, mapped + 3, 3)))
        assert found(tmp_path, lines) == (free * MIB, f"control group {group}")


def test_behind_memory_high_a_group_is_slowed_down(tmp_path: Path) -> None:
    group = tmp_path / "cgroup" / "a"
    for limit in (50 * MIB, "max"):
        v2(group, limit, MIB, high=20 * MIB)
        assert found(tmp_path, "0::/a\n") == (19 * MIB, f"control group {group}")


@pytest.mark.parametrize("make", [v1, v2])
def test_the_tightest_group_up_to_the_root_decides(tmp_path: Path, make) -> None:
    top = tmp_path / "cgroup" / ("memory" if make is v1 else "")
    make(top / "a" / "b" / "c", 50 * MIB, MIB)
    make(top / "a" / "b", V1_UNLIMITED if make is v1 else "max", 3 * MIB)
    make(top / "a", 20 * MIB, 12 * MIB)
    line = "3:memory:/a/b/c\n" if make is v1 else "0::/a/b/c\n"
    assert found(tmp_path, line) == (8 * MIB, f"control group {top / 'a'}")


def test_no_limit_leaves_the_available_memory(tmp_path: Path) -> None:
    v2(tmp_path / "cgroup" / "a", "max", 3 * MIB)
    v1(tmp_path / "cgroup" / "memory" / "a", V1_UNLIMITED, 3 * MIB)
    for lines in ("0::/a\n", "3:memory:/a\n", ""):
        n_bytes, source = found(tmp_path, lines)
        assert source == "available memory"
        assert n_bytes == pytest.approx(psutil.virtual_memory().available, rel=0.2)


def test_a_group_over_its_limit_has_nothing_free(tmp_path: Path) -> None:
    v2(tmp_path / "cgroup" / "a", 4 * MIB, 5 * MIB)
    assert found(tmp_path, "0::/a\n")[0] == 0


def test_a_container_that_sees_the_hosts_path_finds_its_limit_at_the_root(tmp_path: Path) -> None:
    # without a cgroup namespace the path is the host's, the mount shows the container's own group
    v1(tmp_path / "cgroup" / "memory", 6 * MIB, 2 * MIB)
    assert found(tmp_path, "3:memory:/docker/0123456789\n")[0] == 4 * MIB
    v2(tmp_path / "cgroup", 6 * MIB, 3 * MIB)
    assert found(tmp_path, "0::/../other\n")[0] == 3 * MIB


def test_what_cannot_be_read_is_no_limit(tmp_path: Path) -> None:
    write(tmp_path / "cgroup" / "a", memory_max="garbage", memory_current=1)
    write(tmp_path / "cgroup" / "b", memory_max=MIB)  # no use told
    for lines in ("0::/a\n", "0::/b\n", "0::/nowhere\n"):
        assert found(tmp_path, lines)[1] == "available memory"


CHILD = """
from edgekit.devices.memory import free_memory
held = bytearray(16 << 20)
held[::4096] = b"x" * len(held[::4096])
free = free_memory()
print(free.n_bytes, free.source)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="control groups are Linux's")
def test_a_process_in_a_real_group_is_told_what_the_group_leaves() -> None:
    limit = 96 * MIB
    with real_group(limit) as group:
        told, _ = group.start([sys.executable, "-c", CHILD]).communicate()
    n_bytes, source = told.split(maxsplit=1)
    assert source.strip() == f"control group {group.path}"
    assert limit // 4 < int(n_bytes) < limit - 16 * MIB  # 16 MiB are held, Python takes some more


def test_a_limit_on_address_space_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = psutil.Process().memory_info().vms + 64 * MIB
    limits = {resource.RLIMIT_AS: (limit, limit)}
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: limits.get(kind, unlimited))
    free = free_memory(Path("/nowhere"), Path("/nowhere"))
    assert free.source == "RLIMIT_AS" and 0 < free.n_bytes <= 64 * MIB


def test_an_automatic_budget_leaves_a_quarter_and_at_most_a_gibibyte() -> None:
    assert auto_margin(400 * MIB) == 100 * MIB
    assert auto_margin(64 << 30) == 1 << 30
    held, free = psutil.Process().memory_info().rss, free_memory().n_bytes
    most = held + free
    assert auto_budget().n_bytes == pytest.approx(most - auto_margin(most), rel=0.05)
    assert auto_budget().source.endswith("less a margin")


PSI = """some avg10=12.50 avg60=1.00 avg300=0.10 total=123
full avg10=7.25 avg60=0.50 avg300=0.05 total=45
"""


def test_stalls_are_the_worst_of_machine_and_own_group(tmp_path: Path) -> None:
    machine = tmp_path / "machine"
    machine.write_text(PSI)
    membership = tmp_path / "membership"
    membership.write_text("0::/a\n")
    root = tmp_path / "cgroup"
    assert read_pressure(root, membership, machine).stalled == pytest.approx(0.0725)
    write(root / "a", memory_pressure=PSI.replace("7.25", "31.00"))
    assert read_pressure(root, membership, machine).stalled == pytest.approx(0.31)
    assert read_pressure(root, tmp_path / "none", tmp_path / "none").stalled == 0.0


def test_hiding_the_interface_is_no_trim_level_that_acts() -> None:
    """20 and 40 are no pressure; the app is asked for more the nearer it is to being killed."""
    assert not {20, 40} & set(TRIM_LEVELS)
    assert [TRIM_LEVELS[level] for level in sorted(TRIM_LEVELS)] == [0.25, 0.5, 0.5, 1.0]
