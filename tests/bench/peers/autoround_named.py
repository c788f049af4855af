"""AutoRound's command line for a tokenizer its GGUF export does not know, named by hand.

python autoround_named.py PRE_TOKENIZER [arguments of auto-round quantize]
"""

import sys

from auto_round.export.export_to_gguf.conversion.base import TextModel

pre, *words = sys.argv[1:]
TextModel.get_vocab_base_pre = lambda self, tokenizer: pre
sys.argv = ["auto-round", "quantize", *words]
from auto_round.__main__ import run  # noqa: E402

run()
