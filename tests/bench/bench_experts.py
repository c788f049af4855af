"""A mixture of experts larger than its memory: edgekit's pager against llama.cpp with mmap.

    python tests/bench/bench_experts.py [ARTIFACT] [--limits 2GiB,1.2GiB] [--bandwidth 200MB]

ARTIFACT comes from expert_models.py. Every run is a process of its own in a memory control group of
the limit, in turns, the page cache dropped before each; with ``--bandwidth`` also in a blkio group
that limits what it reads from disk in a second, as a phone's storage does. Both decode the same
tokens of a text, one at a time. Bytes read are what the kernel counts for the process. Needs root.
Prints a JSON line last.
"""

import argparse
import ctypes
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from artifacts import expert_artifact
from cgroups import Group, memory_group

from edgekit.sizes import parse_size

CONTEXT, PROMPT = 512, 16
BLKIO = Path("/sys/fs/cgroup/blkio")
GIB = 1 << 30


def tokens(n: int) -> list[int]:
    """Bytes of a text as tokens of the bench's vocabulary: a text's own repetitions."""
    text = (Path(__file__).parents[2] / "samples" / "text" / "heldout.txt").read_bytes()
    return [3 + byte for byte in text[1000 : 1000 + n]]


def io_bytes() -> int:
    """What this process has had read from disk."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("read_bytes")))


def timed(decode: Any, n: int) -> dict[str, float]:
    """Read a prompt, then decode token by token."""
    ids = tokens(PROMPT + n)
    started = time.perf_counter()
    decode(ids[:PROMPT])
    prompt, before = time.perf_counter() - started, io_bytes()
    started = time.perf_counter()
    for token in ids[PROMPT:]:
        decode([token])
    seconds = time.perf_counter() - started
    read = (io_bytes() - before) / n
    return {"prompt_seconds": prompt, "tokens_per_second": n / seconds, "read_per_token": read}


def stock(path: str, n: int, threads: int) -> dict[str, float]:
    """llama.cpp with mmap, by its own API."""
    import llama_cpp as lib

    quiet = lib.llama_log_callback(lambda *_: None)
    lib.llama_log_set(quiet, ctypes.c_void_p(0))
    lib.llama_backend_init()
    started = time.perf_counter()
    params = lib.llama_model_default_params()
    params.use_extra_bufts, params.n_gpu_layers, params.load_mode = False, 0, 1
    model = lib.llama_model_load_from_file(path.encode(), params)
    options = lib.llama_context_default_params()
    options.n_ctx, options.n_batch, options.n_ubatch = CONTEXT, 64, 64
    options.n_threads = options.n_threads_batch = threads
    context = lib.llama_init_from_model(model, options)
    loaded = time.perf_counter() - started

    def decode(ids: list[int]) -> None:
        array = (ctypes.c_int32 * len(ids))(*ids)
        assert lib.llama_decode(context, lib.llama_batch_get_one(array, len(ids))) == 0

    return {"load_seconds": loaded} | timed(decode, n)


def edgekit(artifact: str, budget: int, n: int, threads: int) -> dict[str, Any]:
    """The pager, within the whole of the budget."""
    from edgekit.loader import load

    with load(artifact, budget, CONTEXT, n_threads=threads, follow=False) as session:
        engine = session._engine
        started = time.perf_counter()
        engine.context.decode(tokens(PROMPT))
        times = {"prompt_seconds": time.perf_counter() - started}
        if engine.pager is not None:
            engine.pager.reset()
        times |= _continued(engine, n)
        row: dict[str, Any] = times | {"load_seconds": session.load_seconds}
        if engine.pager is not None:
            stats = engine.pager.stats
            paged = session.plan.paged
            assert paged is not None
            row |= {
                "hit_rate": stats.hit_rate,
                "stall_ms_per_token": 1000 * stats.stall_seconds / n,
                "experts_per_layer": paged.experts_per_layer,
            }
        return row


def _continued(engine: Any, n: int) -> dict[str, float]:
    ids = tokens(PROMPT + n)[PROMPT:]
    before, started = io_bytes(), time.perf_counter()
    for token in ids:
        engine.context.decode([token])
    seconds = time.perf_counter() - started
    return {"tokens_per_second": n / seconds, "read_per_token": (io_bytes() - before) / n}


@contextmanager
def read_limit(path: Path, bytes_per_second: int | None) -> Iterator[Path | None]:
    """A blkio group that limits reads from the disk that ``path`` is on; ``None`` for no limit."""
    if bytes_per_second is None:
        yield None
        return
    folder = BLKIO / f"edgekit-bench-{os.getpid()}"
    folder.mkdir()
    device = path.stat().st_dev
    disk = f"{os.major(device)}:{os.minor(device)}"
    (folder / "blkio.throttle.read_bps_device").write_text(f"{disk} {bytes_per_second}")
    try:
        yield folder
    finally:
        folder.rmdir()


def run(group: Group, blkio: Path | None, words: Sequence[str]) -> dict[str, Any]:
    """One run of this script inside the groups, the page cache dropped before."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")
    group.forget()
    command = [sys.executable, __file__, *words]
    if blkio is not None:
        procs = str(blkio / "cgroup.procs")
        command = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', procs, *command]
    process = group.start(command)
    out, err = process.communicate()
    if process.returncode:
        return {"exit": process.returncode, "error": err.strip().splitlines()[-1:]}
    row: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
    return row | {"exit": 0, "group_peak": group.peak}


