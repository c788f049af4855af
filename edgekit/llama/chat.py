"""Chat templates, rendered by llama-cpp-python's Jinja sandbox or by llama.cpp, never by us."""

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

from edgekit.errors import UsageError
from edgekit.llama.binding import binding
from edgekit.llama.model import Model

Message = Mapping[str, str]  # {"role": "user", "content": "..."}


def apply_chat_template(
    model: Model, messages: Sequence[Message], *, add_generation_prompt: bool = True
) -> str | None:
    """Turn a conversation into the text the model was trained on; ``None`` without a template.

    The sandbox runs the template itself, as transformers does. Where it fails, llama.cpp's fixed
    list of known templates is asked.

    Args:
        model: Opened, ``vocab_only`` is enough.
        messages: Each with ``role`` (system, user, assistant) and ``content``.
        add_generation_prompt: End with the header of the assistant's turn.

    Raises:
        UsageError: Neither renders it; the message has the template's own reason.
    """
    template = binding().llama_model_chat_template(model.handle, None)
    if not template:
        return None
    text = template.decode("utf-8", "replace")
    try:
        return _render_in_sandbox(model, text, messages, add_generation_prompt)
    except Exception as error:  # a template may raise anything; the sandbox contains it
        known = _render_known(template, messages, add_generation_prompt)
        if known is None:
            raise UsageError(
                f"the model's chat template fails: {error}; mend the messages, or continue a text "
                "without the template (--raw)"
            ) from error
        return known


def chat_prompt(model: Model, messages: Sequence[Message]) -> list[int] | None:
    """Token ids of the conversation with exactly one BOS where the model wants it."""
    text = apply_chat_template(model, messages)
    if text is None:
        return None
    has_bos = bool(_token_text(model, model.vocab.bos)) and text.startswith(
        _token_text(model, model.vocab.bos)
    )
    return model.tokenize(text, add_special=not has_bos, parse_special=True)


def _render_in_sandbox(
    model: Model, template: str, messages: Sequence[Message], add_generation_prompt: bool
) -> str:
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    formatter: Any = Jinja2ChatFormatter(
        template,
        eos_token=_token_text(model, model.vocab.eos),
        bos_token=_token_text(model, model.vocab.bos),
        add_generation_prompt=add_generation_prompt,
    )
    return str(formatter(messages=[dict(message) for message in messages]).prompt)


def _render_known(
    template: bytes, messages: Sequence[Message], add_generation_prompt: bool
) -> str | None:
    lib = binding()
    chat = (lib.llama_chat_message * len(messages))(
        *((message["role"].encode(), message["content"].encode()) for message in messages)
    )
    capacity = 1024
    while True:
        buffer = ctypes.create_string_buffer(capacity)
        n = lib.llama_chat_apply_template(
            template, chat, len(messages), add_generation_prompt, buffer, capacity
        )
        if n < 0:
            return None
        if n <= capacity:
            return buffer.raw[:n].decode("utf-8", "replace")
        capacity = n


def _token_text(model: Model, token: int | None) -> str:
    if token is None:
        return ""
    vocab = binding().llama_model_get_vocab(model.handle)
    text = binding().llama_vocab_get_text(vocab, token)
    return text.decode("utf-8", "replace") if text else ""
