"""What every runner does with a model, whatever runs it: numpy only, for it is used in each venv.

A runner gives a model as two functions: ``forward(ids)`` starts anew and returns logits of all
positions, ``step(token)`` appends one token. It prints one JSON object.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

N_DECODED, TIMED_SECONDS = 16, 5.0
Load = Callable[[str], tuple[Callable[..., Any], Callable[..., Any]]]


def peak_bytes() -> int:
    """The most this process has held resident."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def ahead_of_others(is_ahead: bool) -> None:
    """Put all threads before other work on the machine, where that is allowed, or back."""
    policy, priority = (os.SCHED_RR, 1) if is_ahead else (os.SCHED_OTHER, 0)
    for thread in Path("/proc/self/task").iterdir():
        try:
            os.sched_setscheduler(int(thread.name), policy, os.sched_param(priority))
        except OSError:  # no privilege, or the thread has ended
            return


def run(load: Load) -> None:
    """Be a runner: model, file of token ids ``[n, length]``, file for logits of second halves."""
    model, ids_path, out_path = sys.argv[1:4]
    ids = np.load(ids_path)
    ahead_of_others(True)
    started = time.perf_counter()
    forward, step = load(model)
    loaded = time.perf_counter() - started
    forward(ids[0][:32])  # warm
    tokens = [_seconds(partial(step, int(token))) for token in ids[0][32 : 32 + N_DECODED]]
    half, rows, seconds = ids.shape[1] // 2, list[Any](), list[float]()
    for sequence in ids:
        begin = time.perf_counter()
        logits = forward(sequence)
        if sum(seconds) < TIMED_SECONDS:
            seconds.append(time.perf_counter() - begin)
        else:
            ahead_of_others(False)
        rows.append(np.asarray(logits, np.float32)[half:-1])
    np.save(out_path, np.concatenate(rows))
    told = {
        "load_seconds": loaded,
        "prompt_tokens_per_s": ids.shape[1] / median(seconds),
        "decode_tokens_per_s": 1 / median(tokens),
        "peak_bytes": peak_bytes(),
    }
    print(json.dumps(told))


def _seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin
