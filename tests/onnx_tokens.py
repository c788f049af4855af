"""Greedy tokens of a model folder in a runtime's own words, one JSON line; edgekit takes no part.

python onnx_tokens.py onnxruntime|onnxruntime-genai MODEL_FOLDER N TOKEN [TOKEN ...]
"""

import json
import sys

import numpy as np


def by_onnxruntime(folder: str, ids: list[int], n: int) -> list[int]:
    """Token by token, with the cache given back."""
    import onnxruntime

    session = onnxruntime.InferenceSession(f"{folder}/onnx/model.onnx")
    past = [i for i in session.get_inputs() if i.name.startswith("past_key_values")]
    cache = [np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32) for i in past]
    found, new, n_seen = list[int](), ids, 0
    for _ in range(n):
        n_seen += len(new)
        feeds = {"input_ids": np.array([new]), "attention_mask": np.ones((1, n_seen), np.int64)}
        named = {i.name: c for i, c in zip(past, cache, strict=True)}
        logits, *cache = session.run(None, feeds | named)
        found.append(int(logits[0, -1].argmax()))
        new = found[-1:]
    return found


def by_genai(folder: str, ids: list[int], n: int) -> list[int]:
    """By its own greedy search."""
    import onnxruntime_genai as genai

    model = genai.Model(folder)
    params = genai.GeneratorParams(model)
    length = len(ids) + n
    params.set_search_options(do_sample=False, min_length=length, max_length=length)
    generator = genai.Generator(model, params)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)[len(ids) :]]


def main(runtime: str, folder: str, n: str, *ids: str) -> None:
    """Write the tokens, and the library that computed them."""
    import onnxruntime

    draw = {"onnxruntime": by_onnxruntime, "onnxruntime-genai": by_genai}[runtime]
    tokens = draw(folder, [int(i) for i in ids], int(n))
    sys.stdout.write(json.dumps({"tokens": tokens, "library": onnxruntime.__file__}))


if __name__ == "__main__":
    main(*sys.argv[1:])
