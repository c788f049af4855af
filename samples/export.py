"""Write a trained sample as an ordinary Hugging Face folder."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from .models import Sample


def export(
    sample: Sample, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path
) -> None:
    """Write config, bfloat16 weights and tokenizer to ``folder``; each file appears whole."""
    half = type(model)(sample.config)
    half.load_state_dict(model.state_dict())
    half = half.to(torch.bfloat16)
    half.generation_config = _generation_config(sample)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        half.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        _add(Path(temporary) / "config.json", _older_names(half.config))
        _add(
            Path(temporary) / "tokenizer_config.json",
            {"tokenizer_class": "PreTrainedTokenizerFast"},
        )
        for path in sorted(Path(temporary).iterdir()):
            path.chmod(0o644)  # safetensors creates files that only their owner may read
            os.replace(path, folder / path.name)


def _generation_config(sample: Sample) -> GenerationConfig:
    ids = {key: getattr(sample.config, key) for key in ("bos_token_id", "eos_token_id")}
    return GenerationConfig(**ids, do_sample=False)


def _older_names(config: PretrainedConfig) -> dict[str, Any]:
    """Fields of published checkpoints that transformers 5 writes under other names."""
    names = {"rope_theta": config.rope_parameters["rope_theta"], "torch_dtype": "bfloat16"}
    if hasattr(config, "num_experts"):
        names["num_experts"] = config.num_experts
    return names


def _add(path: Path, fields: dict[str, Any]) -> None:
    known = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps(known | fields, indent=2, sort_keys=True) + "\n", "utf-8")
