"""Architectures as rows of data: tensors with their shapes, and what llama.cpp takes for granted.

Facts are those of llama.cpp's graphs (``src/models/*.cpp``, libllama 0.5.0) and of transformers'
configurations (5.23). Where a graph fixes what a config may choose, the row says so in ``fixed``,
and a checkpoint that chooses otherwise is refused instead of computing something else.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from gguf import MODEL_ARCH

# Tensors are written "ROLE.suffix": "extents", in the order of the GGUF. ROLE is a name of
# gguf.MODEL_TENSOR, extents are in numpy order; a "?" behind the suffix marks an optional one.
# vocab, embd: vocabulary, hidden size. q, kv: heads times head width. head: width of one head.
# ff, ffe, ffs: feed-forward width of the dense block, of an expert, of the shared expert.
_EMBED = {"TOKEN_EMBD.weight": "vocab embd"}
_TAIL = {"OUTPUT_NORM.weight": "embd", "OUTPUT.weight": "vocab embd"}
_QKV = {"ATTN_Q.weight": "q embd", "ATTN_K.weight": "kv embd", "ATTN_V.weight": "kv embd"}
_QKV_BIAS = {"ATTN_Q.bias": "q", "ATTN_K.bias": "kv", "ATTN_V.bias": "kv"}
_ANY_QKV_BIAS = {f"{name}?": extents for name, extents in _QKV_BIAS.items()}
_OUT = {"ATTN_OUT.weight": "embd q"}
_ATTN = _QKV | _OUT
_HEAD_NORMS = {"ATTN_Q_NORM.weight": "head", "ATTN_K_NORM.weight": "head"}  # one per head
_FULL_NORMS = {"ATTN_Q_NORM.weight": "q", "ATTN_K_NORM.weight": "kv"}  # over all heads
_PRE_NORMS = {"ATTN_NORM.weight": "embd", "FFN_NORM.weight": "embd"}
_POST_NORMS = {"ATTN_POST_NORM.weight": "embd", "FFN_POST_NORM.weight": "embd"}
_FOUR_NORMS = {"ATTN_NORM.weight": "embd", "FFN_PRE_NORM.weight": "embd"} | _POST_NORMS
_MLP = {"FFN_GATE.weight": "ff embd", "FFN_UP.weight": "ff embd", "FFN_DOWN.weight": "embd ff"}
_MLP_BIAS = {"FFN_GATE.bias?": "ff", "FFN_UP.bias?": "ff", "FFN_DOWN.bias?": "embd"}
_EXPERTS = {
    "FFN_GATE_INP.weight": "experts embd",
    "FFN_GATE_EXP.weight": "experts ffe embd",
    "FFN_UP_EXP.weight": "experts ffe embd",
    "FFN_DOWN_EXP.weight": "experts embd ffe",
}
_SHARED_EXPERT = {
    "FFN_GATE_INP_SHEXP.weight": "one embd",
    "FFN_GATE_SHEXP.weight": "ffs embd",
    "FFN_UP_SHEXP.weight": "ffs embd",
    "FFN_DOWN_SHEXP.weight": "embd ffs",
}


@dataclass(frozen=True)
class Arch:
    """One architecture.

    Attributes:
        gguf: llama.cpp's architecture.
        model_type: ``model_type`` of config.json.
        tensors: Role and suffix -> extents, in the order of the GGUF (see the head of this file).
        defaults: What transformers takes where config.json says nothing.
        activation: The only activation of llama.cpp's graph for this architecture.
        activation_key: Field of config.json that names it.
        rope_scaling: Kinds of RoPE scaling that graph and converter agree on, ``default`` aside.
        is_interleaved: The graph rotates neighbouring rows, Hugging Face two halves of a head: the
            rows of Q and K are reordered within every head.
        norm_shift: Added to every norm weight (Gemma multiplies by ``1 + weight``).
        is_head_derived: The graph takes ``hidden_size / num_attention_heads`` as head width.
        can_tie: The graph falls back to the embedding where there is no output tensor.
        window_every: Of this many layers all but the last attend in a window; 0: no windows.
        full_first: Of every ``window_every`` layers the first attends to all, not the last.
        window_key: Field of config.json with the window's tokens.
        expert_ff: Field of config.json with the width of an expert; None: no experts.
        expert_keys: Fields that may hold the number of experts.
        used_key: Field with the number that a token takes.
        softmax_key: Field that tells whether routers take a softmax, else a sigmoid; None: always.
        fixed: Field of config.json -> the only value the graph computes.
        scalar_layers: Number of layers for which the graph scales scores by ``hidden / heads``
            instead of the head width (Gemma's 27B models).
        unrotated_every: Of this many layers the last has no rotation; 0: all rotate.
        scales_embedding: The embedding is multiplied by the root of its width.
        has_window: transformers attends in ``sliding_window`` unless the config says otherwise;
            llama.cpp's graph attends to all.
        has_onnx: ONNX Runtime's operators compute its graph.
    """

    gguf: MODEL_ARCH
    model_type: str
    tensors: Mapping[str, str]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    activation: str = "silu"
    activation_key: str = "hidden_act"
    rope_scaling: frozenset[str] = frozenset({"linear", "yarn"})
    is_interleaved: bool = False
    norm_shift: float = 0.0
    is_head_derived: bool = False
    can_tie: bool = True
    window_every: int = 0
    full_first: bool = False
    window_key: str = "sliding_window"
    expert_ff: str | None = None
    expert_keys: tuple[str, ...] = ("num_experts", "num_local_experts")  # transformers takes either
    used_key: str = "num_experts_per_tok"
    softmax_key: str | None = None
    fixed: Mapping[str, Any] = field(default_factory=dict)
    scalar_layers: int | None = None
    unrotated_every: int = 0
    scales_embedding: bool = False
    has_window: bool = False
    has_onnx: bool = True

    def is_windowed(self, layer: int) -> bool:
        """Whether the graph's own pattern has ``layer`` attend in a window."""
        place = layer if self.full_first else layer + 1
        return place % self.window_every != 0 if self.window_every else False

    @property
    def class_name(self) -> str:
        """Name of the model's class in ``architectures`` of config.json."""
        return CLASS_NAMES[self.model_type]


CLASS_NAMES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "smallthinker": "SmallThinkerForCausalLM",
}

