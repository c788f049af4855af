"""AutoRound's command line for a tokenizer its GGUF export does not know, named by hand.

    python autoround_named.py PRE_TOKENIZER [arguments of auto-round quantize]

The export imports llama.cpp's converter anew under the name ``conversion``.
"""

import sys
from typing import Any

import auto_round.export.export_to_gguf.llama_cpp_conversion as found
from auto_round.__main__ import run

pre, *words = sys.argv[1:]
import_conversion = found._import_conversion_from


def named(*args: Any) -> Any:
    """Import it, and tell it the name."""
    context = import_conversion(*args)
    sys.modules["conversion.base"].TextModel.get_vocab_base_pre = lambda self, tokenizer: pre
    return context


found._import_conversion_from = named
sys.argv = ["auto-round", "quantize", *words]
run()
