"""Facts of a model's vocabulary, as llama.cpp tells them."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Vocab:
    """Facts of the vocabulary; a token id is ``None`` where the model has no such token."""

    n_tokens: int
    bos: int | None
    eos: int | None
    eot: int | None
    adds_bos: bool
    adds_eos: bool


def vocab_of(lib: Any, vocab: int) -> Vocab:
    """The facts of ``llama_vocab*`` ``vocab``; ``lib`` is llama.cpp, bound."""

    def token(number: int) -> int | None:
        return None if number < 0 else int(number)

    return Vocab(
        n_tokens=int(lib.llama_vocab_n_tokens(vocab)),
        bos=token(lib.llama_vocab_bos(vocab)),
        eos=token(lib.llama_vocab_eos(vocab)),
        eot=token(lib.llama_vocab_eot(vocab)),
        adds_bos=bool(lib.llama_vocab_get_add_bos(vocab)),
        adds_eos=bool(lib.llama_vocab_get_add_eos(vocab)),
    )
