"""Muon for weight matrices, AdamW for the rest, as one optimizer.

Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024): the
momentum of a matrix is replaced by the nearest orthogonal matrix, found by five Newton-Schulz
steps. The factor ``0.2 * sqrt(max(rows, cols))`` gives the step the size of an AdamW step, so both
share a learning rate and weight decay: Liu et al., "Muon is Scalable for LLM Training",
arXiv:2502.16982, section 2.2.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

# Coefficients of the quintic iteration in Jordan's reference code.
A, B, C = 3.4445, -4.7750, 2.0315


def orthogonalize(matrix: Tensor, steps: int = 5) -> Tensor:
    """Push the singular values of ``[..., rows, cols]`` towards 1, to within about 0.3."""
    is_tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if is_tall else matrix
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # 1e-7: a zero gradient stays zero
    for _ in range(steps):
        gram = x @ x.mT
        x = A * x + (B * gram + C * gram @ gram) @ x
    return x.mT if is_tall else x


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum over stacks of matrices ``[..., rows, cols]``."""

    def __init__(self, params: list[nn.Parameter], lr: float, weight_decay: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": 0.95})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # takes no closure
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for param in group["params"]:
                self._update(param, group)

    def _update(self, param: Tensor, group: dict[str, Any]) -> None:
        assert param.grad is not None
        state = self.state[param]
        momentum = state.setdefault("momentum", torch.zeros_like(param))
        momentum.lerp_(param.grad, 1 - group["momentum"])
        update = orthogonalize(param.grad.lerp(momentum, group["momentum"]))
        scale = 0.2 * math.sqrt(max(param.shape[-2:]))
        param.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)


def optimizers(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers; AdamW for embedding, head, routers and norms."""
    named = list(model.named_parameters())
    inner = [
        p for n, p in named if p.ndim > 1 and ".layers." in n and not n.endswith("gate.weight")
    ]
    rest = [p for _, p in named if all(p is not q for q in inner)]
    adam = torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    return [Muon(inner, lr), adam]
