"""general.* of a GGUF, from the model card and the folder's name."""

from pathlib import Path
from typing import Any

import gguf
import pytest
from models import make_checkpoint

from edgekit.arch import map_checkpoint
from edgekit.checkpoint import Checkpoint
from edgekit.exporters.gguf import TensorInfo, write_gguf

CARD = """---
license: apache-2.0
language: [en, de]
tags: [tiny, test]
pipeline_tag: text-generation
base_model: org/Tiny-Base-7B
version: 1.5
---
# A model
"""


def general(folder: Path) -> dict[str, Any]:
    metadata = map_checkpoint(Checkpoint.open(folder)).metadata
    return {key: value.value for key, value in metadata.items() if key.startswith("general.")}


def test_general_metadata_comes_from_the_model_card(tmp_path: Path) -> None:
    folder = make_checkpoint("llama", tmp_path / "Tiny-Llama-220K-Instruct")
    (folder / "README.md").write_text(CARD)
    (folder / "generation_config.json").write_text('{"temperature": 0.5, "top_k": 40}')
    got = general(folder)
    assert got == got | {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "Tiny Llama 220K Instruct",
        "general.finetune": "Instruct",
        "general.basename": "Tiny-Llama",
        "general.version": "1.5",
        "general.license": "apache-2.0",
        "general.languages": ["en", "de"],
        "general.tags": ["tiny", "test", "text-generation"],
        "general.base_model.count": 1,
        "general.base_model.0.name": "Tiny Base 7B",
        "general.base_model.0.repo_url": "https://huggingface.co/org/Tiny-Base-7B",
        "general.size_label": "220K",
        "general.sampling.temp": 0.5,
        "general.sampling.top_k": 40,
    }


def test_the_cache_of_hugging_face_names_the_repository(tmp_path: Path) -> None:
    folder = make_checkpoint("llama", tmp_path / "models--org--Tiny-Llama" / "snapshots" / "0a1b2c")
    assert general(folder)["general.name"] == "Tiny Llama"


CARDS = [
    "---\n{unbalanced: [\n---\n",
    "---\nlicense: {a: [1, 2]}\ntags: 7\nname: [x]\nbase_model: [1, {}, null]\n---\n",
    "---\ndatasets: {a: 1}\nlanguage: {b: 2}\nlicense: []\n---\n",
    "---\nname: '\\ud800'\nlicense: true\n---\n",
    '---\nname: "\\ud800"\ntags: [1, null, [2]]\nversion: 2024-01-01\n---\n',
    "---\n- a list\n---\n",
    "---\nname: x\n",
    "---\nsize_label: 7\nbasename: {}\nfinetune: 1.5\n---\n",
    "\xff\xfe",
    "---\n!!python/object/apply:os.mkdir [canary]\n---\n",
]


@pytest.mark.parametrize("card", CARDS)
def test_a_strange_model_card_costs_nothing_else(card: str, tmp_path: Path) -> None:
    folder = make_checkpoint("llama", tmp_path / "Tiny-Llama")
    (folder / "README.md").write_bytes(card.encode("latin-1"))
    mapping = map_checkpoint(Checkpoint.open(folder))
    infos = [TensorInfo(t.name, t.source_type, t.shape) for t in mapping.tensors]
    with (tmp_path / "source.gguf").open("wb") as file:
        write_gguf(file, mapping.metadata, infos, ([t.rows()] for t in mapping.tensors))
    fields = gguf.GGUFReader(tmp_path / "source.gguf").fields
    assert fields["general.architecture"].contents() == "llama"
    assert not (Path.cwd() / "canary").exists()
