"""Train a sample model's byte-level BPE tokenizer."""

from collections.abc import Sequence

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from .corpus import Document
from .models import VOCAB, Sample

CHUNK = 65536  # characters per training example; the trainer sees a document in pieces


def train_tokenizer(sample: Sample, documents: Sequence[Document]) -> PreTrainedTokenizerFast:
    """Learn ``VOCAB`` tokens from ``documents``; the special tokens take the last ids."""
    special = [token for token in (sample.bos, sample.eos) if token]
    tokenizer = Tokenizer(BPE(ignore_merges=sample.bos is not None))
    if sample.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _pre_tokenizer(sample.split)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - len(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (d.text[at : at + CHUNK] for d in documents for at in range(0, len(d.text), CHUNK))
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = _post_processor(tokenizer, sample.bos)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=sample.bos,
        eos_token=sample.eos,
        model_max_length=sample.config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
    )


def _pre_tokenizer(split: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _post_processor(tokenizer: Tokenizer, bos: str | None) -> processors.PostProcessor:
    byte_level = processors.ByteLevel(trim_offsets=bos is not None)
    if bos is None:
        return byte_level
    template = processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos}:1 $B:1",
        special_tokens=[(bos, tokenizer.token_to_id(bos))],
    )
    return processors.Sequence([byte_level, template])
