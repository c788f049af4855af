"""Runs ``edgekit`` commands in children of a process that has imported everything, and kills them.

Importing torch takes longer than converting a tiny model, so a test that kills twenty conversions
forks them from here: each is a process of its own, and dies of a real SIGKILL. One JSON object per
line on stdin is one command:

    cwd, args       where and what to run
    kill_after      seconds after which the child is killed, or null
    kill_at_change  the child dies just before its n-th change of a name on disk, or null

The answer on stdout is ``{"code", "seconds", "changes", "stderr"}``; a killed child has code -9.
"""

import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import tokenizers  # noqa: F401
import torch
import transformers.models.llama.modeling_llama  # noqa: F401

import edgekit.calibration
import edgekit.convert
import edgekit.evaluate
import edgekit.fisher
import edgekit.float_model
import edgekit.pruning.prune  # noqa: F401
from edgekit.cli import main

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}


class Changes:
    """Counts what a process changes on disk: names made, renamed, removed; dies at the n-th."""

    def __init__(self, file: str, die_at: int | None) -> None:
        self.n, self._file, self._die_at = 0, file, die_at

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(args[2], int) and args[2] & os.O_CREAT
        if (event in CHANGES or writes) and str(args[0]) != self._file:
            self.n += 1
            if self.n == self._die_at:
                os.kill(os.getpid(), signal.SIGKILL)


def child(command: dict[str, Any], log: str) -> None:
    """Run the command and leave the process; its first line of output is its number of changes."""
    os.chdir(command["cwd"])
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    changes = Changes(log, command["kill_at_change"])
    sys.addaudithook(changes)
    sys.argv = ["edgekit", *command["args"]]
    code = 1
    try:
        main(standalone_mode=True)
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        Path(log + ".changes").write_text(str(changes.n))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(command: dict[str, Any], folder: str) -> dict[str, Any]:
    """Fork, perhaps kill, wait."""
    log, started = os.path.join(folder, "log"), time.monotonic()
    Path(log + ".changes").unlink(missing_ok=True)
    pid = os.fork()
    if pid == 0:
        child(command, log)
    if command["kill_after"] is not None:
        left, status = wait_until(pid, started + command["kill_after"])
        if left:
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
    else:
        _, status = os.waitpid(pid, 0)
    counted = Path(log + ".changes")  # killed in its last line, a child leaves it empty
    changes = counted.read_text() if counted.exists() else ""
    return {
        "code": os.waitstatus_to_exitcode(status),
        "seconds": time.monotonic() - started,
        "changes": int(changes) if changes else None,
        "stderr": Path(log).read_text(),
    }


def wait_until(pid: int, moment: float) -> tuple[bool, int]:
    """Wait for the child until ``moment``; whether it is still running then, else its status."""
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        left = moment - time.monotonic()
        if ended or left <= 0:
            return not ended, status
        time.sleep(min(left, 0.01))


def serve() -> None:
    """Answer until stdin ends."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(KeyboardInterrupt):
        for line in sys.stdin:
            sys.stdout.write(json.dumps(run(json.loads(line), folder)) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    serve()
