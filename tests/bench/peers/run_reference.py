"""Run the checkpoint itself in float32 by transformers: what all others are compared with."""

from typing import Any

from measuring import run


def load(path: str) -> tuple[Any, Any]:
    """As `measuring.run` wants it."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_grad_enabled(False)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

    def forward(ids: Any) -> Any:
        return model(torch.tensor(ids)[None]).logits[0].numpy()

    return forward, lambda token: model(torch.tensor([[token]])).logits


run(load)
