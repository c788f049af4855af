"""Real memory control groups, v1 or v2: a limit, a process inside, what the kernel counted."""

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
V1 = {"limit": "memory.limit_in_bytes", "peak": "memory.max_usage_in_bytes"}
V2 = {"limit": "memory.max", "peak": "memory.peak"}


@dataclass(frozen=True)
class Group:
    """A control group; ``files`` has the names of its version."""

    path: Path
    files: dict[str, str]

    def limit(self, n_bytes: int) -> None:
        """Limit memory. v1 raises EBUSY when more is in use and cannot be taken back."""
        (self.path / self.files["limit"]).write_text(str(n_bytes))

    def forget(self) -> None:
        """Drop what file pages are left and count the peak anew, where the version can."""
        if self.files is V1:
            (self.path / "memory.force_empty").write_text("0")
            (self.path / self.files["peak"]).write_text("0")

    @property
    def peak(self) -> int:
        """The most bytes that were charged, file pages included."""
        return int((self.path / self.files["peak"]).read_text())

    def start(self, command: Sequence[str], **options: object) -> "subprocess.Popen[str]":
        """Run ``command`` as a member from its first instruction on; pipes carry its output."""
        script = 'echo $$ > "$0" && exec "$@"'
        words = ["sh", "-c", script, str(self.path / "cgroup.procs"), *command]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(words, **(pipes | options))  # type: ignore[call-overload, no-any-return]


@contextmanager
def memory_group(name: str, limit: int) -> Iterator[Group]:
    """Make a group; it is removed again.

    Raises:
        OSError: This process may make none.
    """
    lines = (line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines())
    paths = {controllers: path.lstrip("/") for _, controllers, path in lines}
    own = next((path for names, path in paths.items() if "memory" in names.split(",")), None)
    files, mount = (V2, ROOT) if own is None else (V1, ROOT / "memory")
    parents = (mount / (paths.get("", "") if own is None else own), mount)
    path = next((p for p in parents if p.is_dir()), mount) / f"{name}-{os.getpid()}"
    path.mkdir()
    group = Group(path, files)
    try:
        group.limit(limit)
        yield group
    finally:
        path.rmdir()