def compare(artifact: Path, limit: int, bandwidth: int | None, args: Any) -> dict[str, Any]:
    """Alternate both at one limit."""
    gguf = next(artifact.glob("*.gguf"))
    rows: dict[str, list[dict[str, Any]]] = {"stock": [], "edgekit": []}
    with (
        memory_group("edgekit-bench", limit) as group,
        read_limit(gguf, bandwidth) as blkio,
    ):
        for _ in range(args.pairs):
            for way, target in (("stock", gguf), ("edgekit", artifact)):
                words = ["--child", way, str(target), "--limits", str(limit)]
                n = args.stock_n if way == "stock" else args.n
                words += ["-n", str(n), "--threads", str(args.threads)]
                rows[way].append(run(group, blkio, words))
                print(f"  {way}: {rows[way][-1]}", flush=True)
    speeds = {way: [row.get("tokens_per_second", 0.0) for row in rows[way]] for way in rows}
    ratios = [e / s if s else float("inf") for s, e in zip(*speeds.values(), strict=True)]
    ratio = statistics.median(ratios)
    print(f"limit {limit / GIB:.2f} GiB, {bandwidth or 'no'} read limit: ratio {ratio:.2f}")
    return {"limit": limit, "bandwidth": bandwidth, "ratio": ratio, "ratios": ratios} | rows


def main() -> None:
    """Run, and print the JSON line last."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact", nargs="?", help="default: one of 4.3 GiB is made")
    parser.add_argument("--limits", default="2GiB,1.2GiB")
    parser.add_argument("--bandwidth", help="also with this many bytes per second from disk")
    parser.add_argument("-n", type=int, default=48)
    parser.add_argument("--stock-n", type=int, default=4, help="fewer: it may take 13 s for one")
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--child", choices=["stock", "edgekit"])
    args = parser.parse_args()
    limits = [parse_size(text) for text in args.limits.split(",")]
    if args.child == "stock":
        print(json.dumps(stock(args.artifact, args.n, args.threads)))
        return
    if args.child == "edgekit":
        print(json.dumps(edgekit(args.artifact, limits[0], args.n, args.threads)))
        return
    artifact = Path(args.artifact or expert_artifact())
    bandwidths = [None] + ([parse_size(args.bandwidth)] if args.bandwidth else [])
    results = [
        compare(artifact, limit, bandwidth, args) for bandwidth in bandwidths for limit in limits
    ]
    print(json.dumps(results))


if __name__ == "__main__":
    main()
