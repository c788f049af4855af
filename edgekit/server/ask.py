"""What clients ask for: bodies of ``/v1/chat/completions`` and ``/v1/completions``, checked.

Fields that would change the answer and are not supported are refused; fields that are unknown are
ignored, as by other servers of this interface.
"""

import json
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from edgekit.llama import Message, Sampling
from edgekit.server.error import ApiError

Kind = Literal["chat", "text"]
Body = dict[str, Any]
MAX_STOPS, MAX_STOP = 16, 1 << 10  # texts, and characters of one
MAX_MESSAGES = 1 << 12
MAX_SEED = 2**32 - 1  # seeds are taken modulo that
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
# Values that mean nothing is asked for; others are refused
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "best_of": (None, 1),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "echo": (None, False),
    "suffix": (None, ""),
    "tools": (None, []),
    "functions": (None, []),
    "tool_choice": (None, "none", "auto"),
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "logit_bias": (None, {}),
}


@dataclass(frozen=True)
class Ask:
    """One request for text.

    Attributes:
        kind: ``chat`` or ``text``: the form of the answer.
        prompt: A text, or the messages of a conversation.
        n_tokens: Tokens at most; ``None``: as many as the context has.
        sampling: How they are drawn.
        stop: Texts that end the answer.
        stream: Piece by piece.
        tells_usage: A stream ends with counts of tokens.
        anew: Nothing of earlier requests is used.
    """

    kind: Kind
    prompt: str | Sequence[Message]
    n_tokens: int | None
    sampling: Sampling
    stop: tuple[str, ...]
    stream: bool
    tells_usage: bool
    anew: bool


def loads(data: bytes) -> Body:
    """The JSON object in ``data``.

    Raises:
        ApiError: It is none.
    """
    try:
        body = json.loads(data, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}") from error
    if not isinstance(body, dict):
        raise ApiError(400, f"the body is a {type(body).__name__}, needs a JSON object")
    return body


def _no_constant(text: str) -> Any:
    raise ValueError(f"the number {text}")


def chat(body: Body) -> Ask:
    """Read a request for the next message of a conversation.

    Raises:
        ApiError: It makes no sense, or asks for what is not supported.
    """
    messages = body.get("messages")
    if not isinstance(messages, list) or not 0 < len(messages) <= MAX_MESSAGES:
        raise _wrong("messages", messages, "a list of messages")
    prompt = [_message(i, message) for i, message in enumerate(messages)]
    n_tokens = _count(body, "max_completion_tokens") or _count(body, "max_tokens")
    return _ask(body, "chat", prompt, n_tokens)


def text(body: Body) -> Ask:
    """Read a request to continue a text; errors as `chat`."""
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str) or not prompt:
        raise _wrong("prompt", prompt, "one text; send several requests for several texts")
    return _ask(body, "text", prompt, _count(body, "max_tokens"))


def _ask(body: Body, kind: Kind, prompt: str | Sequence[Message], n_tokens: int | None) -> Ask:
    for name, harmless in UNSUPPORTED.items():
        if body.get(name) not in harmless:
            raise _wrong(name, body[name], f"{harmless[-1]!r}: nothing else is supported")
    if not isinstance(body.get("model", ""), str):
        raise _wrong("model", body["model"], "a name")
    stream = _flag(body, "stream")
    return Ask(
        kind=kind,
        prompt=prompt,
        n_tokens=n_tokens,
        sampling=_sampling(body),
        stop=_stop(body.get("stop")),
        stream=stream,
        tells_usage=_tells_usage(body.get("stream_options"), stream),
        anew=not _flag(body, "cache_prompt", default=True),
    )


def _message(i: int, message: object) -> Message:
    """Role and text of a message; its text may come in parts."""
    where = f"messages[{i}]"
    if not isinstance(message, dict):
        raise _wrong(where, message, "an object with role and content")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in ROLES:
        raise _wrong(f"{where}.role", role, f"one of {', '.join(ROLES)}")
    if isinstance(content, list):
        content = "".join(_part(f"{where}.content[{j}]", p) for j, p in enumerate(content))
    if not isinstance(content, str):
        raise _wrong(f"{where}.content", content, "a text, or a list of parts of type text")
    return {"role": ROLES[role], "content": content}


def _part(where: str, part: object) -> str:
    match part:
        case {"type": "text", "text": str(found)}:
            return found
    raise _wrong(where, part, "a part of type text; others are not supported")


def _sampling(body: Body) -> Sampling:
    default = Sampling()
    seed = body.get("seed")
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool)):
        raise _wrong("seed", seed, "an integer")
    return Sampling(
        temperature=_number(body, "temperature", default.temperature, 2),
        seed=secrets.randbelow(MAX_SEED) if seed is None else seed % MAX_SEED,
        top_k=_count(body, "top_k", least=0, default=default.top_k) or 0,
        top_p=_number(body, "top_p", default.top_p, 1),
        min_p=_number(body, "min_p", default.min_p, 1),
        ignore_eos=_flag(body, "ignore_eos"),
    )


def _number(body: Body, name: str, default: float, most: float) -> float:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= most:
        raise _wrong(name, value, f"a number from 0 to {most:g}")
    return float(value)


def _count(body: Body, name: str, least: int = 1, default: int | None = None) -> int | None:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 1 << 31:
        raise _wrong(name, value, f"an integer, {least} or more")
    return value


def _flag(body: Body, name: str, *, default: bool = False) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise _wrong(name, value, "true or false")
    return default if value is None else value


def _stop(value: object) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value if value is not None else []
    is_good: Callable[[object], bool] = lambda t: isinstance(t, str) and 0 < len(t) <= MAX_STOP  # noqa: E731
    if not isinstance(texts, list) or len(texts) > MAX_STOPS or not all(map(is_good, texts)):
        raise _wrong("stop", value, f"a text or up to {MAX_STOPS} of them, none of them empty")
    return tuple(texts)


def _tells_usage(options: object, stream: bool) -> bool:
    if options is None:
        return False
    if not stream:
        raise ApiError(400, "stream_options needs stream: true", param="stream_options")
    if not isinstance(options, dict):
        raise _wrong("stream_options", options, "an object")
    return _flag(options, "include_usage")


def _wrong(name: str, value: object, need: str) -> ApiError:
    shown = json.dumps(value, default=str)
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    return ApiError(400, f"'{name}' is {shown}, needs {need}", param=name)
