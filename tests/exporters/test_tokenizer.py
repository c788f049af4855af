"""Tokenizers in GGUF: the ids llama.cpp gives against those of `tokenizers` and `sentencepiece`."""

import json
from pathlib import Path

import pytest
from gguf import TokenType
from tiny_tokenizers import (
    BOS,
    ESCAPE,
    LLAMA2,
    SPECIAL,
    as_tokenizer_json,
    byte_level,
    save,
    table_step,
    train_sentencepiece,
    vocab_gguf,
)
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from edgekit.errors import RefusedError, UnsupportedError
from edgekit.exporters.gguf import read_header
from edgekit.exporters.normalizers import KEY, TextNormalizer
from edgekit.exporters.pretokenizers import LLAMA3, QWEN2, TABLE, recognise
from edgekit.exporters.stress import PIECES
from edgekit.exporters.tokenizer import tokenizer_metadata
from edgekit.exporters.tokenizer_check import check_tokenizer

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
TEXTS = sorted((DATA / "text").glob("*.txt"))
REAL = {
    "gpt2": (DATA / "tokenizers" / "gpt2", 50257),
    "phi-3-mini": (DATA / "tokenizers" / "phi-3-mini", 32064),
    "stories260K": (DATA / "models" / "stories260K", 512),
    "tiny-llama": (ROOT / "samples" / "tiny-llama", 4096),
    "tiny-moe": (ROOT / "samples" / "tiny-moe", 4096),
}
HERE = {name: place for name, place in REAL.items() if place[0].is_dir()}


def _linked(source: Path, folder: Path) -> Path:
    """A folder of the same name and files that a test may write to."""
    folder = folder / source.name
    folder.mkdir()
    for path in source.glob("*.json"):
        (folder / path.name).symlink_to(path)
    return folder


# real tokenizers


@pytest.mark.parametrize("name", HERE)
def test_a_real_tokenizer_gives_the_same_ids_on_the_stress_text(name, tmp_path):
    source, vocab_size = HERE[name]
    folder = _linked(source, tmp_path)
    path, _ = vocab_gguf(folder, vocab_size)
    check = check_tokenizer(path, folder)
    assert check.n_different == 0 and check.n_texts > len(PIECES)
    rules = read_header(path).get(KEY, [])
    assert bool(check.n_unprepared) == bool(rules) == bool(check.notices)


@pytest.mark.parametrize("name", HERE)
def test_a_real_tokenizer_gives_the_same_ids_on_all_shared_texts(name, tmp_path):
    """In pieces of 1500 characters: llama.cpp's time grows faster than the length of a text."""
    source, vocab_size = HERE[name]
    folder = _linked(source, tmp_path)
    path, _ = vocab_gguf(folder, vocab_size)
    whole = [text.read_bytes().decode() for text in TEXTS]
    pieces = [text[at : at + 1500] for text in whole for at in range(0, len(text), 1500)]
    assert check_tokenizer(path, folder, pieces).n_different == 0


def test_special_tokens_that_swallow_spaces_are_noticed_where_llama_cpp_does_not(tmp_path):
    rstrip = byte_level([LLAMA3], ignore_merges=True)
    spec = json.loads(rstrip.to_str())
    for token in spec["added_tokens"]:
        token["rstrip"] = True
    folder = save(tmp_path / "other", json.dumps(spec))
    path, _ = vocab_gguf(folder, 1500)
    check = check_tokenizer(path, folder)
    assert 0 < check.n_different < 10
    assert "swallow the space" in check.notices[0]


# byte-level BPE, by structure


@pytest.mark.parametrize(
    ("steps", "pre"),
    [(steps, pre) for steps, row in TABLE.items() for pre in row],
    ids=lambda value: getattr(value, "name", ""),
)
def test_each_pre_tokenizer_of_the_table_is_recognised_and_splits_the_same(steps, pre, tmp_path):
    tokenizer = byte_level([table_step(step) for step in steps], pre.ignore_merges)
    folder = save(tmp_path, tokenizer)
    path, metadata = vocab_gguf(folder, 1510)
    check = check_tokenizer(path, folder)
    assert metadata["tokenizer.ggml.pre"].value == pre.name
    assert check.n_different == 0 or pre.differs
    assert bool(check.notices) == bool(check.n_different)


