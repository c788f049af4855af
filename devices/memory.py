"""How much memory is free: what the system has available, the room in a control group or rlimit.

Whichever is least counts. Swap never counts. Linux limits of control groups v1 and v2 hold for
nested groups: every level up to the root is asked. psutil knows what is available on macOS and
Windows.
"""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

CGROUP_ROOT = Path("/sys/fs/cgroup")
NO_LIMIT = 1 << 60  # bytes; v1 writes its "no limit" as a number near 2**63
# left alone by an automatic budget for programs that start while the model runs; at most a quarter
AUTO_MARGIN_BYTES = 1 << 30


@dataclass(frozen=True)
class Names:
    """How a version of control groups calls its files, and in ``memory.stat`` its counters.

    Attributes:
        limits: Files with limits; the lowest counts. Behind ``high`` a group is slowed down.
        use: File with what is used.
        cache: Counters of file pages: inactive, active, mapped, and of those in memory only, which
            count as mapped but are neither of the others; of the group and those below.
    """

    limits: tuple[str, ...]
    use: str
    cache: tuple[str, str, str, str]


V1 = Names(
    ("memory.limit_in_bytes",),
    "memory.usage_in_bytes",
    ("total_inactive_file", "total_active_file", "total_mapped_file", "total_shmem"),
)
V2 = Names(
    ("memory.max", "memory.high"),
    "memory.current",
    ("inactive_file", "active_file", "file_mapped", "shmem"),
)


@dataclass(frozen=True)
class FreeMemory:
    """Free bytes and where the number comes from."""

    n_bytes: int
    source: str


def auto_budget() -> FreeMemory:
    """What this process may take now: what it holds and what is free, less a margin."""
    free = free_memory()
    most = free.n_bytes + held_bytes()
    return FreeMemory(most - auto_margin(most), f"{free.source} less a margin")


def auto_margin(available: int) -> int:
    """Bytes of ``available`` that are left to other programs."""
    return min(AUTO_MARGIN_BYTES, available // 4)


def held_bytes() -> int:
    """Bytes this process holds resident."""
    return int(psutil.Process().memory_info().rss)


def peak_rss_bytes() -> int:
    """The most bytes this process has held resident."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    if sys.platform == "linux":  # its ru_maxrss starts with the peak of the process that forked
        lines = Path("/proc/self/status").read_text().splitlines()
        peaks = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
        if peaks:
            return peaks[0] * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def free_memory(
    root: Path = CGROUP_ROOT, membership: Path = Path("/proc/self/cgroup")
) -> FreeMemory:
    """The least of available memory, the room in every control group, and the rlimits."""
    candidates = [FreeMemory(psutil.virtual_memory().available, "available memory")]
    candidates += [*_groups(root, membership), *_rlimits()]
    return min(candidates, key=lambda free: free.n_bytes)


def _groups(root: Path, membership: Path) -> Iterator[FreeMemory]:
    """Room in each memory control group this process is in, nested ones included."""
    if not membership.is_file():
        return
    for line in membership.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            yield from _walk(root, path, V2)
        elif "memory" in controllers.split(","):
            yield from _walk(root / "memory", path, V1)


def _walk(mount: Path, path: str, names: Names) -> Iterator[FreeMemory]:
    group = mount / path.lstrip("/")
    for folder in (group, *group.parents):
        limits = [_number(folder / name) for name in names.limits]
        limit = min((n for n in limits if n is not None), default=NO_LIMIT)
        use = _number(folder / names.use)
        if use is not None and limit < NO_LIMIT:
            room = limit - use + _idle_cache(folder / "memory.stat", names)
            yield FreeMemory(max(0, room), f"control group {folder}")
        if folder == mount:
            return


def _rlimits() -> Iterator[FreeMemory]:
    """Room under ``ulimit -v`` and ``ulimit -d``, which make allocations fail."""
    if os.name != "posix":
        return
    import resource

    memory = psutil.Process().memory_info()
    uses = {"RLIMIT_AS": memory.vms, "RLIMIT_DATA": getattr(memory, "data", 0)}
    for name, use in uses.items():
        limit, _ = resource.getrlimit(getattr(resource, name))
        if 0 <= limit < NO_LIMIT:
            yield FreeMemory(max(0, limit - use), name)


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _idle_cache(path: Path, names: Names) -> int:
    """File pages that can be had back at once: those that no process has mapped."""
    try:
        rows = (line.split() for line in path.read_text().splitlines())
        counters = {row[0]: int(row[1]) for row in rows if len(row) == 2}
    except (OSError, ValueError):
        return 0
    inactive, active, mapped, in_memory = (counters.get(key, 0) for key in names.cache)
    return inactive + max(0, active - max(0, mapped - in_memory))
