"""A conversation with an artifact in ONNX Runtime, at the depth that its budget buys.

What `edgekit.session.Session` offers for llama.cpp, but for conversations that are saved, and for
`generate`'s ``after``, ``anew`` and ``check``. Whole codes of a depth are composed into the cache
once and mapped from there; where the cache has no room they are composed for this process alone.
Depth changes when it is asked to; the tokens of the conversation are computed anew then.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from edgekit.devices.memory import auto_budget, held_bytes
from edgekit.errors import EdgekitError, TooLongError, UsageError
from edgekit.llama import Generation, Message, Sampling, Timings
from edgekit.llama.generation import until_stop
from edgekit.onnx.artifact import OnnxArtifact, open_onnx
from edgekit.onnx.cache import model_folder
from edgekit.onnx.plan import PROCESS_BYTES, depth_of, onnx_plan_json, plan_onnx
from edgekit.onnx_runtime import Runner, Sampler, Tokenizer, open_runner
from edgekit.plan import Plan
from edgekit.progress import Progress, Silent
from edgekit.prompt import n_common, prompt_ids, prompt_of
from edgekit.session import LARGE_HOST, Change


@dataclass(frozen=True)
class OnnxSettings:
    """How a session loads.

    Attributes:
        n_threads: Of ONNX Runtime; None takes the physical cores.
        genai: Through onnxruntime-genai; None: where it is installed.
        progress: Told of what a user should know.
    """

    n_threads: int | None = None
    genai: bool | None = None
    progress: Progress = field(default_factory=Silent)


@contextmanager
def load_onnx(
    path: Path,
    budget: int | None = None,
    context: int | None = None,
    settings: OnnxSettings | None = None,
) -> Iterator["OnnxSession"]:
    """Load the ONNX part of an artifact within ``budget`` bytes; a context manager.

    Raises:
        DoesNotFitError: Not even the lowest depth fits.
        RefusedError: The artifact is corrupt.
    """
    session = OnnxSession(path, budget, context, settings or OnnxSettings())
    try:
        yield session
    finally:
        session.close()


class OnnxSession:
    """A loaded model with one conversation.

    Attributes:
        artifact: What was opened.
        plan: What is loaded.
        load_seconds: The first load.
        changes: Every change of depth so far.
    """

    def __init__(
        self, path: Path, budget: int | None, context: int | None, settings: OnnxSettings
    ) -> None:
        """Plan and load."""
        held = held_bytes()
        self._held = held if held > LARGE_HOST * PROCESS_BYTES else PROCESS_BYTES
        self._path, self._context, self._settings = path, context, settings
        self._folders = ExitStack()
        self._runner: Runner | None = None
        self._pending: int | None = None
        self.changes: list[Change] = []
        self.artifact: OnnxArtifact = open_onnx(path, 0, remember=True)
        started = time.monotonic()
        limit = auto_budget().n_bytes if budget is None else budget
        self.plan: Plan = self._planned(limit)
        self.tokenizer = Tokenizer(self.artifact.files)
        try:
            self._load(self.plan)
        except BaseException:
            self.close()
            raise
        self.load_seconds = time.monotonic() - started

    @property
    def has_chat_template(self) -> bool:
        """Whether the model was trained on conversations in a form of their own."""
        return self.tokenizer.template is not None

    @property
    def paging(self) -> None:
        """Nothing: experts are all resident."""
        return None

    @property
    def runner(self) -> Runner:
        """The conversation in ONNX Runtime; another object after each change of depth."""
        assert self._runner is not None, "the session is closed"
        return self._runner

    def generate(
        self,
        prompt: str | Sequence[Message],
        n: int,
        sampling: Sampling | None = None,
        *,
        chat: bool = True,
        stop: Sequence[str] = (),
    ) -> Generation:
        """Continue a text or a conversation; as `edgekit.session.Session.generate`."""
        self.adapt(n)
        ids = self._ids(prompt, chat)
        if not ids or n < 0:
            raise UsageError(f"a prompt of {len(ids)} tokens and {n} more is nothing to compute")
        if len(ids) > self.runner.n_ctx:
            raise TooLongError(
                f"the prompt has {len(ids)} tokens, the context {self.runner.n_ctx}; shorten it, "
                "or give a larger context"
            )
        rest = self._rewind(ids)
        generation = Generation(timings=Timings(n_held=len(self.runner.tokens)))
        tokens = self._draw(rest, n, sampling or Sampling(), generation)
        generation.pieces = until_stop(self._text(tokens), stop, generation)
        return generation

    def prompt_of(self, messages: Sequence[Message]) -> str | Sequence[Message]:
        """As `edgekit.session.Session.prompt_of`."""
        return prompt_of(messages, has_template=self.has_chat_template)

    def request(self, budget: int) -> None:
        """Resize before the next token; may be called in a signal handler."""
        self._pending = budget

    def resize(self, budget: int) -> Plan:
        """Load the best depth for ``budget`` bytes instead; the conversation goes on.

        Raises:
            DoesNotFitError: Nothing fits; the old depth stays.
            EdgekitError: Loading failed; the old depth is back.
        """
        plan = self._planned(budget)
        if depth_of(plan) == depth_of(self.plan):
            self.runner.n_batch, self.plan = plan.batch, plan
            return plan
        before, started = self.plan.total_bytes, time.monotonic()
        old, tokens = self.runner, list(self.runner.tokens)
        try:
            self._load(plan, tokens)
        except EdgekitError:
            if self._runner is not old:
                self._load(self.plan, tokens)
            raise
        self.plan = plan
        read, seconds = self.artifact.part.depth_bytes(depth_of(plan)), time.monotonic() - started
        self.changes.append(Change("asked", before, plan.total_bytes, read, seconds))
        return plan

    def adapt(self, need: int = 0) -> None:
        """Do what `request` asks for; generating calls it."""
        if self._pending is None:
            return
        budget, self._pending = self._pending, None
        try:
            self.resize(budget)
        except EdgekitError as error:
            self._settings.progress.note(f"the old depth stays: {error}")

    def plan_json(self) -> dict[str, Any]:
        """What is loaded, as one JSON object."""
        return onnx_plan_json(self.artifact.part, self.plan)

    def close(self) -> None:
        """Free everything; twice is once."""
        if self._runner is not None:
            self._runner.close()
        self._runner = None
        self._folders.close()

    def _planned(self, budget: int) -> Plan:
        part, depths = self.artifact.part, self.artifact.depths
        return plan_onnx(part, budget, self._context, self._held, depths)

    def _load(self, plan: Plan, tokens: Sequence[int] = ()) -> None:
        """Load a plan instead of what is loaded: two depths are never resident together."""
        depth, facts = depth_of(plan), self.artifact.part.facts
        self.artifact.check(depth, remember=True)
        if self._runner is not None:
            self._runner.close()
        self._runner = None
        self._folders.close()
        folder = self._folders.enter_context(model_folder(self.artifact, depth))
        threads = self._settings.n_threads or psutil.cpu_count(logical=False) or 1
        self._runner = open_runner(
            folder, facts, plan.context, plan.batch, threads, genai=self._settings.genai
        )
        if tokens:
            self._runner.decode(tokens)

    def _ids(self, prompt: str | Sequence[Message], chat: bool) -> list[int]:
        tokenizer, model = self.tokenizer, self.runner.model
        return prompt_ids(
            prompt, lambda said: tokenizer.chat(said, model), tokenizer.encode, chat=chat
        )

    def _rewind(self, ids: list[int]) -> list[int]:
        """Drop what the context holds beyond its common beginning with ``ids``; give the rest."""
        held = self.runner.tokens
        same = n_common(held, ids)
        if same < len(held):
            self.runner.truncate(same)
        return ids[same:]

    def _draw(
        self, prompt: list[int], n: int, sampling: Sampling, generation: Generation
    ) -> Iterator[int]:
        timings: Timings = generation.timings
        sampler, started = Sampler(sampling), time.perf_counter()
        logits = self.runner.decode(prompt)
        timings.prompt_seconds, timings.n_prompt = time.perf_counter() - started, len(prompt)
        while timings.n_gen < n:
            token = sampler.draw(logits)
            timings.n_gen += 1
            generation.ids.append(token)
            if token in self.tokenizer.ends and not sampling.ignore_eos:
                generation.stopped = "end"
                return
            yield token
            if timings.n_gen == n:
                break
            self.adapt(n - timings.n_gen)
            if len(self.runner.tokens) == self.runner.n_ctx:
                generation.stopped = "context"
                return
            started = time.perf_counter()
            logits = self.runner.decode([token])
            timings.gen_seconds += time.perf_counter() - started
        generation.stopped = "length"

    def _text(self, tokens: Iterator[int]) -> Iterator[str]:
        """Text as it becomes whole: half a character waits for its rest."""
        ids, start, told = list[int](), 0, 0  # decoded from start; up to told it was given
        for token in tokens:
            ids.append(token)
            before, text = (
                self.tokenizer.decode(ids[start:told]),
                self.tokenizer.decode(ids[start:]),
            )
            if len(text) > len(before) and not text.endswith("\N{REPLACEMENT CHARACTER}"):
                yield text[len(before) :]
                start, told = told, len(ids)
        before, text = self.tokenizer.decode(ids[start:told]), self.tokenizer.decode(ids[start:])
        if len(text) > len(before):
            yield text[len(before) :]