PUBLISHED = {
    "llama-bpe": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "qwen2": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "gpt-4o": (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
        r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "tekken": (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def _split(regex: str, behavior: str = "Isolated", invert: bool = False) -> dict[str, object]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": behavior, "invert": invert}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_tokenizers_are_recognised_in_each_spelling(name):
    ignores = name in ("llama-bpe", "tekken")
    regex = PUBLISHED[name]
    spelled = regex.replace(r"\r\n", "\r\n")
    for split in (_split(regex), _split(spelled), _split(regex, "Removed", invert=True)):
        whole = {"type": "Sequence", "pretokenizers": [split, BYTES]}
        assert recognise(whole, ignores).name == name


def test_llama3_without_ignore_merges_is_dbrx():
    whole = {"type": "Sequence", "pretokenizers": [_split(PUBLISHED["llama-bpe"]), BYTES]}
    assert recognise(whole, False).name == "dbrx"  # OLMo-2, Phi-4 and DBRX itself
    with pytest.raises(UnsupportedError, match="ignore_merges true"):
        recognise({"type": "Sequence", "pretokenizers": [_split(PUBLISHED["qwen2"]), BYTES]}, True)


@pytest.mark.parametrize(
    "entry",
    [
        _split(r"\p{L}+|."),
        {"type": "Whitespace"},
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        _split(PUBLISHED["qwen2"], "MergedWithNext"),
        None,
    ],
)
def test_an_unknown_pre_tokenizer_is_one_clear_line_with_exit_code_5(entry, tmp_path):
    spec = json.loads(byte_level([QWEN2]).to_str())
    spec["pre_tokenizer"] = entry
    folder = save(tmp_path, json.dumps(spec))
    with pytest.raises(UnsupportedError, match=r"llama\.cpp has no such pre-tok") as caught:
        tokenizer_metadata(folder, {}, 1500)
    assert caught.value.exit_code == 5 and "\n" not in str(caught.value)
    assert "smollm" in str(caught.value)


def test_an_unknown_normalizer_is_refused_by_name(tmp_path):
    tokenizer = byte_level([QWEN2])
    tokenizer.normalizer = normalizers.StripAccents()
    with pytest.raises(UnsupportedError, match="StripAccents"):
        tokenizer_metadata(save(tmp_path, tokenizer), {}, 1500)


def test_nfc_is_left_to_edgekit_and_said_so(tmp_path):
    tokenizer = byte_level([QWEN2])
    tokenizer.normalizer = normalizers.NFC()
    folder = save(tmp_path, tokenizer)
    path, metadata = vocab_gguf(folder, 1500)
    check = check_tokenizer(path, folder)
    assert check.n_different == 0 and check.n_unprepared > 0
    assert TextNormalizer(metadata)("e\u0301<|im_end|>") == "é<|im_end|>"


def test_merges_in_both_spellings_and_with_spaces_are_the_same(tmp_path):
    spec = json.loads(byte_level([QWEN2]).to_str())
    pairs = spec["model"]["merges"]
    as_pairs = tokenizer_metadata(save(tmp_path / "a", json.dumps(spec)), {}, 1500)
    spec["model"]["merges"] = [" ".join(pair) for pair in pairs]
    as_text = tokenizer_metadata(save(tmp_path / "b", json.dumps(spec)), {}, 1500)
    spec["model"]["vocab"] |= {"a b": 1500, "x": 1501, "a bx": 1502}
    spec["model"]["merges"] = [*pairs, ["a b", spec["model"]["merges"][0].split()[0]]][:-1]
    spaced = tokenizer_metadata(save(tmp_path / "c", json.dumps(spec)), {}, 1503)
    assert as_pairs == as_text
    assert as_pairs["tokenizer.ggml.merges"] == spaced["tokenizer.ggml.merges"]


# SentencePiece


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    return train_sentencepiece(tmp_path_factory.mktemp("spm"), split_digits=True)


@pytest.mark.parametrize(
    ("parts", "prefix", "n_different"),
    [
        ({"normalizer": LLAMA2, "post_processor": BOS}, True, 0),  # Llama-2, Mistral 7B, Phi-3
        ({"normalizer": ESCAPE, "post_processor": BOS}, False, 0),  # Gemma
        (
            {
                "normalizer": ESCAPE,
                "pre_tokenizer": {
                    "type": "Split",
                    "pattern": {"String": " "},
                    "behavior": "MergedWithPrevious",
                    "invert": False,
                },
            },
            False,
            0,
        ),  # Gemma-2 and 3
        (
            {
                "pre_tokenizer": {
                    "type": "Metaspace",
                    "replacement": "▁",
                    "prepend_scheme": "never",
                    "split": False,
                }
            },
            False,
            0,
        ),
        (
            {
                "pre_tokenizer": {
                    "type": "Metaspace",
                    "replacement": "▁",
                    "prepend_scheme": "first",
                    "split": False,
                },
                "post_processor": BOS,
            },
            True,
            20,
        ),  # Mistral 7B v0.3: llama.cpp puts a space behind special tokens as well
    ],
    ids=["llama-2", "gemma", "gemma-2", "metaspace never", "mistral-v3"],
)
def test_sentencepiece_bpe_from_tokenizer_json(bpe, tmp_path, parts, prefix, n_different):
    folder = save(tmp_path, as_tokenizer_json(bpe / "tokenizer.model", **parts))
    path, metadata = vocab_gguf(folder, 1310)
    check = check_tokenizer(path, folder)
    assert check.n_different <= n_different
    assert bool(check.n_different) == bool(n_different) == bool(check.notices)
    assert metadata["tokenizer.ggml.model"].value == "llama"
    assert metadata["tokenizer.ggml.add_space_prefix"].value is prefix
    assert metadata["tokenizer.ggml.add_bos_token"].value is ("post_processor" in parts)
    kinds = metadata["tokenizer.ggml.token_type"].value
    assert kinds[:3] == [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL]
    assert kinds.count(TokenType.BYTE) == 256 and kinds.count(TokenType.UNUSED) == 10


def test_tokenizer_model_alone_gives_the_ids_of_sentencepiece(bpe):
    path, metadata = vocab_gguf(bpe, 1300)
    check = check_tokenizer(path, bpe)
    assert check.n_different == 0 and not check.notices
    assert metadata["tokenizer.ggml.add_bos_token"].value is True


@pytest.mark.parametrize("case", ["gemma", "trimmed"])
def test_other_settings_of_sentencepiece_are_followed(tmp_path, case):
    settings = {
        "gemma": {"add_dummy_prefix": False, "user_defined_symbols": ["\n\n", "[multi]"]},
        "trimmed": {"remove_extra_whitespaces": True},
    }
    folder = train_sentencepiece(tmp_path, **settings[case])
    path, metadata = vocab_gguf(folder, 1300)
    assert metadata["tokenizer.ggml.add_space_prefix"].value is (case != "gemma")
    assert check_tokenizer(path, folder).n_different == 0


def test_runs_of_spaces_that_are_symbols_of_their_own_are_found_in_text(tmp_path):
    folder = train_sentencepiece(
        tmp_path, add_dummy_prefix=False, user_defined_symbols=["▁▁", "▁▁▁▁"]
    )
    path, metadata = vocab_gguf(folder, 1300)
    assert metadata["tokenizer.ggml.tokens"].value[3:5] == ["  ", "    "]
    spaced = ["a  b", "if x:\n    y\n        z", "x      y"]
    assert check_tokenizer(path, folder, spaced).n_different == 0
    assert "written in a text" in check_tokenizer(path, folder).notices[0]


def test_unigram_gives_the_ids_of_sentencepiece_where_it_has_the_characters(tmp_path):
    """All characters of the texts are pieces; NFKC comes from the compiled rules in the file."""
    folder = train_sentencepiece(
        tmp_path,
        model_type="unigram",
        byte_fallback=False,
        character_coverage=1.0,
        vocab_size=1700,
        normalization_rule_name="nmt_nfkc",
        remove_extra_whitespaces=True,
    )
    path, metadata = vocab_gguf(folder, 1700)
    check = check_tokenizer(path, folder)
    assert metadata["tokenizer.ggml.model"].value == "t5"
    assert check.n_different <= 2  # one tie, in a text that the last one repeats


def test_unigram_with_byte_fallback_is_refused_when_llama_cpp_loses_characters(tmp_path):
    folder = train_sentencepiece(tmp_path, model_type="unigram")
    path, _ = vocab_gguf(folder, 1300)
    with pytest.raises(RefusedError, match="gives other ids for"):
        check_tokenizer(path, folder)


def test_an_incomplete_list_of_merges_is_followed_by_another_tokenizer_of_llama_cpp(tmp_path):
    """`tokenizers` trains one way to each token; llama.cpp's SentencePiece would take all."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.ByteFallback()
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    tokenizer.train_from_iterator([piece for piece in PIECES if "\0" not in piece] * 3, trainer)
    spec = json.loads(tokenizer.to_str())
    spec["pre_tokenizer"] = None
    spec["added_tokens"] = spec["added_tokens"][:4]
    folder = save(tmp_path, json.dumps(spec))
    path, metadata = vocab_gguf(folder, 1500)
    assert metadata["tokenizer.ggml.pre"].value == "sarvam-moe"
    assert check_tokenizer(path, folder).n_different == 0


def test_character_bpe_without_byte_tokens_is_refused(bpe, tmp_path):
    """llama.cpp would end the process at the first character it lacks."""
    spec = json.loads(as_tokenizer_json(bpe / "tokenizer.model", normalizer=LLAMA2))
    spec["model"]["byte_fallback"] = False
    with pytest.raises(UnsupportedError, match="byte_fallback"):
        tokenizer_metadata(save(tmp_path, json.dumps(spec)), {}, 1300)


@pytest.mark.parametrize("n_bytes", [0, 1, 10, 100, 5000])
def test_a_cut_tokenizer_model_is_refused(bpe, tmp_path, n_bytes):
    data = (bpe / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(data[:n_bytes])
    with pytest.raises(RefusedError, match=r"tokenizer\.model"):
        tokenizer_metadata(tmp_path, {}, 1300)
