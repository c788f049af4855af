"""The files beside a graph: what onnxruntime-genai and transformers.js read, and the tokenizer."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgekit.checkpoint import TEMPLATE_FOLDER, contained, read_json
from edgekit.errors import RefusedError
from edgekit.exporters.onnx_decoder import Decoder

Json = dict[str, Any]
CARRIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
CONFIG, GENAI = "config.json", "genai_config.json"
# Graphs of a model folder: for every runtime, and with a head for the last positions only
MODEL, MODEL_LAST = "onnx/model.onnx", "onnx/model_last.onnx"


def carried_files(checkpoint: Path) -> dict[str, bytes]:
    """Tokenizer and generation files of a checkpoint, as they are.

    Raises:
        RefusedError: One of them leads out of the folder.
    """
    found = {}
    for name in CARRIED:
        path = contained(checkpoint, name)
        if path is not None:
            found[name] = path.read_bytes()
    templates = checkpoint / TEMPLATE_FOLDER
    if "chat_template.jinja" not in found and templates.is_dir():
        path = contained(templates, "default.jinja")
        if path is not None:
            found["chat_template.jinja"] = path.read_bytes()
    return found


def config_json(config: Mapping[str, Any]) -> bytes:
    """The checkpoint's config, with what transformers.js must know of the files."""
    own = {"dtype": "fp32", "use_external_data_format": True}  # fp32: a name without suffix
    return _text({**config, "transformers.js_config": own})


def genai_json(decoder: Decoder, config: Mapping[str, Any], checkpoint: Path, graph: str) -> bytes:
    """``genai_config.json``; ``graph`` is the file's path beside it.

    ``type`` only has to be one that genai knows: a plain decoder is described by its inputs.
    """
    tokens = _special_tokens(config, checkpoint)
    names = {"key": "past_key_values.%d.key", "value": "past_key_values.%d.value"}
    after = {"key": "present.%d.key", "value": "present.%d.value"}
    decoder_json = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": graph,
        "head_size": decoder.head,
        "hidden_size": decoder.hidden,
        "num_attention_heads": decoder.n_heads,
        "num_hidden_layers": decoder.n_layers,
        "num_key_value_heads": decoder.n_kv_heads,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": names["key"],
            "past_value_names": names["value"],
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": after["key"],
            "present_value_names": after["value"],
        },
    }
    model = {
        "type": "llama",
        "context_length": decoder.context,
        "vocab_size": decoder.vocab,
        **tokens,
        "decoder": decoder_json,
    }
    search = {"max_length": decoder.context, "past_present_share_buffer": True, "do_sample": False}
    return _text({"model": model, "search": search})


def _special_tokens(config: Mapping[str, Any], checkpoint: Path) -> Json:
    """Ids of special tokens; those of generation_config.json count first, as in transformers."""
    try:
        generation: Mapping[str, Any] = read_json(checkpoint, "generation_config.json")
    except RefusedError:
        generation = {}
    found: Json = {}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = generation.get(key, config.get(key))
        if value is not None:
            found[key] = value
    end = found.get("eos_token_id") or [0]
    first = end[0] if isinstance(end, list) else end
    return {"bos_token_id": first, "pad_token_id": first, "eos_token_id": first} | found


def _text(body: Json) -> bytes:
    return json.dumps(body, indent=2, ensure_ascii=False).encode() + b"\n"
