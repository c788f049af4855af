"""Text to tokens and back by the checkpoint's tokenizer.json; chat templates through genai."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgekit.checkpoint import contained, read_json
from edgekit.errors import EdgekitError, RefusedError, UsageError
from edgekit.llama import Message

TOKENIZER, TOKENIZER_CONFIG, TEMPLATE = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


class Tokenizer:
    """The tokenizer of a model folder.

    Attributes:
        ends: Tokens that end a text.
        template: The chat template as it is, or None.
    """

    def __init__(self, folder: Path) -> None:
        """Read the folder's files, which have been checked.

        Raises:
            EdgekitError: The package tokenizers is missing.
            RefusedError: The folder has no tokenizer.json, or it is damaged.
        """
        try:
            from tokenizers import Tokenizer as HuggingFace
        except ImportError as error:
            raise EdgekitError(
                f"ONNX Runtime needs the package {error.name}; pip install 'edgekit[onnx]'"
            ) from error
        path = contained(folder, TOKENIZER)
        if path is None:
            raise RefusedError(
                f"{folder} has no {TOKENIZER}; this runtime reads no other tokenizer"
            )
        try:
            self._inner: Any = HuggingFace.from_file(str(path))
        except Exception as error:  # the library raises Exception itself
            raise RefusedError(f"{path} is damaged ({error}); get the artifact again") from error
        self.ends = _ends(folder)
        self.template = _template(folder)

    @property
    def n_tokens(self) -> int:
        """Tokens of the vocabulary."""
        return int(self._inner.get_vocab_size())

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, with those that every text begins with."""
        return list(self._inner.encode(text).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, special ones left out."""
        return str(self._inner.decode(list(ids)))

    def chat(self, messages: Sequence[Message], model: Any) -> list[int] | None:
        """Tokens of a conversation in the model's own form; None where it has no template.

        Args:
            messages: With ``role`` and ``content``.
            model: Of onnxruntime-genai, which renders templates; None: it is not installed.

        Raises:
            UsageError: There is a template, and nothing that renders it.
        """
        if self.template is None:
            return None
        if model is None:
            raise UsageError(
                "chat templates need onnxruntime-genai; install it, or give --raw for a plain text"
            )
        import onnxruntime_genai as genai

        text = genai.Tokenizer(model).apply_chat_template(
            json.dumps([dict(message) for message in messages]),
            template_str=self.template,
            add_generation_prompt=True,
        )
        return list(self._inner.encode(text, add_special_tokens=False).ids)


def _ends(folder: Path) -> frozenset[int]:
    for name in ("generation_config.json", "config.json"):
        value = _json(folder, name).get("eos_token_id")
        found = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(token) is int for token in found):
            raise RefusedError(f"{folder}/{name}: eos_token_id is {value!r:.40}, which is no token")
        if found:
            return frozenset(found)
    return frozenset()


def _template(folder: Path) -> str | None:
    path = contained(folder, TEMPLATE)
    if path is not None:
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise RefusedError(f"{path} is no UTF-8 text: {error}") from error
    value = _json(folder, TOKENIZER_CONFIG).get("chat_template")
    if isinstance(value, list):
        named = {row.get("name"): row.get("template") for row in value if isinstance(row, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None


def _json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object of the folder; empty where there is no such file."""
    return read_json(folder, name) if contained(folder, name) is not None else {}
