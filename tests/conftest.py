"""Settings for the whole suite: no network, few threads, the same examples on every run."""

import os

# Before anything imports torch or tokenizers; the suite runs on small machines.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"

from hypothesis import settings

settings.register_profile("edgekit", deadline=None, derandomize=True, database=None)
settings.load_profile("edgekit")
