"""Load an artifact at the depth that a budget buys and generate text with it.

The weights are decoded from the artifact while llama.cpp asks for them: no file is written, nothing
is held twice.
"""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from edgekit.artifact import Artifact, open_artifact
from edgekit.assembly import Assembly
from edgekit.devices.memory import free_memory
from edgekit.llama import Context, Generation, Model, Sampling, chat_prompt, generate, open_model
from edgekit.plan import Plan, plan_budget

# left alone by --budget auto for other programs that start while the model runs; at most a quarter
AUTO_MARGIN_BYTES = 1 << 30


@dataclass(frozen=True)
class Budget:
    """Bytes the process may hold resident, and where the number comes from."""

    n_bytes: int
    source: str


def auto_budget() -> Budget:
    """What is free on this machine now, less a margin of 1 GiB or a quarter."""
    free = free_memory()
    margin = min(AUTO_MARGIN_BYTES, free.n_bytes // 4)
    return Budget(free.n_bytes - margin, f"{free.source} less a margin")


class Session:
    """A loaded model with one conversation.

    Attributes:
        plan: What was loaded.
        load_seconds: From the first byte read to a context ready for tokens.
    """

    def __init__(self, model: Model, context: Context, plan: Plan, load_seconds: float) -> None:
        """Take a loaded model; made by `load`."""
        self.model, self.context, self.plan, self.load_seconds = model, context, plan, load_seconds

    def generate(self, prompt: str, n: int, sampling: Sampling, *, chat: bool = True) -> Generation:
        """Continue ``prompt``; with ``chat``, and a chat template, it is a user's message."""
        ids = chat_prompt(self.model, [{"role": "user", "content": prompt}]) if chat else None
        return generate(self.context, ids or self.model.tokenize(prompt), n, sampling)


@contextmanager
def load(
    path: Path | str,
    budget: int | None = None,
    context: int | None = None,
    kv_type: str = "f16",
    n_threads: int | None = None,
) -> Iterator[Session]:
    """Load the artifact in ``path`` at the best depth within ``budget`` bytes; a context manager.

    Args:
        path: The artifact's folder.
        budget: Bytes the process may hold; ``None`` takes what is free now.
        context: Tokens; ``None`` takes 4096 or the model's own, whichever is less.
        kv_type: ``f16``, ``q8_0`` or ``q4_0``.
        n_threads: Threads of llama.cpp; ``None`` takes all cores.

    Raises:
        DoesNotFitError: Not even the lowest depth fits.
        RefusedError: The artifact is corrupt.
    """
    with open_artifact(Path(path)) as artifact:
        plan = plan_budget(
            artifact, auto_budget().n_bytes if budget is None else budget, context, kv_type
        )
        started = time.monotonic()
        with (
            _opened(artifact, plan) as model,
            Context(
                model, plan.context, n_batch=plan.batch, kv_type=kv_type, n_threads=n_threads
            ) as ready,
        ):
            artifact.release()
            yield Session(model, ready, plan, time.monotonic() - started)


def _opened(artifact: Artifact, plan: Plan) -> Model:
    assembly = Assembly(artifact, plan.depths)
    return open_model(assembly, header=assembly.gguf)


def peak_rss_bytes() -> int:
    """The most memory this process has held resident."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
