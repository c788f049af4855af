"""Run a folder of onnxruntime-genai's."""

from typing import Any

from measuring import run


def load(path: str) -> tuple[Any, Any]:
    """As `measuring.run` wants it."""
    import numpy as np
    import onnxruntime_genai as genai

    model = genai.Model(path)
    held = {}

    def forward(ids: Any) -> Any:
        params = genai.GeneratorParams(model)
        params.set_search_options(max_length=1024)
        held["generator"] = genai.Generator(model, params)
        held["generator"].append_tokens(ids.astype(np.int32))
        return held["generator"].get_output("logits")[0]

    def step(token: int) -> Any:
        held["generator"].append_tokens(np.array([token], np.int32))
        return held["generator"].get_output("logits")

    return forward, step


run(load)
