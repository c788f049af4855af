"""How hard memory is pressed now: what is free, and how long tasks stall for it.

Linux tells the share of time in which every task waited for memory (PSI), for the machine and for
control groups v2; elsewhere it counts as 0. Android's trim levels map to the same reading.
"""

from dataclasses import dataclass
from pathlib import Path

from edgekit.devices.memory import CGROUP_ROOT, free_memory

MACHINE = Path("/proc/pressure/memory")
MEMBERSHIP = Path("/proc/self/cgroup")

# ComponentCallbacks2 of Android: levels that tell of pressure, and the share of its memory an app
# should give up. 20 (the interface was hidden) and 40 (moved to the background list) are no
# pressure by themselves; 80 means that the process is next to be killed: unload.
TRIM_LEVELS = {10: 0.25, 15: 0.5, 60: 0.5, 80: 1.0}


@dataclass(frozen=True)
class Reading:
    """Memory at one moment.

    Attributes:
        free_bytes: What could still be taken; swap never counts.
        stalled: Share of the last ten seconds in which no task got on for want of memory, 0 to 1.
        source: Where ``free_bytes`` comes from.
    """

    free_bytes: int
    stalled: float = 0.0
    source: str = ""


def read_pressure(
    root: Path = CGROUP_ROOT, membership: Path = MEMBERSHIP, machine: Path = MACHINE
) -> Reading:
    """Read free memory and stalls; takes about a tenth of a millisecond."""
    free = free_memory(root, membership)
    stalls = (_stalled(path) for path in (machine, *_group_files(root, membership)))
    return Reading(free.n_bytes, max(stalls, default=0.0), free.source)


def _group_files(root: Path, membership: Path) -> list[Path]:
    """``memory.pressure`` of this process's group; only control groups v2 have one."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return []
    paths = [line.split(":", 2)[2] for line in lines if line.startswith("0::")]
    return [root / path.lstrip("/") / "memory.pressure" for path in paths]


def _stalled(path: Path) -> float:
    """``avg10`` of the line ``full``, as a share."""
    try:
        lines = path.read_text().splitlines()
    except OSError:  # the kernel was built without PSI, or keeps it off
        return 0.0
    for line in lines:
        kind, *fields = line.split()
        values = dict(field.split("=", 1) for field in fields)
        if kind == "full" and "avg10" in values:
            return float(values["avg10"]) / 100
    return 0.0
