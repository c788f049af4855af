"""A conversation in ONNX Runtime: tokens in, logits of the last one out."""

import importlib.util
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from edgekit.errors import EdgekitError, UsageError
from edgekit.exporters.onnx_configs import MODEL_LAST
from edgekit.onnx_part import Facts

F32Array = npt.NDArray[np.float32]
WARNINGS = 3  # log errors only


class Runner(Protocol):
    """One conversation.

    Attributes:
        tokens: In the cache.
        n_ctx: Most tokens of it.
        n_batch: Tokens of a prompt computed at once; may be changed.
        model: genai's model, which renders chat templates; None without genai.
    """

    tokens: list[int]
    n_ctx: int
    n_batch: int
    model: Any

    def decode(self, ids: Sequence[int]) -> F32Array:
        """Append tokens; float32 logits behind the last one, ``[vocab]``."""

    def truncate(self, n: int) -> None:
        """Forget the tokens behind the first ``n``."""

    def close(self) -> None:
        """Free everything; twice is once."""


def has_genai() -> bool:
    """Whether onnxruntime-genai is installed."""
    return importlib.util.find_spec("onnxruntime_genai") is not None


def open_runner(
    folder: Path, facts: Facts, n_ctx: int, n_batch: int, n_threads: int, *, genai: bool | None
) -> Runner:
    """Load a model folder.

    Args:
        folder: As `edgekit.onnx.materialize.write_folder` makes it.
        facts: Of the model.
        n_ctx: Most tokens of the conversation.
        n_batch: Tokens of a prompt computed at once.
        n_threads: Of ONNX Runtime.
        genai: Through onnxruntime-genai; None: where it is installed.
    """
    if has_genai() if genai is None else genai:
        return GenaiRunner(folder, n_ctx, n_batch, n_threads)
    return OrtRunner(folder / MODEL_LAST, facts, n_ctx, n_batch, n_threads)


def runtime() -> Any:
    """The module onnxruntime.

    Raises:
        EdgekitError: It is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise EdgekitError(
            f"ONNX Runtime needs the package {error.name}; pip install 'edgekit[onnx]'"
        ) from error
    return onnxruntime


class OrtRunner:
    """Our own loop: keys and values stay in buffers that the graph reads and writes in place."""

    def __init__(self, graph: Path, facts: Facts, n_ctx: int, n_batch: int, n_threads: int) -> None:
        """Load ``graph``, which has the input ``num_logits_to_keep``."""
        ort = runtime()
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = n_threads, 1
        options.log_severity_level = WARNINGS
        options.enable_cpu_mem_arena = False  # prompts of changing length fragment an arena
        with _loading(graph):
            self._session: Any = ort.InferenceSession(
                str(graph), options, providers=["CPUExecutionProvider"]
            )
        self.tokens, self.n_ctx, self.n_batch, self.model = list[int](), n_ctx, n_batch, None
        shape = (1, facts.n_kv_heads, n_ctx, facts.head)
        self._binding: Any = self._session.io_binding()
        self._cache: list[Any] = []
        for layer in range(facts.n_layers):
            for part in ("key", "value"):
                value = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32))
                self._binding.bind_ortvalue_input(f"past_key_values.{layer}.{part}", value)
                self._binding.bind_ortvalue_output(f"present.{layer}.{part}", value)
                self._cache.append(value)

    def decode(self, ids: Sequence[int]) -> F32Array:
        """Append tokens, a batch at a time; logits behind the last one."""
        _check_room(self, ids)
        logits = np.zeros(0, np.float32)
        for at in range(0, len(ids), self.n_batch):
            logits = self.step(ids[at : at + self.n_batch])[-1]
        return logits.copy()

    def step(self, ids: Sequence[int], keep: int = 1) -> F32Array:
        """Append tokens at once; logits of the last ``keep``, float32 ``[keep, vocab]``."""
        total = len(self.tokens) + len(ids)
        feeds = {
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, total), np.int64),
            "num_logits_to_keep": np.array(keep, np.int64),
        }
        for name, value in feeds.items():
            self._binding.bind_cpu_input(name, value)
        self._binding.bind_output("logits")
        self._session.run_with_iobinding(self._binding)
        self.tokens += ids
        logits: F32Array = self._binding.get_outputs()[len(self._cache)].numpy()  # bound last
        return logits[0]

    def truncate(self, n: int) -> None:
        """Forget the tokens behind the first ``n``; what the cache has of them is written over."""
        del self.tokens[n:]

    def close(self) -> None:
        """Free everything; twice is once."""
        self._binding = self._session = None
        self._cache = []


class GenaiRunner:
    """The same through onnxruntime-genai, whose generator owns the cache."""

    def __init__(self, folder: Path, n_ctx: int, n_batch: int, n_threads: int) -> None:
        """Load ``folder``, which has a genai_config.json."""
        import onnxruntime_genai as genai

        options = {"intra_op_num_threads": n_threads, "log_severity_level": WARNINGS}
        with _loading(folder):
            config = genai.Config(str(folder))
            config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
            self.model: Any = genai.Model(config)
        self.tokens, self.n_ctx, self.n_batch = list[int](), n_ctx, n_batch
        params = genai.GeneratorParams(self.model)
        params.set_search_options(max_length=n_ctx, past_present_share_buffer=True)
        self._generator: Any = genai.Generator(self.model, params)

    def decode(self, ids: Sequence[int]) -> F32Array:
        """Append tokens, a batch at a time; logits behind the last one."""
        _check_room(self, ids)
        for at in range(0, len(ids), self.n_batch):
            batch = ids[at : at + self.n_batch]
            self._generator.append_tokens(np.array([batch], np.int32))
            self.tokens += batch
        logits: F32Array = np.asarray(self._generator.get_logits(), np.float32)
        return logits.reshape(-1, logits.shape[-1])[-1].copy()

    def truncate(self, n: int) -> None:
        """Forget the tokens behind the first ``n``."""
        self._generator.rewind_to(n)
        del self.tokens[n:]

    def close(self) -> None:
        """Free everything; twice is once."""
        self._generator = self.model = None


@contextmanager
def _loading(path: Path) -> Iterator[None]:
    """What the runtimes raise, kinds of their own, as one line."""
    try:
        yield
    except Exception as error:
        raise EdgekitError(f"ONNX Runtime cannot load {path}: {error}") from error


def _check_room(runner: Runner, ids: Sequence[int]) -> None:
    left = runner.n_ctx - len(runner.tokens)
    if not 0 < len(ids) <= left:
        raise UsageError(f"{len(ids)} tokens to append, the context has {left} positions left")
