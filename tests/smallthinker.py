"""SmallThinker in plain torch: the reference that logits are held to; transformers has none.

Written from the description of the model (arXiv 2507.20984) and its published configuration: the
router reads the layer's input before attention; experts are ReLU-gated; the weights of the chosen
experts are a sigmoid or a softmax of their logits, normalized; every fourth layer attends to all
without rotation, the others in a window with it, or there are no windows and rotations everywhere.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

CONFIG: dict[str, Any] = {
    "architectures": ["SmallThinkerForCausalLM"],
    "model_type": "smallthinker",
    "moe_primary_router_apply_softmax": False,
    "moe_enable_secondary_experts": False,
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}


def write_smallthinker(
    folder: Path, fields: dict[str, Any], dtype: torch.dtype, seed: int = 0
) -> Path:
    """Write config.json and random weights, named as published checkpoints name them."""
    folder.mkdir(parents=True, exist_ok=True)
    config = CONFIG | fields
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(seed)
    embd, heads, kv = (
        config[k] for k in ("hidden_size", "num_attention_heads", "num_key_value_heads")
    )
    head, ffn = config["head_dim"], config["moe_ffn_hidden_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], embd),
        "model.norm.weight": (embd,),
        "lm_head.weight": (config["vocab_size"], embd),
    }
    for layer in range(config["num_hidden_layers"]):
        at, moe = f"model.layers.{layer}", f"model.layers.{layer}.block_sparse_moe"
        shapes |= {
            f"{at}.input_layernorm.weight": (embd,),
            f"{at}.post_attention_layernorm.weight": (embd,),
            f"{at}.self_attn.q_proj.weight": (heads * head, embd),
            f"{at}.self_attn.k_proj.weight": (kv * head, embd),
            f"{at}.self_attn.v_proj.weight": (kv * head, embd),
            f"{at}.self_attn.o_proj.weight": (embd, heads * head),
            f"{moe}.primary_router.weight": (config["moe_num_primary_experts"], embd),
        }
        for expert in range(config["moe_num_primary_experts"]):
            shapes |= {
                f"{moe}.experts.{expert}.gate.weight": (ffn, embd),
                f"{moe}.experts.{expert}.up.weight": (ffn, embd),
                f"{moe}.experts.{expert}.down.weight": (embd, ffn),
            }
    weights = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape)
        scale = 1.0 if "embed" in name else shape[-1] ** -0.5
        weights[name] = (1 + 0.2 * noise if "norm" in name else noise * scale).to(dtype)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


class SmallThinker:
    """The model in ``folder``, float32; call it with ids ``[1, T]``."""

    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        self.w = {k: v.float() for k, v in load_file(folder / "model.safetensors").items()}

    def __call__(self, ids: Tensor, **_: object) -> SimpleNamespace:
        c, x = self.config, self.w["model.embed_tokens.weight"][ids[0]]  # [T, C]
        for layer in range(c["num_hidden_layers"]):
            at = f"model.layers.{layer}"
            routed = x @ self.w[f"{at}.block_sparse_moe.primary_router.weight"].T
            x = x + self._attention(layer, self._norm(x, f"{at}.input_layernorm.weight"))
            h = self._norm(x, f"{at}.post_attention_layernorm.weight")
            x = x + self._experts(f"{at}.block_sparse_moe", h, routed)
        head = self.w["lm_head.weight"]
        return SimpleNamespace(logits=(self._norm(x, "model.norm.weight") @ head.T)[None])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        scale = (x.pow(2).mean(-1, keepdim=True) + self.config["rms_norm_eps"]).rsqrt()
        return x * scale * self.w[name]

    def _attention(self, layer: int, x: Tensor) -> Tensor:
        c, n = self.config, len(x)
        heads, kv, size = (c[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim"))
        at = f"model.layers.{layer}.self_attn"
        q, k, v = (
            (x @ self.w[f"{at}.{name}_proj.weight"].T).view(n, -1, size).transpose(0, 1)
            for name in "qkv"
        )  # [heads, T, D]
        if c.get("rope_layout", [1] * 99)[layer]:
            q, k = self._rotated(q), self._rotated(k)
        k, v = (t.repeat_interleave(heads // kv, dim=0) for t in (k, v))
        distance = torch.arange(n)[:, None] - torch.arange(n)[None]
        hidden = distance < 0
        if c.get("sliding_window_layout", [0] * 99)[layer]:
            hidden |= distance >= c["sliding_window_size"]
        scores = (q @ k.transpose(1, 2) / size**0.5).masked_fill(hidden, -torch.inf)
        mixed = (scores.softmax(-1) @ v).transpose(0, 1).reshape(n, -1)
        return mixed @ self.w[f"{at}.o_proj.weight"].T

    def _rotated(self, x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        frequency = self.config["rope_theta"] ** (-torch.arange(half) / half)
        angle = torch.arange(x.shape[1])[:, None] * frequency
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    def _experts(self, at: str, h: Tensor, routed: Tensor) -> Tensor:
        c = self.config
        top, ids = routed.topk(c["moe_num_active_primary_experts"], dim=-1)
        share = top.softmax(-1) if c["moe_primary_router_apply_softmax"] else top.sigmoid()
        share = share / share.sum(-1, keepdim=True)
        out = torch.zeros_like(h)
        for t in range(len(h)):
            for weight, expert in zip(share[t], ids[t].tolist(), strict=True):
                gate, up, down = (
                    self.w[f"{at}.experts.{expert}.{name}.weight"]
                    for name in ("gate", "up", "down")
                )
                out[t] += weight * (((h[t] @ gate.T).relu() * (h[t] @ up.T)) @ down.T)
        return out
