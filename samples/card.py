"""The model card of a sample: what it is, what it was trained on, how well it predicts."""

import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from . import heldout_text
from .bits import model_bits, order0_bits, xz_bits
from .corpus import HELD_OUT, SKIPPED_FILES, SKIPPED_FOLDERS, Document
from .models import Sample

TEMPLATE = """\
---
license: apache-2.0
language: [en]
library_name: transformers
pipeline_tag: text-generation
tags: [{architecture}, python, sample]
---
# {name}

{description}

It was trained from nothing for edgekit's tests and examples: small enough to ship, trained enough
that quantization costs something measurable. It continues Python code and simple English; it knows
nothing and follows no instructions.

| | |
|---|---|
| architecture | {architecture} |
| weights | {n_parameters:,} ({n_bytes:,} bytes in BF16) |
| layers, hidden size | {layers}, {hidden} |
| heads, key-value heads, head size | {heads}, {kv_heads}, {head_dim} |
| vocabulary | {vocab}, byte-level BPE, trained on the same corpus |
| context | {context} tokens |

## Prediction of held-out text
Bits per byte of `samples/text/heldout.txt` ({heldout_bytes:,} bytes), lower is better:

| predictor | bits per byte |
|---|---|
| order-0 entropy of its bytes | {order0:.3f} |
| xz -9e | {xz:.3f} |
| xz -9e after reading the training corpus | {xz_primed:.3f} |
| **{name}** (BF16) | **{bits:.3f}** |

## Training
- {steps:,} steps of {batch_tokens:,} tokens, {tokens:,} in all: {epochs:.1f} times the corpus
- {seconds:,.0f} seconds on {machine}, beside other work
- Muon for the matrices of the layers, AdamW for the rest; peak learning rate {lr}, seed {seed}
- sequences of 512 and 1024 tokens; no dropout{balance}

    python -m samples.train {name} --state runs --output samples/{name} \\
        --steps {steps} --batch-tokens {batch_tokens} --lr {lr} --seed {seed}{extra_options}

repeats the steps and batches. The learning rate of the run followed the clock, that of a repeat
follows the step count, so its weights differ a little.

## Corpus
{n_documents} documents, {corpus_bytes:,} bytes, {stream_tokens:,} tokens:

{sources}

Held out, with everything below them: {held_out}.
Neither the model nor its tokenizer has seen these modules.

Skipped, as tests, tables or copies: the folders {skipped_folders};
the files {skipped_files} and `_sysconfigdata_*.py`.

`samples/corpus.py` is the exact rule.

## Licences
The weights and the tokenizer: Apache-2.0. The Python standard library, which they were trained on,
is under the PSF License Agreement, (c) Python Software Foundation.{extra_licences}
"""

DESCRIPTIONS = {
    "tiny-llama": "A dense Llama with grouped-query attention and tied embeddings.",
    "tiny-moe": "A Qwen3 mixture of experts: 8 experts per layer, 2 of them per token.",
}

# What an extra text is and who allows its use; a text that is not here is named by its file.
KNOWN_EXTRAS = {
    "tinystories.txt": "an excerpt of TinyStories (Eldan and Li, 2023; CDLA-Sharing-1.0)",
    "alice29.txt": "Alice's Adventures in Wonderland (Lewis Carroll; public domain)",
}


@dataclass(frozen=True)
class Training:
    """What happened in a run."""

    steps: int
    batch_tokens: int
    seconds: float
    lr: float
    seed: int
    threads: int
    stream_tokens: int


def write_card(
    sample: Sample,
    training: Training,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    documents: Sequence[Document],
    path: Path,
) -> float:
    """Measure, write the card to ``path`` and return the held-out bits per byte."""
    bits = model_bits(model, tokenizer, heldout_text())
    facts = {
        **_model_facts(sample, model),
        **_training_facts(sample, training),
        **_corpus_facts(documents),
        **_baselines(documents),
    }
    path.write_text(TEMPLATE.format(bits=bits, **facts), "utf-8")
    return bits


def _model_facts(sample: Sample, model: PreTrainedModel) -> dict[str, object]:
    config, sizes = sample.config, [(p.numel(), 2 * p.numel()) for p in model.parameters()]
    return {
        "name": sample.name,
        "description": DESCRIPTIONS[sample.name],
        "architecture": type(model).__name__,
        "n_parameters": sum(n for n, _ in sizes),
        "n_bytes": sum(n_bytes for _, n_bytes in sizes),
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "vocab": config.vocab_size,
        "context": config.max_position_embeddings,
    }


def _training_facts(sample: Sample, training: Training) -> dict[str, object]:
    tokens = training.steps * training.batch_tokens
    note = f"\n- the router's load-balancing loss weighs {sample.balance}" if sample.balance else ""
    return {
        **vars(training),
        "tokens": tokens,
        "epochs": tokens / training.stream_tokens,
        "machine": machine_class(training.threads),
        "balance": note,
    }


def machine_class(threads: int) -> str:
    """The kind of machine this runs on, without its name."""
    if torch.cuda.is_available():
        return f"one {torch.cuda.get_device_name()}"
    plural = "thread" if threads == 1 else "threads"
    instructions = torch.backends.cpu.get_cpu_capability()
    return f"{threads} {plural} of a {platform.machine()} CPU with {instructions}"


def _corpus_facts(documents: Sequence[Document]) -> dict[str, object]:
    extras = [d.name.removeprefix("file:") for d in documents if d.name.startswith("file:")]
    known = [KNOWN_EXTRAS.get(name, name) for name in extras]
    return {
        "n_documents": len(documents),
        "corpus_bytes": sum(len(d.text.encode()) for d in documents),
        "sources": "\n".join(_sources(documents, known)),
        "held_out": ", ".join(f"`{name}`" for name in HELD_OUT),
        "skipped_folders": ", ".join(f"`{name}`" for name in sorted(SKIPPED_FOLDERS)),
        "skipped_files": ", ".join(f"`{name}`" for name in sorted(SKIPPED_FILES)),
        "extra_options": "".join(f" --extra {name}" for name in extras),
        "extra_licences": f" Also used: {'; '.join(known)}." if known else "",
    }


def _sources(documents: Sequence[Document], extras: Sequence[str]) -> list[str]:
    sizes: Counter[str] = Counter()
    for document in documents:
        kind = document.name.partition(":")[0] if ":" in document.name else "module"
        sizes[kind] += len(document.text.encode())
    python = f"the standard library of Python {platform.python_version()}"
    lines = [
        f"- modules of {python}: {sizes['module']:,} bytes",
        f"- the language reference in its `pydoc_data.topics`: {sizes['topic']:,} bytes",
    ]
    return lines + ([f"- {'; '.join(extras)}: {sizes['file']:,} bytes"] if extras else [])


def _baselines(documents: Sequence[Document]) -> dict[str, object]:
    text = heldout_text()
    return {
        "heldout_bytes": len(text.encode()),
        "order0": order0_bits(text),
        "xz": xz_bits(text),
        "xz_primed": xz_bits(text, documents),
    }
