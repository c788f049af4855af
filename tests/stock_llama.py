"""Logits of a GGUF from stock llama.cpp through its low-level API: float32 everywhere it can be.

Nothing of ours but the strict header check is in it.
"""

import ctypes
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import llama_cpp
import numpy as np
import numpy.typing as npt

from edgekit.exporters.gguf import read_header


@llama_cpp.llama_log_callback
def _silent(_level: int, _text: bytes, _data: ctypes.c_void_p) -> None:
    pass


class StockModel:
    """A GGUF in llama.cpp; the KV cache is F32, flash attention off, nothing repacked, one thread.

    llama.cpp rounds ``n_ctx`` up to a multiple of 256.
    """

    def __init__(self, path: Path, n_ctx: int) -> None:
        """Load ``path`` with a context of ``n_ctx`` tokens."""
        read_header(path)  # a malformed file would end the process
        llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        model_params = llama_cpp.llama_model_default_params()
        model_params.use_extra_bufts = False
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), model_params)
        assert self.model, f"llama.cpp refuses {path}"
        self.n_ctx = n_ctx
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = n_ctx
        params.n_ubatch = 128  # less masked attention than in one piece
        params.n_threads = params.n_threads_batch = 1
        params.type_k = params.type_v = 0  # GGML_TYPE_F32
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.swa_full = True
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        assert self.context, f"llama.cpp makes no context of {n_ctx} tokens"
        self.batch = llama_cpp.llama_batch_init(n_ctx, 0, 1)

    def logits(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Logits ``[tokens, vocab]`` of every position, from an empty KV cache."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        self.batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            self.batch.token[i], self.batch.pos[i], self.batch.logits[i] = token, i, 1
            self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, 0
        assert llama_cpp.llama_decode(self.context, self.batch) == 0
        data = llama_cpp.llama_get_logits(self.context)
        return np.ctypeslib.as_array(data, (len(tokens), self.n_vocab)).copy()

    def __enter__(self) -> "StockModel":
        """Nothing is left to do."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Free everything."""
        llama_cpp.llama_batch_free(self.batch)
        llama_cpp.llama_free(self.context)
        llama_cpp.llama_model_free(self.model)


def logits(path: Path, tokens: Sequence[int], n_ctx: int = 0) -> npt.NDArray[np.float32]:
    """Logits ``[tokens, vocab]`` of every position, the model loaded for it."""
    with StockModel(path, max(n_ctx, len(tokens))) as model:
        return model.logits(tokens)