_LLAMA3 = frozenset({"linear", "llama3", "yarn"})
_LINEAR = frozenset({"linear"})
_ALL_SPARSE = {"decoder_sparse_step": 1, "mlp_only_layers": []}

_ROWS = (
    Arch(
        MODEL_ARCH.LLAMA,
        "llama",
        _EMBED
        | _PRE_NORMS
        | _ATTN
        | _ANY_QKV_BIAS
        | {"ATTN_OUT.bias?": "embd"}
        | _MLP
        | _MLP_BIAS
        | _TAIL,
        rope_scaling=_LLAMA3,
        is_interleaved=True,
    ),
    Arch(
        MODEL_ARCH.LLAMA,
        "mistral",
        _EMBED | _PRE_NORMS | _ATTN | _MLP | _TAIL,
        defaults={"num_key_value_heads": 8, "sliding_window": 4096},
        rope_scaling=_LLAMA3,
        is_interleaved=True,
        has_window=True,
    ),
    Arch(
        MODEL_ARCH.LLAMA,
        "mixtral",
        _EMBED | _PRE_NORMS | _ATTN | _EXPERTS | _TAIL,
        defaults={
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        rope_scaling=_LLAMA3,
        is_interleaved=True,
        expert_ff="intermediate_size",
        has_window=True,
    ),
    Arch(
        MODEL_ARCH.QWEN2,
        "qwen2",
        _EMBED | _PRE_NORMS | _ATTN | _QKV_BIAS | _MLP | _TAIL,
        defaults={"num_key_value_heads": 32},
        is_head_derived=True,
    ),
    Arch(
        MODEL_ARCH.QWEN2MOE,
        "qwen2_moe",
        _EMBED | _PRE_NORMS | _ATTN | _ANY_QKV_BIAS | _EXPERTS | _SHARED_EXPERT | _TAIL,
        defaults={"num_key_value_heads": 16, "norm_topk_prob": False} | _ALL_SPARSE,
        is_head_derived=True,
        can_tie=False,
        expert_ff="moe_intermediate_size",
        fixed={"norm_topk_prob": False} | _ALL_SPARSE,
    ),
    Arch(
        MODEL_ARCH.QWEN3,
        "qwen3",
        _EMBED | _PRE_NORMS | _ATTN | _ANY_QKV_BIAS | _HEAD_NORMS | _MLP | _TAIL,
        defaults={"num_key_value_heads": 32, "head_dim": 128},
    ),
    Arch(
        MODEL_ARCH.QWEN3MOE,
        "qwen3_moe",
        _EMBED | _PRE_NORMS | _ATTN | _ANY_QKV_BIAS | _HEAD_NORMS | _EXPERTS | _TAIL,
        defaults={"num_key_value_heads": 4, "norm_topk_prob": False} | _ALL_SPARSE,
        expert_ff="moe_intermediate_size",
        fixed={"norm_topk_prob": True} | _ALL_SPARSE,
    ),
    Arch(
        MODEL_ARCH.PHI3,
        "phi3",
        {
            "TOKEN_EMBD.weight": "vocab embd",
            "ATTN_NORM.weight": "embd",
            "ATTN_QKV.weight": "qkv embd",
            "ATTN_OUT.weight": "embd q",
            "FFN_NORM.weight": "embd",
            "FFN_UP.weight": "ff2 embd",  # gate above up, as on disk
            "FFN_DOWN.weight": "embd ff",
        }
        | _TAIL,
        defaults={"rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
        rope_scaling=frozenset({"longrope"}),
        is_head_derived=True,
        has_window=True,
    ),
    Arch(
        MODEL_ARCH.GEMMA2,
        "gemma2",
        _EMBED | _FOUR_NORMS | _ATTN | _MLP | {"OUTPUT_NORM.weight": "embd"},
        defaults={
            "num_key_value_heads": 4,
            "head_dim": 256,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        activation="gelu_pytorch_tanh",
        activation_key="hidden_activation",
        rope_scaling=_LINEAR,
        norm_shift=1.0,
        window_every=2,
        scalar_layers=46,
        scales_embedding=True,
    ),
    Arch(
        MODEL_ARCH.GEMMA3,
        "gemma3_text",
        _EMBED | _FOUR_NORMS | _ATTN | _HEAD_NORMS | _MLP | _TAIL,
        defaults={
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": True,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
        },
        activation="gelu_pytorch_tanh",
        activation_key="hidden_activation",
        rope_scaling=_LINEAR,
        norm_shift=1.0,
        window_every=6,
        fixed={"attn_logit_softcapping": None, "use_bidirectional_attention": False},
        scalar_layers=62,
        scales_embedding=True,
    ),
    Arch(
        MODEL_ARCH.SMOLLM3,
        "smollm3",
        _EMBED | _PRE_NORMS | _ATTN | _ANY_QKV_BIAS | _MLP | _TAIL,
        defaults={"num_key_value_heads": 4, "rope_theta": 2e6, "tie_word_embeddings": True},
        is_interleaved=True,
        unrotated_every=4,
    ),
    Arch(
        MODEL_ARCH.OLMO2,
        "olmo2",
        _EMBED | _ATTN | _FULL_NORMS | _POST_NORMS | _MLP | _TAIL,
        defaults={"rms_norm_eps": 1e-5},
        is_head_derived=True,
        can_tie=False,
    ),
    Arch(
        MODEL_ARCH.OLMOE,
        "olmoe",
        _EMBED | _PRE_NORMS | _ATTN | _FULL_NORMS | _EXPERTS | _TAIL,
        defaults={"rms_norm_eps": 1e-5, "norm_topk_prob": False},
        is_head_derived=True,
        can_tie=False,
        expert_ff="intermediate_size",
        fixed={"norm_topk_prob": False, "clip_qkv": None},
    ),
    Arch(  # routers read the layer's input, so experts are known before attention runs
        MODEL_ARCH.SMALLTHINKER,
        "smallthinker",
        _EMBED | _PRE_NORMS | _ATTN | _EXPERTS | _TAIL,
        defaults={"norm_topk_prob": True, "rope_theta": 1.5e6},
        activation="relu",
        rope_scaling=_LINEAR,
        window_every=4,
        full_first=True,
        window_key="sliding_window_size",
        expert_ff="moe_ffn_hidden_size",
        expert_keys=("moe_num_primary_experts",),
        used_key="moe_num_active_primary_experts",
        softmax_key="moe_primary_router_apply_softmax",
        has_onnx=False,  # its experts take ReLU gates, and a router before attention
        fixed={"norm_topk_prob": True, "moe_enable_secondary_experts": False},
    ),
)

ARCHS: Mapping[str, Arch] = MappingProxyType({row.model_type: row for row in _ROWS})
