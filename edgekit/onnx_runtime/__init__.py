"""ONNX Runtime as edgekit uses it: what `edgekit.llama` is for llama.cpp.

A *runner* has one conversation in memory and gives logits: our own loop over onnxruntime with the
cache bound in place, or onnxruntime-genai. Text, sampling and depth are the same over both.
"""

from edgekit.onnx_runtime.runner import Runner, has_genai, open_runner
from edgekit.onnx_runtime.sampler import Sampler
from edgekit.onnx_runtime.tokenizer import Tokenizer

__all__ = ["Runner", "Sampler", "Tokenizer", "has_genai", "open_runner"]
