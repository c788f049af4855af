"""A model in llama.cpp, and what its vocabulary says."""

import ctypes
import weakref
from collections.abc import Sequence
from types import TracebackType
from typing import Protocol

from edgekit.errors import EdgekitError, UsageError
from edgekit.exporters.gguf import Gguf
from edgekit.exporters.normalizers import TextNormalizer
from edgekit.llama.binding import LOG, binding
from edgekit.llama.vocab import vocab_of
from edgekit.llama.weight_memory import WeightMemory


class Closable(Protocol):
    """What a model closes before itself: its contexts."""

    def close(self) -> None:
        """Give everything back; twice is once."""
        ...


class Model:
    """A model in llama.cpp; a context manager. Made by `open_model`.

    Attributes:
        header: The GGUF header, checked.
        vocab: Special tokens and their use.
        weights_bytes: Bytes of all tensors as llama.cpp counts them.
        memory: That the weights lie in where edgekit owns it.
    """

    def __init__(self, handle: int, header: Gguf, memory: WeightMemory | None = None) -> None:
        """Take over ``handle``, and the memory that its weights lie in; `close` frees both."""
        lib = binding()
        self._handle: int | None = handle
        self.memory = memory
        self._contexts: weakref.WeakSet[Closable] = weakref.WeakSet()
        self.header = header
        self._normalized = TextNormalizer(header.metadata)
        self._vocab = lib.llama_model_get_vocab(handle)
        self.vocab = vocab_of(lib, self._vocab)
        self.weights_bytes = int(lib.llama_model_size(handle))
        self.n_parameters = int(lib.llama_model_n_params(handle))
        self.n_ctx_train = int(lib.llama_model_n_ctx_train(handle))

    @property
    def handle(self) -> int:
        """The ``llama_model *``.

        Raises:
            EdgekitError: The model was closed.
        """
        if self._handle is None:
            raise EdgekitError("the model is closed; open it again")
        return self._handle

    def __enter__(self) -> "Model":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def add_context(self, context: Closable) -> None:
        """Close ``context`` before the model, in whatever order the user closes."""
        self._contexts.add(context)

    def close(self) -> None:
        """Free the contexts and the weights; twice is once."""
        for context in list(self._contexts):
            context.close()
        if self._handle is not None:
            binding().llama_model_free(self._handle)
            self._handle = None
        if self.memory is not None:
            self.memory.close()
            self.memory = None

    def tokenize(
        self, text: str, *, add_special: bool = True, parse_special: bool = False
    ) -> list[int]:
        """Turn text into token ids, after the normalization that the GGUF asks edgekit for.

        Args:
            text: Any text.
            add_special: Put BOS and EOS where the model wants them.
            parse_special: Read ``<|eot|>`` and the like in the text as that one token.
        """
        data = self._normalized(text, parse_special).encode("utf-8", "replace")
        lib = binding()
        capacity = len(data) + 8  # a token covers at least a byte; room for BOS, EOS and a prefix
        while True:
            ids = (ctypes.c_int32 * capacity)()
            n = lib.llama_tokenize(
                self._open_vocab, data, len(data), ids, capacity, add_special, parse_special
            )
            if n >= 0:
                return list(ids[:n])
            if -n <= capacity:
                raise EdgekitError(f"llama.cpp cannot tokenize {len(data)} bytes: {LOG.reason()}")
            capacity = -n

    def detokenize(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Turn token ids into text; ``special`` shows BOS and the like."""
        lib = binding()
        array = (ctypes.c_int32 * len(ids))(*self.checked(ids))
        capacity = 16 * len(ids) + 16
        while True:
            buffer = ctypes.create_string_buffer(capacity)
            n = lib.llama_detokenize(
                self._open_vocab, array, len(ids), buffer, capacity, False, special
            )
            if n >= 0:
                return buffer.raw[:n].decode("utf-8", "replace")
            capacity = -n

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """The bytes of one token, perhaps a part of a UTF-8 character; control tokens have none."""
        lib, capacity = binding(), 64
        self.checked([token])
        while True:
            buffer = ctypes.create_string_buffer(capacity)
            n = lib.llama_token_to_piece(self._open_vocab, token, buffer, capacity, 0, special)
            if n >= 0:
                return buffer.raw[:n]
            capacity = -n

    def is_end(self, token: int) -> bool:
        """Whether the token ends a generation (EOS, EOT and their kin)."""
        self.checked([token])
        return bool(binding().llama_vocab_is_eog(self._open_vocab, token))

    def checked(self, ids: Sequence[int]) -> Sequence[int]:
        """Give ``ids`` back.

        Raises:
            UsageError: One is no token of the vocabulary; llama.cpp would abort or read wildly.
        """
        for token in ids:
            if not 0 <= token < self.vocab.n_tokens:
                raise UsageError(f"token {token} is not in the vocabulary of {self.vocab.n_tokens}")
        return ids

    @property
    def _open_vocab(self) -> int:
        self.handle  # noqa: B018  raises when closed
        return int(self._vocab)
