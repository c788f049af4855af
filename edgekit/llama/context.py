"""A context of llama.cpp: the KV cache of one conversation, and decoding with it."""

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from edgekit.errors import DoesNotFitError, EdgekitError, RefusedError, UnknownNameError, UsageError
from edgekit.llama.binding import LOG, binding
from edgekit.llama.listener import Listener
from edgekit.llama.model import Model

Logits = npt.NDArray[np.float32]

# ggml_type of the KV cache's cells; llama.cpp takes no others
KV_TYPES = {
    "f32": 0,
    "f16": 1,
    "bf16": 30,
    "q8_0": 8,
    "q5_1": 7,
    "q5_0": 6,
    "q4_1": 3,
    "q4_0": 2,
    "iq4_nl": 20,
}
_MAX_CONTEXT = 1 << 24  # far beyond any model; keeps a mistyped number from becoming an allocation


@dataclass(frozen=True)
class State:
    """A conversation: the tokens decoded so far and llama.cpp's serialized KV cache."""

    tokens: tuple[int, ...]
    data: bytes


class Context:
    """The KV cache of one sequence; a context manager.

    Attributes:
        model: Closed after this context.
        tokens: Everything decoded so far, oldest first.
        n_ctx: Positions there are, ``n_ctx`` rounded up by llama.cpp.
    """

    def __init__(
        self,
        model: Model,
        n_ctx: int,
        *,
        n_batch: int = 512,
        kv_type: str = "f16",
        n_threads: int | None = None,
        n_outputs: int = 1,
        flash_attention: bool | None = None,
        listener: Listener | None = None,
    ) -> None:
        """Allocate the cache and the compute buffers.

        Args:
            model: Opened with its weights.
            n_ctx: Positions, at least 1.
            n_batch: Tokens per call of llama.cpp; compute buffers grow with it.
            kv_type: A key of `KV_TYPES`; quantized V turns flash attention on.
            n_threads: ``None`` takes `default_threads`.
            n_outputs: Rows of logits that one batch may ask for; every row costs a float
                per token of the vocabulary in the compute buffers.
            flash_attention: ``None`` lets llama.cpp choose: on where it can. On the CPU it sums in
                float16, which moves logits by about 1e-3 of their size with the batch's shape.
            listener: Hears routers; what it raises comes out of `decode`.

        Raises:
            UsageError: An argument is out of range.
            DoesNotFitError: llama.cpp could not allocate. EdgekitError: it refuses otherwise.
        """
        self.model, self.tokens = model, list[int]()
        self._handle: int | None = None
        self.n_batch, self.n_outputs = min(n_batch, n_ctx), min(n_outputs, n_batch, n_ctx)
        threads = default_threads() if n_threads is None else n_threads
        params = _context_params(n_ctx, self.n_batch, kv_type, threads, self.n_outputs)
        if flash_attention is not None:
            params.flash_attn_type = int(flash_attention)
        self._listener = listener
        if listener is not None:
            params.cb_eval = type(params.cb_eval)(listener.function)
            params.cb_eval_user_data = listener.user_data
        LOG.clear()
        self._handle = binding().llama_init_from_model(model.handle, params)
        if not self._handle:
            raise _refusal(n_ctx, kv_type)
        model.add_context(self)
        self.n_ctx = int(binding().llama_n_ctx(self._handle))

    @property
    def handle(self) -> int:
        """The ``llama_context *``.

        Raises:
            EdgekitError: The context was closed.
        """
        if self._handle is None:
            raise EdgekitError("the context is closed; make one anew")
        return self._handle

    def __enter__(self) -> "Context":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the cache; twice is once."""
        if self._handle is not None:
            binding().llama_free(self._handle)
            self._handle = None

    def clear(self) -> None:
        """Forget all tokens."""
        binding().llama_memory_clear(binding().llama_get_memory(self.handle), False)
        self.tokens.clear()

    def truncate(self, n_tokens: int) -> None:
        """Forget all tokens but the first ``n_tokens``.

        Raises:
            EdgekitError: The model's cache (recurrent, sliding window) cannot go back so far.
        """
        if not 0 <= n_tokens <= len(self.tokens):
            raise UsageError(f"cannot keep {n_tokens} of {len(self.tokens)} tokens")
        if not self._cut(n_tokens):
            raise EdgekitError(
                f"the cache of this model cannot go back to {n_tokens} tokens; "
                f"clear it and decode again"
            )
        del self.tokens[n_tokens:]

    def _cut(self, n_tokens: int) -> bool:
        """Drop what the cache holds behind ``n_tokens``; false where it cannot go back so far.

        A window has moved on then: what comes next would not find what it attends to. llama.cpp
        itself does not look at that.
        """
        lib, memory = binding(), binding().llama_get_memory(self.handle)
        window = int(lib.llama_model_n_swa(self.model.handle))
        oldest = int(lib.llama_memory_seq_pos_min(memory, 0))
        n_held = int(lib.llama_memory_seq_pos_max(memory, 0)) + 1
        if window and n_held > n_tokens and oldest > max(0, n_tokens - window):
            return False
        return bool(lib.llama_memory_seq_rm(memory, 0, n_tokens, -1))

    def decode(
        self, tokens: Sequence[int], logits: Literal["none", "last", "all"] | Sequence[int] = "last"
    ) -> Logits:
        """Append tokens to the cache.

        Args:
            tokens: Ids, at most as many as positions are left.
            logits: Which of ``tokens`` get logits: indices in increasing order, or a word.

        Returns:
            float32 ``[n, n_vocab]``, raw scores of the token that follows each asked-for position.

        Raises:
            UsageError: No tokens, an unknown id, no room, or more logits than ``n_outputs`` allows.
            EdgekitError: llama.cpp failed, or the listener did; the tokens decoded before the
                failing batch stay.
        """
        wanted = self._wanted(tokens, logits)
        out = np.empty((int(wanted.sum()), self.model.vocab.n_tokens), np.float32)
        n_done = 0
        for start in range(0, len(tokens), self.n_batch):
            batch = slice(start, start + self.n_batch)
            rows = self._decode_batch(tokens[batch], wanted[batch])
            out[n_done : n_done + len(rows)] = rows
            n_done += len(rows)
        return out

    def _wanted(self, tokens: Sequence[int], logits: str | Sequence[int]) -> npt.NDArray[np.int8]:
        n, left = len(tokens), self.n_ctx - len(self.tokens)
        if not n or n > left:
            raise UsageError(f"cannot decode {n} tokens; the context has {left} positions left")
        self.model.checked(tokens)
        wanted = np.zeros(n, np.int8)
        if isinstance(logits, str):
            wanted[{"none": slice(0), "last": slice(n - 1, n), "all": slice(n)}[logits]] = 1
        else:
            wanted[np.asarray(logits, np.int64)] = 1
        most = max(int(wanted[i : i + self.n_batch].sum()) for i in range(0, n, self.n_batch))
        if most > self.n_outputs:
            raise UsageError(
                f"{most} rows of logits in a batch of {self.n_batch}, this context was made for "
                f"{self.n_outputs}; make it with n_outputs={most}"
            )
        return wanted

    def _decode_batch(self, tokens: Sequence[int], wanted: npt.NDArray[np.int8]) -> Logits:
        lib, ids = binding(), np.asarray(tokens, np.int32)
        batch = lib.llama_batch()  # positions and sequence stay NULL: it continues sequence 0
        batch.n_tokens = len(ids)
        batch.token = ids.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        batch.logits = wanted.ctypes.data_as(ctypes.POINTER(ctypes.c_int8))
        LOG.clear()
        try:
            status = lib.llama_decode(self.handle, batch)
            self._raise_heard()
            if status != 0:
                raise EdgekitError(f"llama.cpp failed to decode ({status}): {LOG.reason()}")
            self.tokens += [int(token) for token in tokens]
        except BaseException:  # an interrupt comes when llama.cpp is done with the batch
            if not self._cut(len(self.tokens)):
                self.clear()
            raise
        n, n_vocab = int(wanted.sum()), self.model.vocab.n_tokens
        if not n:
            return np.empty((0, n_vocab), np.float32)
        address = ctypes.cast(lib.llama_get_logits(self.handle), ctypes.c_void_p).value
        assert address is not None
        flat = (ctypes.c_float * (n * n_vocab)).from_address(address)
        return np.ctypeslib.as_array(flat).reshape(n, n_vocab)

    def _raise_heard(self) -> None:
        """Raise what the listener ended the graph for."""
        error = self._listener.error if self._listener is not None else None
        if error is not None and self._listener is not None:
            self._listener.error = None
            raise error

    def save(self) -> State:
        """Copy the conversation out; it restores under any tier of the same architecture."""
        lib = binding()
        data = (ctypes.c_uint8 * lib.llama_state_get_size(self.handle))()
        n = lib.llama_state_get_data(self.handle, data, len(data))
        if not n:
            raise EdgekitError(f"llama.cpp cannot save the state: {LOG.reason()}")
        return State(tuple(self.tokens), bytes(memoryview(data)[:n]))

    def restore(self, state: State) -> None:
        """Go on from a saved conversation, made with the same KV type.

        Raises:
            EdgekitError: The state does not fit this model or context; this context is then empty.
        """
        if len(state.tokens) > self.n_ctx:
            raise UsageError(f"the state has {len(state.tokens)} tokens, the context {self.n_ctx}")
        LOG.clear()
        data = (ctypes.c_uint8 * len(state.data)).from_buffer_copy(state.data)
        n = binding().llama_state_set_data(self.handle, data, len(data))
        if n != len(state.data):
            self.clear()
            raise EdgekitError(f"llama.cpp cannot restore the state: {LOG.reason()}")
        self.tokens[:] = state.tokens

    def save_file(self, path: Path) -> None:
        """Write the conversation to a file, without a copy in memory; tokens and KV cache.

        Raises:
            EdgekitError: The file cannot be written whole.
        """
        LOG.clear()
        ids = (ctypes.c_int32 * len(self.tokens))(*self.tokens)
        saved = binding().llama_state_save_file(self.handle, os.fsencode(path), ids, len(ids))
        if not saved:
            raise EdgekitError(f"llama.cpp cannot save the state: {LOG.reason()}")

    def restore_file(self, path: Path) -> None:
        """Go on from `save_file`; as `restore`."""
        LOG.clear()
        ids, n = (ctypes.c_int32 * self.n_ctx)(), ctypes.c_size_t()
        if not binding().llama_state_load_file(
            self.handle, os.fsencode(path), ids, len(ids), ctypes.byref(n)
        ):
            self.clear()
            raise RefusedError(
                f"{path} is no conversation with this model, or one longer than the context of "
                f"{self.n_ctx} ({LOG.reason()}); give another file, or remove it"
            )
        self.tokens[:] = ids[: n.value]


def default_threads() -> int:
    """Physical cores, or fewer where the process may use fewer."""
    import psutil

    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    return max(1, min(cores, allowed))


def _context_params(n_ctx: int, n_batch: int, kv_type: str, n_threads: int, n_outputs: int) -> Any:
    if kv_type not in KV_TYPES:
        raise UnknownNameError("KV type", kv_type, KV_TYPES)
    for name, value, most in (
        ("context", n_ctx, _MAX_CONTEXT),
        ("batch size", n_batch, _MAX_CONTEXT),
        ("number of threads", n_threads, 512),  # GGML_MAX_N_THREADS
        ("number of logits rows", n_outputs, n_batch),
    ):
        if not 1 <= value <= most:
            raise UsageError(f"{name} {value} is not between 1 and {most}")
    params = binding().llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, n_batch, n_batch
    params.n_outputs_max = n_outputs
    params.n_threads = params.n_threads_batch = n_threads
    params.type_k = params.type_v = KV_TYPES[kv_type]
    params.swa_full = False  # as llama.cpp's tools: a sliding-window layer keeps its window only
    params.no_perf = True
    return params


def _refusal(n_ctx: int, kv_type: str) -> EdgekitError:
    reason = LOG.reason()
    kind = DoesNotFitError if "alloc" in reason or "buffer" in reason else EdgekitError
    return kind(f"llama.cpp cannot make a context of {n_ctx} with a {kv_type} cache: {reason}")
