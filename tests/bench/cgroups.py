"""A memory control group (v1) with a limit, and what the kernel counted in it."""

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

MOUNT = Path("/sys/fs/cgroup/memory")


@contextmanager
def memory_group(name: str) -> Iterator[Path]:
    """Make a group below the mount; it is removed again.

    Raises:
        OSError: This process may not.
    """
    group = MOUNT / f"{name}-{os.getpid()}"
    group.mkdir()
    try:
        yield group
    finally:
        group.rmdir()


def set_limit(group: Path, n_bytes: int) -> None:
    """Limit memory; swap never helps. The kernel refuses less than is in use (EBUSY)."""
    (group / "memory.limit_in_bytes").write_text(str(n_bytes))


def reset_peak(group: Path) -> None:
    """Forget the most that was used, and drop what caches are left."""
    (group / "memory.force_empty").write_text("0")
    (group / "memory.max_usage_in_bytes").write_text("0")


def peak(group: Path) -> int:
    """The most bytes that were charged, file pages included."""
    return int((group / "memory.max_usage_in_bytes").read_text())


def inside(group: Path, command: Sequence[str]) -> subprocess.Popen[str]:
    """Start ``command`` as a member of the group from its first instruction on."""
    script = 'echo $$ > "$0" && exec "$@"'
    return subprocess.Popen(
        ["sh", "-c", script, str(group / "cgroup.procs"), *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
