"""The check of a tokenizer that was written: what it finds."""

import pytest
from tiny_tokenizers import (
    byte_level,
    save,
    vocab_gguf,
)

from edgekit.errors import RefusedError
from edgekit.exporters.gguf import header_bytes
from edgekit.exporters.gguf_values import string
from edgekit.exporters.pretokenizers import LLAMA3
from edgekit.exporters.tokenizer_check import check_tokenizer, llama_encoder


def test_the_check_finds_one_missing_merge(tmp_path):
    folder = save(tmp_path, byte_level([LLAMA3], ignore_merges=False))
    path, metadata = vocab_gguf(folder, 1500)
    del metadata["tokenizer.ggml.merges"].value[7]
    path.write_bytes(header_bytes(metadata, ()))
    with pytest.raises(RefusedError, match=r"gives other ids for .* from token \d+ on"):
        check_tokenizer(path, folder)


def test_the_check_finds_two_ids_exchanged(tmp_path):
    folder = save(tmp_path, byte_level([LLAMA3], ignore_merges=True))
    path, metadata = vocab_gguf(folder, 1500)
    tokens = metadata["tokenizer.ggml.tokens"].value
    e, q = tokens.index("e"), tokens.index("q")
    tokens[e], tokens[q] = tokens[q], tokens[e]
    path.write_bytes(header_bytes(metadata, ()))
    with pytest.raises(RefusedError, match="gives other ids for"):
        check_tokenizer(path, folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [("tokenizer.ggml.pre", "qwen2"), ("tokenizer.ggml.pre", "gpt-2")],
)
def test_the_check_finds_a_wrong_pre_tokenizer(tmp_path, key, value):
    folder = save(tmp_path, byte_level([LLAMA3], ignore_merges=True))
    path, metadata = vocab_gguf(folder, 1500)
    path.write_bytes(header_bytes(metadata | {key: string(value)}, ()))
    with pytest.raises(RefusedError, match="gives other ids for"):
        check_tokenizer(path, folder)


def test_a_vocabulary_that_llama_cpp_does_not_load_is_refused_with_its_reason(tmp_path):
    folder = save(tmp_path, byte_level([LLAMA3], ignore_merges=True))
    path, metadata = vocab_gguf(folder, 1500)
    path.write_bytes(header_bytes(metadata | {"tokenizer.ggml.pre": string("nobody")}, ()))
    with pytest.raises(RefusedError, match="unknown pre-tokenizer"), llama_encoder(path):
        pass
