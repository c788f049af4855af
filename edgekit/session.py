"""A conversation with an artifact at the depth that its budget buys, and changes on the way.

Every change of depth happens between two calls of llama.cpp, so no token is lost.
"""

import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edgekit.artifact import Artifact
from edgekit.devices.memory import auto_budget, held_bytes
from edgekit.devices.pressure import Reading, read_pressure
from edgekit.engine import Engine, Settings, Watch
from edgekit.errors import (
    DoesNotFitError,
    EdgekitError,
    MemoryShortError,
    TooLongError,
)
from edgekit.expert_plan import plan_any
from edgekit.footprint import PROCESS_BYTES, padded_cells
from edgekit.governor import Governor, Home
from edgekit.llama import (
    Context,
    Generation,
    Message,
    Model,
    Sampling,
    can_page,
    chat_prompt,
    generate,
)
from edgekit.manifest import Json
from edgekit.paging import PagingStats
from edgekit.plan import Plan, plan_json, with_repacking
from edgekit.prompt import n_common, prompt_ids, prompt_of
from edgekit.shortage import shortage_watch
from edgekit.surrender import surrender
from edgekit.wish import Wish

LARGE_HOST = 1.25  # times what edgekit alone holds: from there on the caller's own bytes count
POLL_SECONDS = 0.05  # between two looks at memory pressure
PATIENCE_SECONDS = 60.0  # an unloaded model waits so long for memory to come back
Told = Callable[[EdgekitError | None], None]  # how a request for another budget ended


@dataclass(frozen=True)
class Change:
    """A change of depth that was made.

    Attributes:
        reason: ``asked``, ``pressure``, or ``context``: a prompt needed what was given up.
        before_bytes: The plan before, all parts; 0 where nothing was loaded.
        after_bytes: The plan after; 0 where memory pressure left nothing.
        bytes_read: Of weights that were loaded; 0 where only the context changed.
        seconds: From the last token before to a context ready for the next.
    """

    reason: str
    before_bytes: int
    after_bytes: int
    bytes_read: int
    seconds: float


