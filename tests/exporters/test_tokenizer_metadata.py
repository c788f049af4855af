"""What is around a vocabulary in a GGUF: special tokens, padding, templates, broken files."""

import json

import pytest
from gguf import GGUFValueType, TokenType
from tiny_tokenizers import SPECIAL, byte_level, save, vocab_gguf

from edgekit.errors import RefusedError, UnsupportedError
from edgekit.exporters.gguf_values import array
from edgekit.exporters.normalizers import KEY, TextNormalizer, rules_value
from edgekit.exporters.pretokenizers import QWEN2
from edgekit.exporters.tokenizer import tokenizer_metadata
from edgekit.exporters.tokenizer_check import check_tokenizer, llama_encoder
from edgekit.exporters.tokenizer_files import suspicious_constructs


@pytest.mark.parametrize(
    ("template", "bos", "eos"),
    [
        ("<|endoftext|> $A", True, False),
        ("$A <|im_end|>", False, True),
        ("<|im_start|> $A <|im_end|>", True, True),
        ("", False, False),
    ],
)
def test_bos_and_eos_are_what_the_post_processor_adds(tmp_path, template, bos, eos):
    folder = save(tmp_path, byte_level([QWEN2], template=template), bos_token="<|im_start|>")
    path, metadata = vocab_gguf(folder, 1500, eos_token_id=0)
    assert metadata["tokenizer.ggml.add_bos_token"].value is bos
    assert metadata["tokenizer.ggml.add_eos_token"].value is eos
    assert check_tokenizer(path, folder).n_different == 0
    first = SPECIAL.index(template.split()[0]) if bos else 1
    assert metadata["tokenizer.ggml.bos_token_id"].value == first
    assert metadata["tokenizer.ggml.eos_token_id"].value == (2 if eos else 0)


def test_add_bos_token_counts_where_there_is_no_template(tmp_path):
    config = {"add_bos_token": True, "bos_token": {"content": "<|im_start|>"}}
    folder = save(tmp_path, byte_level([QWEN2]), **config)
    path, metadata = vocab_gguf(folder, 1500)
    assert metadata["tokenizer.ggml.add_bos_token"].value is True
    with llama_encoder(path) as encode:
        assert encode("", True) == [1]
    assert check_tokenizer(path, folder).n_different == 0


def test_two_tokens_in_front_are_refused(tmp_path):
    folder = save(tmp_path, byte_level([QWEN2], template="<|im_start|> <|im_end|> $A"))
    with pytest.raises(UnsupportedError, match=r"puts tokens \(1, 2\) in front"):
        tokenizer_metadata(folder, {}, 1500)


def test_a_second_end_token_is_the_end_of_turn(tmp_path):
    folder = save(tmp_path, byte_level([QWEN2]), eos_token="<|endoftext|>")
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 1, 2]}')
    metadata = tokenizer_metadata(folder, {}, 1500)
    assert metadata["tokenizer.ggml.eos_token_id"].value == 0
    assert metadata["tokenizer.ggml.eot_token_id"].value == 2  # <|im_end|>


def test_rows_without_a_token_are_filled_and_unused(tmp_path):
    metadata = tokenizer_metadata(save(tmp_path, byte_level([QWEN2])), {}, 1504)
    assert metadata["tokenizer.ggml.tokens"].value[1499:] == [
        metadata["tokenizer.ggml.tokens"].value[1499],
        *(f"[PAD{n}]" for n in range(1500, 1504)),
    ]
    assert metadata["tokenizer.ggml.token_type"].value[1500:] == [TokenType.UNUSED] * 4
    assert metadata["tokenizer.ggml.token_type"].value[:3] == [TokenType.CONTROL] * 3


def test_added_tokens_beyond_the_embedding_are_left_out_and_others_refused(tmp_path):
    tokenizer = byte_level([QWEN2])
    tokenizer.add_special_tokens(["<image_soft_token>"])
    folder = save(tmp_path, tokenizer)
    assert len(tokenizer_metadata(folder, {}, 1500)["tokenizer.ggml.tokens"].value) == 1500
    with pytest.raises(RefusedError, match="the embedding has 1400 rows"):
        tokenizer_metadata(folder, {}, 1400)


def test_two_tokens_with_one_text_are_refused(tmp_path):
    """llama.cpp would end the process (GGML_ASSERT)."""
    folder = save(tmp_path, byte_level([QWEN2]))
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["model"]["vocab"]["<|im_end|>"] = 1500
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    try:
        metadata = tokenizer_metadata(folder, {}, 1501)
    except RefusedError as error:
        assert "needs one text each" in str(error)
    else:
        texts = metadata["tokenizer.ggml.tokens"].value
        assert len(set(texts)) == len(texts) == 1501


def test_chat_templates_are_carried_verbatim(tmp_path):
    odd = "{{ bos_token }}\r\n{% for m in messages %}é\t{{ m }}{% endfor %}\n"
    listed = [{"name": "default", "template": odd}, {"name": "Tool-Use", "template": "x" * 999}]
    folder = save(tmp_path, byte_level([QWEN2]), chat_template=listed)
    metadata = tokenizer_metadata(folder, {}, 1500)
    assert metadata["tokenizer.chat_template"].value == odd
    assert metadata["tokenizer.chat_template.tool_use"].value == "x" * 999
    assert metadata["tokenizer.chat_templates"].value == ["tool_use"]
    (folder / "chat_template.jinja").write_bytes(b"{{ newer }}\r\n")
    newer = tokenizer_metadata(folder, {}, 1500)["tokenizer.chat_template"]
    assert newer.value == "{{ newer }}\r\n"


def test_suspicious_templates_are_named_and_not_run(tmp_path):
    attack = "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ cycler | attr('x') }}"
    assert suspicious_constructs(attack) == ("__", "cycler", "| attr")
    assert suspicious_constructs("{% for m in messages %}{{ m['content'] }}{% endfor %}") == ()
    folder = save(tmp_path, byte_level([QWEN2]), chat_template=attack)
    metadata = tokenizer_metadata(folder, {}, 1500)
    assert metadata["tokenizer.chat_template"].value == attack


# broken files


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": [], "merges": 3}}'),
        ("tokenizer.json", "[" * 100_000),
        ("tokenizer_config.json", "[1]"),
        ("tokenizer_config.json", "[" * 100_000),
        ("special_tokens_map.json", '{"a": '),
    ],
)
def test_broken_files_are_refused(tmp_path, name, text):
    folder = save(tmp_path, byte_level([QWEN2]))
    (folder / name).write_text(text)
    with pytest.raises(RefusedError, match=name.replace(".", r"\.")):
        tokenizer_metadata(folder, {}, 1500)


def test_a_folder_without_tokenizer_is_refused(tmp_path):
    with pytest.raises(RefusedError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        tokenizer_metadata(tmp_path, {}, 10)


def test_trimming_rules_apply_between_special_tokens():

    metadata = {
        KEY: rules_value(["trim_spaces", "collapse_spaces"]),
        "tokenizer.ggml.tokens": array(GGUFValueType.STRING, ["<s>", "a"]),
        "tokenizer.ggml.token_type": array(GGUFValueType.INT32, [3, 1]),
    }
    assert TextNormalizer(metadata)("  a   b <s>  c ") == "a b<s>c"
    assert TextNormalizer(metadata)(" a <s> c ", parse_special=False) == "a <s> c"
    with pytest.raises(UnsupportedError, match="text rule 'rot13'"):
        TextNormalizer({KEY: rules_value(["rot13"])})
