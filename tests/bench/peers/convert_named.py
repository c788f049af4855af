"""llama.cpp's convert_hf_to_gguf for a tokenizer it does not know: its pre-tokenizer named by hand.

python convert_named.py PRE_TOKENIZER LLAMA_CPP_FOLDER [arguments of convert_hf_to_gguf.py]
"""

import runpy
import sys

pre, folder, *words = sys.argv[1:]
sys.path[:0] = [folder, f"{folder}/gguf-py"]
from conversion.base import TextModel  # noqa: E402

TextModel.get_vocab_base_pre = lambda self, tokenizer: pre
sys.argv = ["convert_hf_to_gguf.py", *words]
runpy.run_path(f"{folder}/convert_hf_to_gguf.py", run_name="__main__")
