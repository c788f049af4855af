"""Changing depth in mid-conversation: time, bytes read and peak memory, beside loading by hand.

    python tests/bench/bench_resize.py [ARTIFACT] --budget 1500MiB [--tokens 256]

Half the budget and back, after a prompt of some tokens. By hand: llama.cpp's C API frees the model,
loads the GGUF that `materialize` wrote for the smaller plan, and reads the conversation again.
Linux: the kernel's high-water mark of resident memory is reset before each change. Prints a JSON
line last.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from artifacts import shape_artifact

import edgekit
from edgekit.materialize import materialize
from edgekit.session import Session
from edgekit.sizes import parse_size

MIB = 1 << 20
CONTEXT = 2048


def high_water() -> int:
    """VmHWM in bytes."""
    match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match
    return int(match[1]) * 1024


def changed(session: Session, budget: int) -> dict[str, Any]:
    """Resize; what the change says, and the peak while it went on."""
    Path("/proc/self/clear_refs").write_text("5")
    before = high_water()
    session.resize(budget)
    return asdict(session.changes[-1]) | {"resident_before": before, "peak": high_water()}


def by_hand(gguf: Path, n_tokens: int) -> float:
    """Seconds to load ``gguf`` in this process's place and read ``n_tokens`` again."""
    words = [sys.executable, __file__, "-", "--by-hand", str(gguf), "--tokens", str(n_tokens)]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout)


def hand(gguf: Path, n_tokens: int) -> None:
    """The child of `by_hand`: stock settings, copied into memory."""
    from edgekit.llama import Context, open_model, system_info

    system_info()
    started = time.perf_counter()
    with open_model(gguf, residency="anon") as model, Context(model, CONTEXT) as context:
        context.decode([3 + i % 200 for i in range(n_tokens)], "none")
        print(time.perf_counter() - started)


def main() -> None:
    """Run, print a table, and the JSON line last."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("artifact", nargs="?", help="default: one is made")
    parser.add_argument("--budget", type=parse_size, default=parse_size("1500MiB"))
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--by-hand", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.by_hand:
        hand(options.by_hand, options.tokens)
        return
    rows, artifact = [], options.artifact or shape_artifact()
    with (
        tempfile.TemporaryDirectory() as folder,
        edgekit.load(artifact, options.budget, CONTEXT, follow=False) as session,
    ):
        session.context.decode([3 + i % 200 for i in range(options.tokens)], "none")
        for _ in range(options.times):
            rows.append(changed(session, options.budget // 2))
            small = session.plan
            rows.append(changed(session, options.budget))
        gguf = Path(folder, "small.gguf")
        materialize(session.artifact, small.depths, gguf)
        loads = [by_hand(gguf, options.tokens) for _ in range(options.times)]
    print(f"{'before':>9}{'after':>9}{'read':>9}{'seconds':>9}{'peak':>9}   over the larger, MiB")
    for row in rows:
        keys = ("before_bytes", "after_bytes", "bytes_read")
        over = row["peak"] - max(row["before_bytes"], row["after_bytes"])
        cells = "".join(f"{row[key] / MIB:9.0f}" for key in keys)
        print(f"{cells}{row['seconds']:9.2f}{row['peak'] / MIB:9.0f}   {over / MIB:+.0f}")
    print(f"by hand: {', '.join(f'{seconds:.2f}' for seconds in loads)} s")
    print(json.dumps({"tokens": options.tokens, "changes": rows, "by_hand_s": loads}))


if __name__ == "__main__":
    main()
