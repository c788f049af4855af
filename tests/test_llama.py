"""llama.cpp through edgekit.llama against llama-cpp-python's own high-level class."""

import os
from collections.abc import Iterator
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_gguf import WORDS, write_tiny_llama
from virtual_files import IntoReader, Reader

from edgekit.errors import EdgekitError, UsageError
from edgekit.llama import (
    Context,
    Generation,
    Model,
    Sampling,
    generate,
    open_model,
)
from edgekit.llama.generation import until_stop

TEXT = "the sum of ab, é 日本 🙂"
PROMPT = [1, 70, 80, 90, 100]
ATOL = 6 * 2**-11  # the largest logits are about 6; flash attention sums float16 in other tiles


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("gguf") / "tiny.gguf", words=WORDS)


@pytest.fixture(scope="module")
def theirs(path: Path) -> Iterator[llama_cpp.Llama]:
    llama = llama_cpp.Llama(
        str(path), n_ctx=256, n_threads=1, logits_all=True, flash_attn=True, verbose=False
    )
    yield llama
    llama.close()


@pytest.fixture
def model(path: Path) -> Iterator[Model]:
    with open_model(path) as model:
        yield model


def context(model: Model, n_ctx: int = 256, **options: object) -> Context:
    return Context(model, n_ctx, n_threads=1, **options)  # type: ignore[arg-type]


def greedy(context: Context, n: int) -> list[int]:
    generation = generate(context, PROMPT, n, Sampling(temperature=0))
    list(generation)
    return generation.ids


