"""Small tokenizers of every structure, trained here, saved as a checkpoint would hold them."""

import inspect
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from edgekit.exporters.gguf import header_bytes
from edgekit.exporters.gguf_values import Value, string
from edgekit.exporters.pretokenizers import GPT2
from edgekit.exporters.stress import PIECES
from edgekit.exporters.tokenizer import tokenizer_metadata

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CODE = inspect.getsource(textwrap) + inspect.getsource(json.decoder)
LINES = [line for piece in (CODE, *PIECES, *PIECES) for line in piece.split("\n") if line]


def vocab_gguf(folder: Path, vocab_size: int, **config: Any) -> tuple[Path, dict[str, Value]]:
    """Write a GGUF with nothing but the tokenizer of ``folder``, named after the folder."""
    about = {"general.architecture": string("llama"), "general.name": string(folder.name)}
    metadata = about | tokenizer_metadata(folder, config, vocab_size)
    path = folder / "vocab.gguf"
    path.write_bytes(header_bytes(metadata, ()))
    return path, metadata


def save(folder: Path, tokenizer: Tokenizer | str, **config: Any) -> Path:
    """Save tokenizer.json and tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    text = tokenizer if isinstance(tokenizer, str) else tokenizer.to_str()
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def byte_level(steps: Sequence[Any], ignore_merges: bool = False, template: str = "") -> Tokenizer:
    """Train a byte-level BPE of 1500 tokens; a step is a regex or a pre-tokenizer."""
    splits = [
        pre_tokenizers.Split(Regex(step), "isolated") if isinstance(step, str) else step
        for step in steps
    ]
    if not any(isinstance(step, pre_tokenizers.ByteLevel) for step in splits):
        splits.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=SPECIAL,
        show_progress=False,
    )
    tokenizer.train_from_iterator([CODE, *PIECES, *PIECES, *PIECES], trainer)
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[(token, SPECIAL.index(token)) for token in SPECIAL]
        )
    return tokenizer


def table_step(step: str) -> Any:
    """Turn a step of the table back into the pre-tokenizer that means it."""
    makers = {
        GPT2: lambda: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        r"\p{N}": lambda: pre_tokenizers.Digits(individual_digits=True),
        r"\p{N}+": lambda: pre_tokenizers.Digits(individual_digits=False),
        "punctuation contiguous": lambda: pre_tokenizers.Punctuation("contiguous"),
    }
    return makers.get(step, lambda: step)()


def train_sentencepiece(folder: Path, **settings: Any) -> Path:
    """Train tokenizer.model with 1300 pieces, the 256 bytes among them."""
    folder.mkdir(parents=True, exist_ok=True)
    usual = {
        "model_type": "bpe",
        "vocab_size": 1300,
        "byte_fallback": True,
        "character_coverage": 0.98,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line.replace("\0", "") for line in LINES),
        model_prefix=str(folder / "tokenizer"),
        num_threads=1,
        minloglevel=2,
        **usual | settings,
    )
    return folder


def as_tokenizer_json(model: Path, **parts: Any) -> str:
    """Spell a SentencePiece BPE as a tokenizer.json: every cut of a piece in two is a merge.

    Args:
        model: tokenizer.model.
        parts: ``normalizer``, ``pre_tokenizer``, ``post_processor``, more ``added_tokens``.
    """
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
    vocab = {pieces.id_to_piece(n): n for n in range(pieces.get_piece_size())}
    cuts = [
        (-pieces.get_score(n), len(text[:at]), text[:at], text[at:])
        for text, n in vocab.items()
        if not (pieces.is_byte(n) or pieces.is_control(n) or pieces.is_unknown(n))
        for at in range(1, len(text))
        if text[:at] in vocab and text[at:] in vocab
    ]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": vocab[t], "content": t, "special": True, **flags} for t in ("<unk>", "<s>", "</s>")
    ]
    added += [
        {"content": t, "special": False, **flags} | e for t, e in parts.pop("added", {}).items()
    ]
    return json.dumps(
        {"version": "1.0", "added_tokens": added, "normalizer": None, "pre_tokenizer": None}
        | {"post_processor": None, "decoder": None}
        | parts
        | {
            "model": {
                "type": "BPE",
                "unk_token": "<unk>",
                "fuse_unk": True,
                "byte_fallback": True,
                "vocab": vocab,
                "merges": [f"{left} {right}" for _, _, left, right in sorted(cuts)],
            }
        }
    )


PREPEND = {"type": "Prepend", "prepend": "▁"}
ESCAPE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
LLAMA2 = {"type": "Sequence", "normalizers": [PREPEND, ESCAPE]}
BOS = {
    "type": "TemplateProcessing",
    "single": [
        {"SpecialToken": {"id": "<s>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
}
