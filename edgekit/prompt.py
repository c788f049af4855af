"""What is computed of a prompt: its tokens, and how many of them the context has already."""

from collections.abc import Callable, Sequence

from edgekit.errors import UsageError
from edgekit.llama import Message

Prompt = str | Sequence[Message]


def prompt_ids(
    prompt: Prompt,
    templated: Callable[[Sequence[Message]], list[int] | None],
    plain: Callable[[str], list[int]],
    *,
    chat: bool,
) -> list[int]:
    """Tokens of a text or of a conversation.

    Args:
        prompt: A text, or all messages of a conversation.
        templated: Tokens of messages in the model's own form; None where it has none.
        plain: Tokens of a text.
        chat: A text is a user's message, where the model has a form for messages.

    Raises:
        UsageError: There are messages and the model has no form for them.
    """
    if isinstance(prompt, str):
        ids = templated([{"role": "user", "content": prompt}]) if chat else None
        return plain(prompt) if ids is None else ids
    ids = templated(prompt)
    if ids is None:
        raise UsageError("this model has no chat template; give a text instead of messages")
    return ids


def prompt_of(messages: Sequence[Message], *, has_template: bool) -> Prompt:
    """All messages where the model has a form for them, else their texts line by line."""
    return messages if has_template else "\n".join(message["content"] for message in messages)


def n_common(held: Sequence[int], ids: Sequence[int]) -> int:
    """Tokens at the beginning of ``ids`` that a context with ``held`` need not compute.

    The last one is always computed: its logits are needed.
    """
    pairs = enumerate(zip(held, ids, strict=False))
    same = next((i for i, (a, b) in pairs if a != b), min(len(held), len(ids)))
    return max(0, min(same, len(ids) - 1))
