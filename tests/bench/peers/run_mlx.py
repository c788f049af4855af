"""Run a folder of mlx-lm's, on the processor."""

from typing import Any

from measuring import run


def load(path: str) -> tuple[Any, Any]:
    """As `measuring.run` wants it."""
    import mlx.core as mx
    import numpy as np
    from mlx_lm import load as load_model
    from mlx_lm.models.cache import make_prompt_cache

    model, _ = load_model(path)
    held = {}

    def step_ids(ids: list[int]) -> Any:
        logits = model(mx.array([ids]), cache=held["cache"]).astype(mx.float32)
        mx.eval(logits)
        return np.array(logits)[0]

    def forward(ids: Any) -> Any:
        held["cache"] = make_prompt_cache(model)
        return step_ids([int(i) for i in ids])

    return forward, lambda token: step_ids([token])


run(load)
