"""Try a budget on this machine, in a process of its own: peak memory, speed, load and resize times.

The peak of a process is for all of its life, so every budget gets a fresh one.
"""

import json
import math
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from edgekit.devices.memory import peak_rss_bytes
from edgekit.errors import EdgekitError
from edgekit.loader import load
from edgekit.session import Session

N_PROMPT, N_TOKENS, N_PROMPTS = 256, 48, 3
LEAST_SECONDS = 1.0
TIMEOUT_SECONDS = 1800


@dataclass(frozen=True)
class Trial:
    """What a budget measured.

    Where no change of depth was tried its bytes are 0 and its seconds infinite.

    Attributes:
        budget_bytes: The process was given.
        planned_bytes: Total of the plan.
        peak_bytes: The most that the process held resident.
        load_seconds: From the first byte read to a context ready for tokens, files in the cache.
        prompt_tokens_per_s: Reading a prompt of `N_PROMPT` tokens, median.
        decode_tokens_per_s: Single tokens behind that prompt, median.
        resize_bytes: Total of the plan it changed to, the budget halved as far as it goes.
        resize_seconds: From this depth to that one.
        return_seconds: And back.
    """

    budget_bytes: int
    planned_bytes: int
    peak_bytes: int
    load_seconds: float
    prompt_tokens_per_s: float
    decode_tokens_per_s: float
    resize_bytes: int
    resize_seconds: float
    return_seconds: float


def try_budget(artifact: Path, budget: int, other: int | None, context: int, kv_type: str) -> Trial:
    """Measure ``budget``, and changing to the budget ``other`` and back, in a child process.

    Raises:
        EdgekitError: The child failed; the message is its own.
    """
    words = [str(artifact), str(budget), str(other or 0), str(context), kv_type]
    done = subprocess.run(
        [sys.executable, "-m", "edgekit.trial", *words],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise EdgekitError(f"measuring {artifact} at {budget} bytes failed: {last}")
    return Trial(**json.loads(done.stdout))


def _trial(artifact: Path, budget: int, other: int, context: int, kv_type: str) -> Trial:
    with load(artifact, budget, context, kv_type, residency="anon", follow=False) as session:
        planned = session.plan.total_bytes
        prompt, decode = _speeds(session)
        peak = peak_rss_bytes()
        down, resized, back = math.inf, 0, math.inf
        if other:
            down, resized = _resized(session, other)
            back, _ = _resized(session, budget)
        return Trial(
            budget, planned, peak, session.load_seconds, prompt, decode, resized, down, back
        )


def _speeds(session: Session) -> tuple[float, float]:
    """Prompt and decode, tokens per second; each is timed for a second at least."""
    context, n_vocab = session.context, session.model.vocab.n_tokens
    n_prompt = min(N_PROMPT, context.n_ctx // 2)
    n_tokens = min(N_TOKENS, context.n_ctx - n_prompt)
    ids = [3 + (17 * i) % max(1, n_vocab - 3) for i in range(n_prompt)]
    prompts, tokens = list[float](), list[float]()
    while len(prompts) < 1 + N_PROMPTS or sum(prompts) < LEAST_SECONDS:
        context.clear()
        prompts.append(_seconds(session, ids))
    while len(tokens) < n_tokens or sum(tokens) < LEAST_SECONDS:
        if len(context.tokens) == n_prompt + n_tokens:
            context.truncate(n_prompt)
        tokens.append(_seconds(session, ids[:1]))
    return n_prompt / median(prompts[1:]), 1 / median(tokens)


def _seconds(session: Session, ids: list[int]) -> float:
    started = time.perf_counter()
    session.context.decode(ids)
    return time.perf_counter() - started


def _resized(session: Session, budget: int) -> tuple[float, int]:
    started = time.perf_counter()
    plan = session.resize(budget)
    return time.perf_counter() - started, plan.total_bytes


def main(words: list[str]) -> None:
    """Be the child of `try_budget`."""
    artifact, budget, other, context, kv_type = words
    trial = _trial(Path(artifact), int(budget), int(other), int(context), kv_type)
    sys.stdout.write(json.dumps(asdict(trial)))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except EdgekitError as error:
        sys.exit(str(error))
