"""What goes back to clients: bodies and chunks in OpenAI's form."""

import json
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass

from edgekit.llama import Timings
from edgekit.llama.generation import StopReason
from edgekit.server.ask import Ask, Body, Kind

OBJECTS = {"chat": "chat.completion", "text": "text_completion"}
PREFIXES = {"chat": "chatcmpl-", "text": "cmpl-"}
REASONS: dict[StopReason | None, str] = {
    "end": "stop",
    "stop": "stop",
    "length": "length",
    "context": "length",
    None: "stop",
}
END = "data: [DONE]\n\n"


@dataclass(frozen=True)
class Form:
    """How one answer is written; all of its chunks share name and time."""

    kind: Kind
    tells_usage: bool
    model: str
    id: str
    created: int

    @classmethod
    def of(cls, ask: Ask, model: str) -> "Form":
        """A new one."""
        name = PREFIXES[ask.kind] + secrets.token_hex(12)
        return cls(ask.kind, ask.tells_usage, model, name, int(time.time()))

    def whole(self, text: str, stopped: StopReason | None, timings: Timings) -> Body:
        """The answer in one body."""
        content: Body = {"text": text}
        if self.kind == "chat":
            content = {"message": {"role": "assistant", "content": text}}
        choices = [_choice(content, REASONS[stopped])]
        return self._head("") | {"choices": choices, "usage": usage(timings)}

    def first(self) -> Iterator[str]:
        """The events that open a stream."""
        if self.kind == "chat":
            yield self._event({"delta": {"role": "assistant", "content": ""}})

    def piece(self, text: str) -> str:
        """The event of one piece."""
        is_chat = self.kind == "chat"
        return self._event({"delta": {"content": text}} if is_chat else {"text": text})

    def last(self, stopped: StopReason | None, timings: Timings) -> Iterator[str]:
        """The events that end a stream."""
        empty: Body = {"delta": {}} if self.kind == "chat" else {"text": ""}
        yield self._event(empty, REASONS[stopped])
        if self.tells_usage:
            yield event(self._chunk([]) | {"usage": usage(timings)})
        yield END

    def _event(self, content: Body, reason: str | None = None) -> str:
        return event(self._chunk([_choice(content, reason)]))

    def _chunk(self, choices: list[Body]) -> Body:
        usage_so_far: Body = {"usage": None} if self.tells_usage else {}
        suffix = ".chunk" if self.kind == "chat" else ""
        return self._head(suffix) | {"choices": choices} | usage_so_far

    def _head(self, suffix: str) -> Body:
        return {
            "id": self.id,
            "object": OBJECTS[self.kind] + suffix,
            "created": self.created,
            "model": self.model,
        }


def _choice(content: Body, reason: str | None) -> Body:
    return {"index": 0, **content, "logprobs": None, "finish_reason": reason}


def event(body: Body) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def usage(timings: Timings) -> Body:
    """Counts of tokens; those of the prompt that were not computed again are told apart."""
    n_prompt = timings.n_held + timings.n_prompt
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": timings.n_gen,
        "total_tokens": n_prompt + timings.n_gen,
        "prompt_tokens_details": {"cached_tokens": timings.n_held},
    }
