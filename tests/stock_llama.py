"""Logits of a GGUF from stock llama.cpp through its low-level API: float32 everywhere it can be.

Nothing of ours but the writer's own header check is in it.
"""

import ctypes
from collections.abc import Sequence
from pathlib import Path

import llama_cpp
import numpy as np
import numpy.typing as npt

from edgekit.exporters.gguf import read_header


@llama_cpp.llama_log_callback
def _silent(_level: int, _text: bytes, _data: ctypes.c_void_p) -> None:
    pass


def logits(path: Path, tokens: Sequence[int], n_ctx: int = 0) -> npt.NDArray[np.float32]:
    """Logits ``[tokens, vocab]`` of every position.

    The KV cache is F32, flash attention off, weights are not repacked, one thread.
    """
    read_header(path)  # a malformed file would end the process
    llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_default_params()
    params.use_extra_bufts = False
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    assert model, f"llama.cpp refuses {path}"
    try:
        return _decode(model, tokens, n_ctx or len(tokens))
    finally:
        llama_cpp.llama_model_free(model)


def _decode(model: int, tokens: Sequence[int], n_ctx: int) -> npt.NDArray[np.float32]:
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = n_ctx
    params.n_batch = params.n_ubatch = max(len(tokens), 32)
    params.n_threads = params.n_threads_batch = 1
    params.type_k = params.type_v = 0  # GGML_TYPE_F32
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.swa_full = True
    context = llama_cpp.llama_init_from_model(model, params)
    assert context, "llama.cpp makes no context"
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    try:
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, i, 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        assert llama_cpp.llama_decode(context, batch) == 0
        n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        data = llama_cpp.llama_get_logits(context)
        return np.ctypeslib.as_array(data, (len(tokens), n_vocab)).copy()
    finally:
        llama_cpp.llama_batch_free(batch)
        llama_cpp.llama_free(context)
