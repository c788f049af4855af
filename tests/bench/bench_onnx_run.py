"""Decode speed and memory in ONNX Runtime: an artifact, and genai's own int4 model beside it.

    python tests/bench/bench_onnx_run.py [ARTIFACT [GENAI_FOLDER [N_TOKENS [ROUNDS]]]]

The peer is made from the same checkpoint with
``python -m onnxruntime_genai.models.builder -i CHECKPOINT -o FOLDER -p int4 -e cpu -c CACHE``.
Decoding reads every weight once per token: the floor is the bytes of codes and scales over the
machine's memory bandwidth. Runs alternate; ratios are of medians. Without GENAI_FOLDER only memory
is measured: a fresh process per depth, its peak against the plan.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from artifacts import sample_artifact

from edgekit.onnx.artifact import open_onnx
from edgekit.onnx.cache import cached_folder
from edgekit.onnx.plan import plan_depth
from edgekit.onnx_runtime import open_runner

DEPTHS, CONTEXT, BATCH, THREADS = (2, 4, 8), 2048, 128, 2
PROMPT = [5 + i % 900 for i in range(32)]


def timed(runner: Any, n: int) -> float:
    """Tokens per second."""
    token = 7
    started = time.perf_counter()
    for _ in range(n):
        token = int(runner.decode([token]).argmax())
    rate = n / (time.perf_counter() - started)
    runner.truncate(len(PROMPT))
    return rate


def speeds(artifact: Path, peer: Path, n: int, rounds: int) -> dict[str, Any]:
    opened = open_onnx(artifact)
    facts, ours = opened.part.facts, cached_folder(opened, 4)
    assert ours is not None, "the cache has no room"
    runners = {
        "depth 4, own loop": open_runner(ours, facts, 512, BATCH, THREADS, genai=False),
        "depth 4, genai": open_runner(ours, facts, 512, BATCH, THREADS, genai=True),
        "genai int4": open_runner(peer, facts, 512, BATCH, THREADS, genai=True),
    }
    rates: dict[str, list[float]] = {name: [] for name in runners}
    for runner in runners.values():
        runner.decode(PROMPT)
    for _ in range(rounds):
        for name, runner in runners.items():
            rates[name].append(timed(runner, n))
    found: dict[str, Any] = {
        name: {"median": round(statistics.median(r), 2), "best": round(max(r), 2)}
        for name, r in rates.items()
    }
    theirs = rates["genai int4"]
    for name in ("depth 4, own loop", "depth 4, genai"):
        pairs = [a / b for a, b in zip(rates[name], theirs, strict=True)]
        found[f"{name} / genai int4"] = round(statistics.median(pairs), 3)
    found["bytes"] = {"depth 4": (ours / "onnx/model.onnx_data").stat().st_size,
                      "genai int4": (peer / "model.onnx.data").stat().st_size}  # fmt: skip
    return found


def one(artifact: Path, depth: int, genai: bool) -> dict[str, Any]:
    """In this process: load, read a prompt, decode; the peak and what is held in the end."""
    opened = open_onnx(artifact, remember=True)
    part, folder = opened.part, cached_folder(opened, depth)
    plan = plan_depth(part, depth, CONTEXT, BATCH)
    assert folder is not None, "the cache has no room"
    runner = open_runner(folder, part.facts, CONTEXT, BATCH, THREADS, genai=genai)
    runner.decode([5 + i % 900 for i in range(1024)])
    runner.decode([7])
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    kib = {key: int(status[key].split()[0]) * 1024 for key in ("VmHWM", "VmRSS", "RssAnon")}
    return {"depth": depth, "genai": genai, "planned": plan.total_bytes, "peak": kib["VmHWM"],
            "resident": kib["VmRSS"], "anonymous": kib["RssAnon"],
            "peak / planned": round(kib["VmHWM"] / plan.total_bytes, 3)}  # fmt: skip


def memory(artifact: Path) -> list[dict[str, Any]]:
    rows = []
    for depth in DEPTHS:
        for genai in ("0", "1"):
            words = [sys.executable, __file__, "--one", str(artifact), str(depth), genai]
            done = subprocess.run(words, capture_output=True, text=True, check=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(rows[-1])
    return rows


def main(words: list[str]) -> None:
    if words[:1] == ["--one"]:
        print(json.dumps(one(Path(words[1]), int(words[2]), words[3] == "1")))
        return
    artifact = Path(words[0] if words else sample_artifact("tiny-llama"))
    body: dict[str, Any] = {"memory": memory(artifact)}
    if len(words) > 1:
        n, rounds = (int(w) for w in [*words[2:4], "32", "7"][:2])
        body["speed"] = speeds(artifact, Path(words[1]), n, rounds)
        print(body["speed"])
    print(json.dumps(body))


if __name__ == "__main__":
    main(sys.argv[1:])
