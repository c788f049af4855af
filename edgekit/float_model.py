"""The original model in float32, through transformers, one layer of weights in memory at a time.

transformers supplies the arithmetic only. The class is chosen by `edgekit.arch`, the config is
data without any key that selects code, and weights come from `edgekit.checkpoint` right before a
layer runs and go right after: a model runs in the memory of its largest layer.
"""

import re
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from edgekit.arch import Mapping as TensorMapping
from edgekit.arch import SourceTensor
from edgekit.arch.source import widened
from edgekit.checkpoint import Checkpoint
from edgekit.devices.memory import free_memory
from edgekit.errors import DoesNotFitError, EdgekitError
from edgekit.sizes import format_size

F32Array = npt.NDArray[np.float32]
OnLoad = Callable[[str, Any], None]

OLDEST = (5, 3)  # transformers before it runs code that config.json names: CVE-2026-4372
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ACTIVATION_BYTES = 1 << 26  # of one feed-forward block over a batch; more is no faster
BASE_BYTES = 1 << 28  # torch's own buffers and allocator slack, measured 150 to 200 MiB
_EXPERTS = re.compile(r"^model\.layers\.(\d+)\.mlp\.experts\.(gate_up_proj|down_proj)$")
_CODE = ("attn_implementation", "experts_implementation", "quantization_config")


class LinearInputs(TorchFunctionMode):
    """Inside its ``with`` block, see every matrix product and the weight that it is with.

    transformers keeps all experts of a layer in one 3-D parameter and multiplies by slices of it,
    so no module and no hook sees the input of an expert. The slice's address says which it is.
    """

    def __init__(self, take: Callable[[int, Any], None]) -> None:
        """Call ``take`` with the weight's address and the input ``[..., cols]``."""
        super().__init__()
        self._take = take

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Pass every call through."""
        if func is torch.nn.functional.linear:
            self._take(args[1].data_ptr(), args[0])
        return func(*args, **(kwargs or {}))


class FloatModel:
    """A causal language model that computes what the checkpoint says, exactly.

    Attributes:
        model: transformers' model; its parameters are on the meta device between calls.
        on_load: Called with a parameter's name and float32 tensor when its layer is about to run.
        on_drop: Called when a layer's parameters are gone.
    """

    def __init__(self, checkpoint: Checkpoint, mapping: TensorMapping) -> None:
        """Build the model without weights.

        Raises:
            EdgekitError: transformers is too old.
        """
        self.checkpoint, self.mapping = checkpoint, mapping
        self._sources = {tensor.name: tensor for tensor in mapping.tensors}
        self.on_load: OnLoad = lambda name, parameter: None
        self.on_drop: Callable[[], None] = lambda: None
        self.model = build(mapping.arch.class_name, checkpoint.config)
        for index, layer in enumerate(self.model.model.layers):
            self._stream(layer, f"model.layers.{index}")
        self._stream(self.model.model.norm, "model.norm")
        self._stream(self.model.lm_head, "lm_head")
        self.model.model.embed_tokens.padding_idx = None  # rows are renumbered per batch

    def hidden(self, ids: npt.NDArray[np.int64]) -> Any:
        """Run token ids ``[B, T]``; the head's input, a float32 tensor ``[B, T, hidden]``."""
        return self._run(self.model.model, ids).last_hidden_state

    def logits(self, ids: npt.NDArray[np.int64]) -> F32Array:
        """Run token ids ``[B, T]``; float32 ``[B, T, vocab]``. The head is in memory as float32."""
        logits: F32Array = self._run(self.model, ids).logits.numpy()
        return logits

    def placed(self, ids: npt.NDArray[np.int64]) -> Any:
        """Load the rows of the embedding that ``ids`` need, in order; the ids as places in them."""
        used, places = np.unique(ids, return_inverse=True)
        rows = _float32(self.checkpoint, EMBEDDING, used)
        self.model.model.embed_tokens.weight = _parameter(rows)
        return torch.from_numpy(places.reshape(ids.shape))

    def _run(self, module: Any, ids: npt.NDArray[np.int64]) -> Any:
        with torch.no_grad():
            return module(input_ids=self.placed(ids), use_cache=False)

    def _stream(self, module: Any, prefix: str) -> None:
        module.register_forward_pre_hook(lambda module, _: self._load(module, prefix))
        module.register_forward_hook(lambda module, _, __: self._drop(module))

    def _load(self, module: Any, prefix: str) -> None:
        for name, _ in list(module.named_parameters()):
            full = f"{prefix}.{name}"
            parameter = _parameter(self._values(full))
            owner, _, last = name.rpartition(".")
            setattr(module.get_submodule(owner), last, parameter)
            self.on_load(full, parameter)

    def _drop(self, module: Any) -> None:
        for name, parameter in list(module.named_parameters()):
            owner, _, last = name.rpartition(".")
            setattr(module.get_submodule(owner), last, _on_meta(module, name, parameter))
        self.on_drop()

    def _values(self, name: str) -> F32Array:
        experts = self.expert_tensors(name)
        if not experts:
            return _float32(self.checkpoint, self.stored_name(name))
        parts = [_source_values(self._sources[name]) for name in experts]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    def expert_tensors(self, name: str) -> tuple[str, ...]:
        """GGUF names of what a 3-D parameter of transformers holds; empty for others."""
        match = _EXPERTS.match(name)
        if match is None:
            return ()
        roles = ("gate", "up") if match[2] == "gate_up_proj" else ("down",)
        return tuple(f"blk.{match[1]}.ffn_{role}_exps.weight" for role in roles)

    def stored_name(self, name: str) -> str:
        """The checkpoint's name of a parameter that is stored as one tensor."""
        stored = self.checkpoint.tensors
        if name == HEAD and name not in stored:
            return EMBEDDING
        candidates = (name, name.replace(".mlp.", ".block_sparse_moe."))  # Mixtral's files
        for candidate in candidates:
            if candidate in stored:
                return candidate
        raise EdgekitError(
            f"{self.checkpoint.folder} has no tensor '{name}', which transformers needs to run it; "
            f"convert with --imatrix FILE or --no-calibration"
        )


