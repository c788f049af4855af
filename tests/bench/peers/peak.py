"""Run a command and write the most that it, or a process it waited for, held resident.

    python peak.py FILE SECONDS COMMAND...

The kernel counts for a new process what the one that started it held: a small one stands between.
"""

import resource
import subprocess
import sys
from pathlib import Path

file, seconds, *words = sys.argv[1:]
try:
    code = subprocess.run(words, timeout=float(seconds)).returncode
except subprocess.TimeoutExpired:
    sys.exit(f"did not end in {seconds} seconds")
Path(file).write_text(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024))
sys.exit(code if code >= 0 else 128 - code)
