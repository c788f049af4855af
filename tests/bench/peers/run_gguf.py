"""Run a GGUF by llama.cpp: no repacking, float32 cache, as all our comparisons."""

from typing import Any

from measuring import run


def load(path: str) -> tuple[Any, Any]:
    """As `measuring.run` wants it."""
    from edgekit.llama import Context, open_model

    model = open_model(path, residency="anon")
    context = Context(model, 1024, n_batch=512, kv_type="f32", n_outputs=512, flash_attention=False)

    def forward(ids: Any) -> Any:
        context.clear()
        return context.decode([int(i) for i in ids], "all")

    return forward, lambda token: context.decode([token])


run(load)
