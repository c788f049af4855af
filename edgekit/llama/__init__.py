"""llama.cpp as edgekit uses it: its low-level C API, typed, checked before calls that may abort.

The high-level class of llama-cpp-python is not used: it hides weight repacking, ``no_alloc`` and
the callbacks, and allocates scores of context x vocabulary.
"""

from edgekit.llama.binding import capture_log, system_info
from edgekit.llama.chat import Message, apply_chat_template, chat_prompt
from edgekit.llama.context import KV_TYPES, Context, State
from edgekit.llama.generation import Generation, Sampling, Timings, generate
from edgekit.llama.listener import Listener
from edgekit.llama.model import Model
from edgekit.llama.opening import Residency, open_model
from edgekit.llama.stream import MemoryFile, VirtualFile, has_fopencookie
from edgekit.llama.weight_memory import WeightMemory, can_page

__all__ = [
    "KV_TYPES",
    "Context",
    "Generation",
    "Listener",
    "MemoryFile",
    "Message",
    "Model",
    "Residency",
    "Sampling",
    "State",
    "Timings",
    "VirtualFile",
    "WeightMemory",
    "apply_chat_template",
    "can_page",
    "capture_log",
    "chat_prompt",
    "generate",
    "has_fopencookie",
    "open_model",
    "system_info",
]
