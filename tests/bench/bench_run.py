"""A depth of an artifact against stock llama.cpp on the dedicated GGUF: loading, reading, writing.

    python tests/bench/bench_run.py [ARTIFACT] [--tier Q4_K] [--pairs 5]

Each run is a process of its own, in turns, every other round the other way round, page cache warm,
hashes checked before. Load: from the call to the first token, imports aside. Stock: llama.cpp's C
API on the GGUF that `materialize` writes, copied into memory (no-mmap) or mapped; edgekit: decoded
into memory, or mapped from the cache. Same context, batch, threads and kernels. Prompt and decode
speeds are those of the same runs, the prompt's the median of three. Before each run another process
touches memory and gives it back: the host of a virtual machine may have taken free memory away, and
then it comes at some 2 s for a GiB. Prints a JSON line last.
"""

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from artifacts import shape_artifact

CONTEXT, BATCH, PROMPT, N_PROMPTS = 2048, 512, 256, 3
WAYS = ("stock no-mmap", "edgekit anon", "stock mmap", "edgekit mapped")


def prompt_ids(n_vocab: int) -> list[int]:
    """Tokens without meaning; their number is what takes time."""
    return [3 + (17 * i) % min(200, n_vocab - 3) for i in range(PROMPT)]


def stock(path: str, is_mapped: bool, threads: int, n: int) -> dict[str, float]:
    """llama.cpp by its own API."""
    import llama_cpp as lib

    quiet = lib.llama_log_callback(lambda *_: None)
    lib.llama_log_set(quiet, ctypes.c_void_p(0))
    lib.llama_backend_init()
    started = time.perf_counter()
    params = lib.llama_model_default_params()
    params.use_extra_bufts, params.n_gpu_layers = False, 0
    params.load_mode = int(is_mapped)
    model = lib.llama_model_load_from_file(path.encode(), params)
    options = lib.llama_context_default_params()
    options.n_ctx, options.n_batch, options.n_ubatch = CONTEXT, BATCH, BATCH
    options.n_threads = options.n_threads_batch = threads
    options.no_perf = True
    context = lib.llama_init_from_model(model, options)
    n_vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))

    def decode(ids: list[int]) -> int:
        array = (ctypes.c_int32 * len(ids))(*ids)
        assert lib.llama_decode(context, lib.llama_batch_get_one(array, len(ids))) == 0
        row = lib.llama_get_logits_ith(context, -1)
        return max(range(0, 2000, 7), key=lambda i: row[i])

    return _timed(decode, prompt_ids(n_vocab), started, n)


def edgekit(artifact: str, tier: str, residency: Any, threads: int, n: int) -> dict[str, float]:
    """The same tier through edgekit's engine."""
    from edgekit.artifact import open_artifact
    from edgekit.engine import Engine, Settings
    from edgekit.llama import system_info
    from edgekit.plan import plan_tier

    system_info()
    started = time.perf_counter()
    with open_artifact(Path(artifact), remember=True) as opened:
        engine = Engine(opened, Settings(threads, residency))
        plan = replace(plan_tier(opened, tier), context=CONTEXT, batch=BATCH)
        engine.load(plan)

        def decode(ids: list[int]) -> int:
            row = engine.context.decode(ids)[0]
            return max(range(0, 2000, 7), key=lambda i: row[i])

        times = _timed(decode, prompt_ids(engine.context.model.vocab.n_tokens), started, n)
        engine.close()
    return times


def _timed(decode: Any, prompt: list[int], started: float, n: int) -> dict[str, float]:
    token = decode(prompt[:1])
    loaded = time.perf_counter()
    prompts = list[float]()
    for _ in range(N_PROMPTS):
        before = time.perf_counter()
        token = decode(prompt)
        prompts.append(time.perf_counter() - before)
    read = time.perf_counter()
    for _ in range(n):
        token = decode([token])
    done = time.perf_counter()
    return {
        "load_s": loaded - started,
        "prompt_per_s": len(prompt) / statistics.median(prompts),
        "decode_per_s": n / (done - read),
    }


def have_memory(n_bytes: int) -> None:
    """Have the host of a virtual machine give ``n_bytes`` back, for another process to use."""
    script = """if True:
        import mmap, sys
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        memory = mmap.mmap(-1, int(sys.argv[1]), flags=flags)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        for at in range(0, len(memory), mmap.PAGESIZE):
            memory[at] = 1
    """
    subprocess.run([sys.executable, "-c", script, str(n_bytes)], check=True)


def child(way: str, options: argparse.Namespace, gguf: str) -> dict[str, float]:
    """One way in a new process."""
    have_memory(3 * Path(gguf).stat().st_size)
    words = [sys.executable, __file__, options.artifact, "--tier", options.tier, "--gguf", gguf]
    words += ["--threads", str(options.threads), "-n", str(options.n), "--way", way]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def one(options: argparse.Namespace) -> dict[str, float]:
    """The work of a child."""
    kind, how = options.way.split()
    if kind == "stock":
        return stock(options.gguf, how == "mmap", options.threads, options.n)
    return edgekit(options.artifact, options.tier, how, options.threads, options.n)


def main() -> None:
    """Alternate and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("artifact", nargs="?", help="default: one is made")
    parser.add_argument("--tier", default="Q4_K")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("-n", type=int, default=32, help="tokens to draw")
    parser.add_argument("--gguf", help=argparse.SUPPRESS)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.artifact = options.artifact or shape_artifact()
    if options.way:
        print(json.dumps(one(options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        os.environ["EDGEKIT_CACHE"] = folder
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # what edgekit sets, for both
        gguf = str(Path(folder, "dedicated.gguf"))
        command = [sys.executable, "-m", "edgekit", "materialize", options.artifact]
        subprocess.run([*command, "--tier", options.tier, "-o", gguf], check=True)
        for way in WAYS:  # warm: caches, receipts, the mapped file
            child(way, options, gguf)
        runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for pair in range(options.pairs):
            for way in WAYS[:: -1 if pair % 2 else 1]:
                runs[way].append(child(way, options, gguf))
    medians = {
        way: {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        for way, rows in runs.items()
    }
    ratios = {
        f"{ours} / {theirs}": {
            key: statistics.median(
                a[key] / b[key] for a, b in zip(runs[ours], runs[theirs], strict=True)
            )
            for key in medians[ours]
        }
        for ours, theirs in (WAYS[1::-1], WAYS[3:1:-1])
    }
    for name, row in (*medians.items(), *ratios.items()):
        print(f"{name:32}", "  ".join(f"{key} {value:8.3f}" for key, value in row.items()))
    print(json.dumps({"runs": runs, "medians": medians, "ratios": ratios}))


if __name__ == "__main__":
    main()
