"""Hugging Face checkpoints under llama.cpp's names: architectures as rows of data."""

from edgekit.arch.mapping import Mapping, allows_quantization, map_checkpoint
from edgekit.arch.source import SourceTensor
from edgekit.arch.table import ARCHS, Arch

__all__ = ["ARCHS", "Arch", "Mapping", "SourceTensor", "allows_quantization", "map_checkpoint"]
