"""The tokenizer files of a checkpoint folder, read as data."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekit.errors import RefusedError
from edgekit.safetensors_header import no_duplicates

MAX_JSON_BYTES = 256 * 1024**2  # tokenizer.json of a vocabulary of 262 144 tokens has 34 MB
MAX_TEMPLATE_BYTES = 64 * 1024**2  # the longest string a GGUF may hold here


@dataclass(frozen=True)
class TokenizerFiles:
    """What a folder says about its tokenizer.

    Attributes:
        tokenizer: tokenizer.json as the `tokenizers` library writes it, or ``None``.
        model_file: Path of tokenizer.model where there is no tokenizer.json, or ``None``.
        config: tokenizer_config.json, or ``{}``.
        special: special_tokens_map.json, or ``{}``.
        generation: generation_config.json, or ``{}``.
        templates: Name to chat template; the usual one is ``"default"``.
    """

    tokenizer: dict[str, Any] | None
    model_file: Path | None
    config: dict[str, Any]
    special: dict[str, Any]
    generation: dict[str, Any]
    templates: dict[str, str]


def read_tokenizer_files(folder: Path) -> TokenizerFiles:
    """Read the tokenizer files of ``folder``; tokenizer.json comes before tokenizer.model.

    Raises:
        RefusedError: There is no tokenizer, or a file is not what its name says.
    """
    path, model_path = folder / "tokenizer.json", folder / "tokenizer.model"
    if not path.is_file() and not model_path.is_file():
        raise RefusedError(
            f"{folder} has neither tokenizer.json nor tokenizer.model; "
            f"save the tokenizer beside the model (tokenizer.save_pretrained)"
        )
    config = read_json(folder / "tokenizer_config.json")
    return TokenizerFiles(
        tokenizer=canonical_tokenizer(path) if path.is_file() else None,
        model_file=None if path.is_file() else model_path,
        config=config,
        special=read_json(folder / "special_tokens_map.json"),
        generation=read_json(folder / "generation_config.json"),
        templates=_templates(folder, config),
    )


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, ``{}`` where there is no file.

    Raises:
        RefusedError: It is longer than 256 MiB or no JSON object.
    """
    if not path.is_file():
        return {}
    try:
        text = _read_text(path, MAX_JSON_BYTES)
        value = json.loads(text, object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as error:
        raise RefusedError(f"{path} is no sound JSON: {error}; get the file again") from error
    if not isinstance(value, dict):
        raise RefusedError(f"{path} holds a {type(value).__name__}, needs a JSON object")
    return value


def _read_text(path: Path, limit: int) -> str:
    n_bytes = path.stat().st_size
    if n_bytes > limit:
        raise RefusedError(f"{path} has {n_bytes} bytes, at most {limit} are read")
    try:
        return path.read_bytes().decode("utf-8")  # read_text would change line ends
    except UnicodeDecodeError as error:
        raise RefusedError(f"{path} is no valid UTF-8; get the file again") from error


def load_tokenizer(path: Path) -> Any:
    """Load a tokenizer.json with the `tokenizers` library; nothing is padded or truncated.

    Raises:
        RefusedError: The library does not take the file.
    """
    from tokenizers import Tokenizer

    text = _read_text(path, MAX_JSON_BYTES)
    try:
        tokenizer = Tokenizer.from_str(text)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in the library is no Exception
        line = " ".join(str(error).split())[:200]
        raise RefusedError(f"{path} is no tokenizer.json: {line}; get the file again") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def canonical_tokenizer(path: Path) -> dict[str, Any]:
    """Return a tokenizer.json in one spelling: merges as pairs, all defaults filled in.

    Raises:
        RefusedError: The `tokenizers` library does not take the file.
    """
    value: dict[str, Any] = json.loads(load_tokenizer(path).to_str())
    return value


def _templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Collect chat templates; the files that transformers writes since 4.52 come first."""
    found: dict[str, str] = {}
    inline = config.get("chat_template")
    if isinstance(inline, str):
        found["default"] = inline
    elif isinstance(inline, list):
        found |= {
            entry["name"]: entry["template"]
            for entry in inline
            if isinstance(entry, dict)
            and isinstance(entry.get("name"), str)
            and isinstance(entry.get("template"), str)
        }
    older = read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(older, str):
        found["default"] = older
    named = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    for path in named:
        found[path.stem] = _read_text(path, MAX_TEMPLATE_BYTES)
    if (folder / "chat_template.jinja").is_file():
        found["default"] = _read_text(folder / "chat_template.jinja", MAX_TEMPLATE_BYTES)
    return found


_SUSPICIOUS = ("__", "import", "cycler", "|attr", "| attr", "lipsum", "joiner", "getattr", "eval(")


def suspicious_constructs(template: str) -> tuple[str, ...]:
    """Return the constructs in a chat template that a chat needs rarely and an attack often.

    Nothing is rendered. What is found is for a notice: templates are carried verbatim and run only
    in the sandbox of the runtime.
    """
    return tuple(construct for construct in _SUSPICIOUS if construct in template)