@pytest.mark.parametrize("how", ["mapped", "anon", "read", "readinto", "short reads", "spilled"])
def test_logits_equal_llama_cpp_pythons_bit_for_bit(
    how: str, path: Path, theirs: llama_cpp.Llama, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data = path.read_bytes()
    sources = {
        "read": Reader(data),
        "readinto": IntoReader(data),
        "short reads": Reader(data, piece=1000),
        "spilled": Reader(data),
    }
    if how == "spilled":  # what a platform without fopencookie does
        monkeypatch.setattr("edgekit.llama.opening.has_fopencookie", lambda: False)
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with open_model(
        sources.get(how, path), residency=how if how in ("mapped", "anon") else None
    ) as model:
        ids = model.tokenize(TEXT)
        with context(model, n_outputs=256) as ours:
            logits = ours.decode(ids, "all")
            assert not list(tmp_path.iterdir())
    theirs.reset()
    theirs.eval(ids)
    assert np.array_equal(logits, theirs.scores[: len(ids)])


def test_tokens_and_text_equal_llama_cpp_pythons(model: Model, theirs: llama_cpp.Llama) -> None:
    for add_special in (False, True):
        ids = model.tokenize(TEXT, add_special=add_special)
        assert ids == theirs.tokenize(TEXT.encode(), add_bos=add_special)
        assert model.detokenize(ids) == theirs.detokenize(ids).decode()
    assert model.tokenize("</s>", add_special=False, parse_special=True) == [2] != ids
    assert model.detokenize([1, 70, 2], special=True) == "<s>C</s>"
    facts = model.vocab
    assert (facts.n_tokens, facts.bos, facts.eos, facts.adds_bos) == (264, 1, 2, True)
    assert model.is_end(2) and not model.is_end(70)


def test_greedy_generation_equals_an_argmax_loop(model: Model, theirs: llama_cpp.Llama) -> None:
    ids = list(PROMPT)
    theirs.reset()
    for n in range(12):
        theirs.eval(ids if n == 0 else ids[-1:])
        ids.append(int(np.argmax(theirs.scores[theirs.n_tokens - 1])))
    with context(model) as ours:
        assert greedy(ours, 12) == ids[len(PROMPT) :]
        assert ours.tokens == ids[:-1]


def test_batches_and_chosen_positions_give_the_same_logits(model: Model) -> None:
    ids = model.tokenize(TEXT * 2)
    exact = {"kv_type": "f32", "flash_attention": False}
    with (
        context(model, n_outputs=256, **exact) as whole,
        context(model, n_batch=5, n_outputs=5, **exact) as parts,
    ):
        everything = whole.decode(ids, "all")
        some = parts.decode(ids, [0, 4, 5, 11])
        np.testing.assert_allclose(some, everything[[0, 4, 5, 11]], rtol=0, atol=1e-5)
        parts.clear()
        np.testing.assert_allclose(parts.decode(ids), everything[-1:], rtol=0, atol=1e-5)
        assert parts.decode([70], "none").shape == (0, 264)


def test_a_seed_fixes_the_draw_and_another_changes_it(model: Model) -> None:
    texts = []
    for seed in (1, 1, 2):
        with context(model) as ours:
            texts.append("".join(generate(ours, PROMPT, 24, Sampling(1.5, seed, 0, 1, 0))))
    assert texts[0] == texts[1] != texts[2]


def test_streamed_pieces_are_whole_characters(model: Model) -> None:
    with context(model) as ours:
        generation = generate(ours, PROMPT, 200, Sampling(5.0, 3, 0, 1, 0))
        pieces = list(generation)
    data = b"".join(model.piece(token) for token in generation.ids)
    assert "".join(pieces) == data.decode("utf-8", "replace")
    with pytest.raises(UnicodeDecodeError):  # or the claim was never put to the test
        data.decode()


def test_generation_counts_and_says_why_it_stopped(model: Model) -> None:
    with context(model, n_ctx=256) as ours:
        generation = generate(ours, PROMPT, 3, Sampling(0))
        assert generation.stopped is None
        text = "".join(generation)
        timings = generation.timings
        assert (timings.n_prompt, timings.n_gen, generation.stopped) == (5, 3, "length")
        assert timings.prompt_tokens_per_second > 0 and timings.gen_tokens_per_second > 0
        ours.clear()
        generation = generate(ours, PROMPT, 3, Sampling(0), stop=[text[1:3]])
        assert ("".join(generation), generation.stopped) == (text[:1], "stop")
        ours.clear()
        generation = generate(ours, [70] * 250, 100, Sampling(0))
        assert len("".join(generation)) and generation.stopped in ("context", "end")
        assert len(ours.tokens) <= 256


@given(st.lists(st.text("ab", min_size=1, max_size=3), max_size=8), st.text("ab", min_size=1))
@settings(max_examples=200, deadline=None)
def test_stop_texts_are_found_across_pieces(pieces: list[str], stop: str) -> None:
    generation, text = Generation(), "".join(pieces)
    got = "".join(until_stop(iter(pieces), [stop, "zz"], generation))
    assert got == text.split(stop)[0]
    assert (generation.stopped == "stop") == (stop in text)


def test_a_saved_state_goes_on_as_if_undisturbed(model: Model, path: Path, tmp_path: Path) -> None:
    with context(model) as first:
        first.decode(PROMPT)
        state = first.save()
        expected = first.decode([110, 111])
    with context(model, n_ctx=512) as second:
        second.restore(state)
        assert second.tokens == PROMPT
        assert np.array_equal(second.decode([110, 111]), expected)
    lower = _quantized(path, tmp_path / "q8.gguf")
    with open_model(lower) as other, context(other) as third:
        third.restore(state)
        assert not np.array_equal(third.decode([110, 111]), expected)
    with (
        context(model, kv_type="f32") as fourth,
        pytest.raises(EdgekitError, match=r"cannot restore the state.*key type"),
    ):
        fourth.restore(state)
    assert fourth.tokens == []


def test_truncate_forgets_what_came_after(model: Model) -> None:
    with context(model) as ours:
        expected = ours.decode(PROMPT)
        ours.decode([120, 121, 122])
        ours.truncate(len(PROMPT) - 1)
        again = ours.decode(PROMPT[-1:])
        np.testing.assert_allclose(again, expected, rtol=0, atol=ATOL)
        with pytest.raises(UsageError, match="cannot keep 9 of 5 tokens"):
            ours.truncate(9)


def test_quantized_cache_works_where_heads_are_whole_blocks(tmp_path: Path, model: Model) -> None:
    wide = write_tiny_llama(tmp_path / "wide.gguf", heads=2, kv_heads=1)
    with open_model(wide) as other, context(other) as exact, context(other, kv_type="q8_0") as ours:
        want, got = exact.decode(PROMPT), ours.decode(PROMPT)
        assert 0 < np.abs(want - got).max() < 0.05 * np.abs(want).max()
    with pytest.raises(EdgekitError, match="K cache type q8_0 with block size 32 does not divide"):
        context(model, kv_type="q8_0")


def _quantized(source: Path, target: Path) -> Path:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.pure = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, 1, True
    status = llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), params)
    assert status == 0
    return target


def test_values_that_llama_cpp_would_abort_on_are_refused(model: Model) -> None:
    with context(model, n_outputs=2, n_batch=8) as ours:
        for tokens, message in (
            ([], "cannot decode 0 tokens"),
            ([5] * 257, "the context has 256 positions left"),
            ([264], "token 264 is not in the vocabulary of 264"),
            ([-1], "token -1 is not in"),
        ):
            with pytest.raises(UsageError, match=message):
                ours.decode(tokens)
        with pytest.raises(UsageError, match="make it with n_outputs=8"):
            ours.decode([5] * 9, "all")
        with pytest.raises(UsageError, match="a prompt of 0 tokens"):
            generate(ours, [], 5)
    for options in ({"n_ctx": 0}, {"n_ctx": -3}, {"n_ctx": 1 << 40}, {"n_batch": 0}):
        with pytest.raises(UsageError, match="is not between 1 and"):
            context(model, **options)
    with pytest.raises(UsageError, match="unknown KV type 'q8'; did you mean 'q8_0'"):
        context(model, kv_type="q8")
    with pytest.raises(UsageError, match="temperature -1 is not between"):
        Sampling(temperature=-1)


def test_closed_models_and_contexts_say_so(path: Path) -> None:
    model = open_model(path)
    ours = context(model)
    model.close()
    model.close()
    with pytest.raises(EdgekitError, match="the context is closed"):
        ours.decode([5])
    with pytest.raises(EdgekitError, match="the model is closed"):
        model.tokenize("x")