class Session:
    """A loaded model with one conversation.

    Attributes:
        artifact: Open as long as the session is.
        load_seconds: The first load, from the first byte read to a context ready for tokens.
        changes: Every change of depth so far.
    """

    def __init__(
        self, artifact: Artifact, wish: Wish, settings: Settings | None = None, held: int = 0
    ) -> None:
        """Plan and load; made by `edgekit.load`.

        Args:
            artifact: Open as long as the session is.
            wish: What is asked for.
            settings: How depths are loaded.
            held: Bytes the process held before the artifact was opened, llama.cpp included.
        """
        self.artifact, self._wish, self.changes = artifact, wish, list[Change]()
        self._held = held if held > LARGE_HOST * PROCESS_BYTES else PROCESS_BYTES
        self._held += wish.besides
        self._pages = wish.pager and (can_page() or wish.expert_cache is not None)
        self._polled = 0.0
        self._pending: deque[tuple[int, Told | None]] = deque()
        self._settings = settings or Settings()
        self._engine = Engine(artifact, self._settings)
        budget = auto_budget().n_bytes if wish.budget is None else wish.budget
        self._home_plan = self._planned(budget)
        started = time.monotonic()
        try:
            self._engine.load(self._home_plan)
        except BaseException:
            self._engine.close()
            raise
        self.load_seconds = time.monotonic() - started
        self._governor = self._governed(budget, is_cap=wish.budget is not None)

    @property
    def plan(self) -> Plan:
        """What is loaded."""
        return self._engine.plan or self._home_plan

    @property
    def is_given_up(self) -> bool:
        """Whether memory pressure has taken the whole model, until there is room again."""
        return bool(self.changes) and self.changes[-1].after_bytes == 0

    @property
    def context(self) -> Context:
        """The conversation in llama.cpp; another object after each change of depth."""
        return self._engine.context

    @property
    def model(self) -> Model:
        """The model in llama.cpp; another object after each change of depth."""
        return self.context.model

    @property
    def paging(self) -> PagingStats | None:
        """Counts of experts on demand since the depth was loaded; ``None`` without them."""
        return self._engine.pager.stats if self._engine.pager is not None else None

    @property
    def has_chat_template(self) -> bool:
        """Whether the model was trained on conversations in a form of their own."""
        return "tokenizer.chat_template" in self.artifact.header.metadata

    def generate(
        self,
        prompt: str | Sequence[Message],
        n: int,
        sampling: Sampling | None = None,
        *,
        chat: bool = True,
        stop: Sequence[str] = (),
        after: bool = False,
        anew: bool = False,
        check: Callable[[], None] | None = None,
    ) -> Generation:
        """Continue a text or a conversation; iterate for the pieces.

        Args:
            prompt: A text, or all messages of a conversation, each with ``role`` and ``content``.
                What the context has of it already is not computed again.
            n: Tokens at most.
            sampling: ``None`` takes `Sampling`'s defaults.
            chat: A text is a user's message, where the model has a chat template.
            stop: Texts that end the generation.
            after: The prompt, a text, comes behind what the context holds.
            anew: Compute all of the prompt, also what the context has of it: the answer then does
                not depend on what was asked before, to the last bit.
            check: Called before each call of llama.cpp and while memory is waited for; what it
                raises ends the generation.

        Raises:
            UsageError: The prompt is empty, or there are messages and no chat template.
            TooLongError: The prompt is longer than the context.
        """
        self.adapt(n, check=check)
        ids = self._behind(str(prompt)) if after else self._ids(prompt, chat)
        self._make_room(len(ids) + n)
        if len(ids) > self.context.n_ctx:
            raise TooLongError(
                f"the prompt has {len(ids)} tokens, the context {self.context.n_ctx}; shorten it, "
                "or give a larger context"
            )
        if anew:
            self.context.clear()
        rest = self._rewind(ids)

        def between(need: int) -> Context:
            if check is not None:
                check()
            self.adapt(need, check=check)
            return self.context

        return generate(self.context, rest, n, sampling, stop=stop, between=between)

    def prompt_of(self, messages: Sequence[Message]) -> str | Sequence[Message]:
        """All messages where the model has a chat template, else their texts line by line."""
        return prompt_of(messages, has_template=self.has_chat_template)

    def request(self, budget: int, told: Told | None = None) -> None:
        """Resize before the next token; may be called in a signal handler or another thread.

        Where nothing fits, the old depth stays and the progress listener is told.

        Args:
            budget: Bytes.
            told: Called when it is done, with the error where the old depth stays.
        """
        self._pending.append((budget, told))

    def resize(self, budget: int) -> Plan:
        """Load the best depth for ``budget`` bytes instead; the conversation goes on.

        The old depth is gone before the new one is loaded. A session that follows memory pressure
        grows back to this budget from now on.

        Raises:
            DoesNotFitError: Nothing fits; the old depth stays.
            EdgekitError: Loading failed; the old depth is back.
        """
        plan = self._planned(budget)
        if self._engine.n_tokens > padded_cells(plan.context):
            raise DoesNotFitError(
                f"the conversation has {self._engine.n_tokens} tokens, a plan for this budget "
                f"{plan.context}; give a larger context"
            )
        self._switch(plan, "asked")
        self._home_plan = plan
        self._governor = self._governed(budget, is_cap=True)
        return plan

    def adapt(
        self,
        need: int = 0,
        reading: Reading | None = None,
        check: Callable[[], None] | None = None,
    ) -> None:
        """Do what `request` and memory pressure ask for; generating calls it, call it when idle.

        Args:
            need: Tokens about to come; context beyond them may be given up.
            reading: Of memory; ``None`` looks itself, at most every `POLL_SECONDS`.
            check: Called again and again while it waits for memory; what it raises ends that.

        Raises:
            DoesNotFitError: Everything was given up and memory did not come back in a minute.
        """
        while self._pending:
            self._obey(*self._pending.popleft())
        if self._governor is None:
            return
        now = time.monotonic()
        if reading is not None or now - self._polled >= POLL_SECONDS:
            self._polled = now
            self._follow(self._governor, reading or read_pressure(), need)
        while not self._engine.is_loaded:
            if time.monotonic() - now > PATIENCE_SECONDS:
                raise DoesNotFitError(
                    f"memory did not come back in {PATIENCE_SECONDS:.0f} s and the lowest depth "
                    f"of {self.artifact.folder} does not fit; close other programs"
                )
            time.sleep(POLL_SECONDS)
            if check is not None:
                check()
            while self._pending:
                self._obey(*self._pending.popleft())
            self._follow(self._governor, read_pressure(), need)

    def _obey(self, budget: int, told: Told | None) -> None:
        error: EdgekitError | None = None
        try:
            self.resize(budget)
        except Exception as why:  # whoever asked waits for an answer
            text = f"{type(why).__name__}: {why}"
            error = why if isinstance(why, EdgekitError) else EdgekitError(text)
            self._settings.progress.note(f"the old depth stays: {why}")
        if told is not None:
            told(error)

    def plan_json(self) -> Json:
        """What is loaded, as one JSON object."""
        return plan_json(self.artifact, self.plan)

    def save(self, path: Path) -> None:
        """Write the conversation to ``path``, which appears when it is whole.

        Raises:
            EdgekitError: It cannot be written.
        """
        partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
        try:
            self._engine.save_file(partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def restore(self, path: Path) -> None:
        """Go on from what `save` wrote under any depth of this model.

        Raises:
            EdgekitError: It is no conversation with this model, or longer than the context.
        """
        self.context.restore_file(path)

    def close(self) -> None:
        """Free everything; twice is once."""
        self._governor = None  # nothing is loaded again
        self._engine.close()

    def _planned(self, budget: int) -> Plan:
        wish = self._wish
        plan = plan_any(
            self.artifact,
            budget,
            wish.context,
            wish.kv_type,
            self._held,
            expert_cache=wish.expert_cache,
            pager=self._pages,
        )
        return with_repacking(self.artifact, plan) if wish.repack else plan

    def _governed(self, budget: int, is_cap: bool) -> Governor | None:
        if not self._wish.follow:
            return None
        total, reading = self._home_plan.total_bytes, read_pressure()
        to_come = max(0, total - held_bytes())  # buffers that no token has touched yet
        free = max(0, reading.free_bytes - to_come)
        return Governor(Home(budget, total, is_cap), replace(reading, free_bytes=free))

    def _make_room(self, n_tokens: int) -> None:
        """Take back context that was given up when it is needed, for depth if need be."""
        wanted, budget = min(n_tokens, self._home_plan.context), self.plan.budget_bytes
        if self.context.n_ctx < wanted and budget is not None:
            self._switch(self._kept(budget, wanted), "context")

    def _follow(self, governor: Governor, reading: Reading, need: int) -> None:
        """Ask the governor, and obey until what is loaded is what memory allows."""
        is_loaded = self._engine.is_loaded
        total = self.plan.total_bytes if is_loaded else self._held
        budget = governor.decide(time.monotonic(), reading, total, is_loaded=is_loaded)
        if budget is None:
            return
        used = self._engine.n_tokens + need
        last_resort = governor.last_resort(reading, total)
        try:
            plan = self._plan_within((budget, last_resort), used)
        except DoesNotFitError:
            if is_loaded:
                self._engine.park()
                self.changes.append(Change("pressure", total, 0, 0, 0.0))
            return
        if is_loaded and replace(self.plan, budget_bytes=plan.budget_bytes) == plan:
            return
        try:
            self._switch(plan, "pressure", shortage_watch(plan.total_bytes - self._held))
        except MemoryShortError:  # the next look finds what fits now
            if is_loaded:
                self.changes.append(Change("pressure", total, 0, 0, 0.0))
            return
        governor.changed(self.changes[-1].seconds)

    def _plan_within(self, budgets: Sequence[int], used: int) -> Plan:
        """What to load: within the first of ``budgets`` that anything fits.

        More than home where memory allows, else what is left of it.
        """
        *larger, last = budgets
        for budget in larger:
            with contextlib.suppress(DoesNotFitError):
                return self._kept(budget, used)
        return self._kept(last, used)

    def _kept(self, budget: int, used: int) -> Plan:
        home = self._home_plan
        wished = self._planned(budget) if budget > (home.budget_bytes or budget) else home
        plan = surrender(self.artifact, wished, self.plan, budget, used, pager=self._pages)
        return with_repacking(self.artifact, plan) if self._wish.repack else plan

    def _switch(self, plan: Plan, reason: str, watch: Watch | None = None) -> None:
        before = self.plan.total_bytes if self._engine.is_loaded else 0
        started = time.monotonic()
        n_bytes = self._engine.load(plan, watch)
        seconds = time.monotonic() - started
        self.changes.append(Change(reason, before, plan.total_bytes, n_bytes, seconds))

    def _ids(self, prompt: str | Sequence[Message], chat: bool) -> list[int]:
        return prompt_ids(
            prompt, lambda said: chat_prompt(self.model, said), self.model.tokenize, chat=chat
        )

    def _behind(self, text: str) -> list[int]:
        held = self.context.tokens
        return [*held, *self.model.tokenize(text, add_special=not held)]

    def _rewind(self, ids: list[int]) -> list[int]:
        """Drop what the context holds beyond its common beginning with ``ids``; give the rest."""
        held = self.context.tokens
        same = n_common(held, ids)
        if same == len(held):
            return ids[same:]
        try:
            self.context.truncate(same)
        except EdgekitError:  # a cache with a window cannot go back: begin again
            self.context.clear()
            return ids
        return ids[same:]