def batch_chunks(mapping: TensorMapping, chunk: int) -> int:
    """Chunks of that many tokens to run at once, so that activations stay small."""
    width = max(tensor.shape[-1] for tensor in mapping.tensors if "ffn_down" in tensor.name)
    return max(1, ACTIVATION_BYTES // (16 * width * chunk))  # gate, up and two products, float32


def check_memory(
    mapping: TensorMapping, chunk: int, *, with_head: bool, hint: str, with_gradients: bool = False
) -> None:
    """Compare what a run needs with what is free.

    Args:
        mapping: Of the model.
        chunk: Tokens per chunk.
        with_head: Logits are computed too.
        hint: The next step, for the message.
        with_gradients: One chunk at a time also runs back.

    Raises:
        DoesNotFitError: More is needed than is free.
    """
    layers: dict[str, int] = {}
    for tensor in mapping.tensors:
        if tensor.name.startswith("blk."):
            index = tensor.name.split(".")[1]
            layers[index] = layers.get(index, 0) + 4 * tensor.n_weights
    hidden, copies = mapping.hyper.sizes["embd"], 2 if with_gradients else 1
    needed = copies * max(layers.values()) + 2 * ACTIVATION_BYTES + BASE_BYTES
    needed += 16 * chunk * hidden * batch_chunks(mapping, chunk)
    if with_gradients:
        needed += chunk * _bytes_kept(mapping, chunk)
    if with_head:
        needed += 4 * mapping.vocab_size * copies * (hidden + 2 * chunk)
    free = free_memory()
    if needed > free.n_bytes:
        raise DoesNotFitError(
            f"running the float32 model {'forward and back ' if with_gradients else ''}needs "
            f"{format_size(needed)} for its largest layer, {format_size(free.n_bytes)} are free "
            f"({free.source}); {hint}"
        )


def _bytes_kept(mapping: TensorMapping, chunk: int) -> int:
    """Per token: the inputs of all layers, and what one layer keeps for its way back, float32."""
    hyper = mapping.hyper
    width = max(tensor.shape[-1] for tensor in mapping.tensors if "ffn_down" in tensor.name)
    floats = (hyper.n_layers + 16) * hyper.sizes["embd"] + 4 * hyper.n_heads * chunk
    return 4 * (floats + 8 * width * max(1, hyper.n_experts_used))


def _check_version() -> None:
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if version < OLDEST:
        raise EdgekitError(
            f"transformers {transformers.__version__} runs code that a config.json names; "
            f"pip install 'transformers>={'.'.join(map(str, OLDEST))}'"
        )


def build(class_name: str, config: Mapping[str, Any]) -> Any:
    """transformers' model of that class without weights: every parameter is on the meta device.

    Raises:
        EdgekitError: transformers is too old.
    """
    _check_version()
    model_class = getattr(transformers, class_name, None)
    if model_class is None:
        raise EdgekitError(
            f"transformers {transformers.__version__} has no {class_name}, which calibrating "
            "and pruning run; convert with --imatrix FILE or --no-calibration, unpruned"
        )
    kept = {k: v for k, v in config.items() if k not in _CODE and not k.startswith("_")}
    kept = deepcopy(kept)  # transformers writes into it
    kept["torch_dtype"] = kept["dtype"] = "float32"
    data = model_class.config_class.from_dict(kept, attn_implementation="eager")
    data._experts_implementation = "eager"  # one product per expert, which a collector can see
    hook = register_module_parameter_registration_hook(_on_meta)
    try:
        return model_class(data).eval()
    finally:
        hook.remove()


def _on_meta(module: Any, name: str, parameter: Any) -> Any:
    """Weights are never allocated; buffers such as rotary frequencies are computed as usual."""
    return None if parameter is None else torch.nn.Parameter(parameter.to("meta"), False)


def _parameter(values: F32Array) -> Any:
    return torch.nn.Parameter(torch.from_numpy(values), requires_grad=False)


def _float32(checkpoint: Checkpoint, name: str, rows: npt.NDArray[Any] | None = None) -> F32Array:
    stored = checkpoint.read(name)
    values = widened(stored if rows is None else stored[rows], _is_bf16(checkpoint, name))
    return np.array(values) if not values.flags.writeable else values


def _source_values(tensor: SourceTensor) -> F32Array:
    raw = tensor.rows()
    dtype = {"BF16": "<u2", "F16": "<f2", "F32": "<f4"}[tensor.source_type]
    values = widened(raw.view(dtype), tensor.source_type == "BF16").reshape(tensor.shape)
    return np.array(values) if not values.flags.writeable else values


def _is_bf16(checkpoint: Checkpoint, name: str) -> bool:
    return checkpoint.tensors[name].dtype == "BF16"
