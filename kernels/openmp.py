"""How long llama.cpp's threads wait awake for each other, set before its library is loaded.

They meet at a barrier after every operation. On a machine with other work, a thread that waits
awake keeps the one it waits for from running: see docs/lab-notes.md.
"""

import os

# Rounds of some 50 ns awake before a thread sleeps; OpenMP's own default is 300,000.
SPIN_COUNT = "1000"


def limit_spinning() -> None:
    """Set OpenMP's patience, unless the environment does; call it before importing llama_cpp."""
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
