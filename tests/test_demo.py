"""`make demo`, as a newcomer sees it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_the_demo_converts_shows_what_budgets_buy_and_runs_at_two(tmp_path):
    artifact = tmp_path / "tiny-llama"
    demo = [sys.executable, ROOT / "samples/demo.py", artifact]
    done = subprocess.run(demo, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^ *(\d+) MiB +([\d.]+) MiB +([\d.]+) +(\S+)$", done.stdout, re.M)
    divergence = [float(row[3]) for row in rows]
    assert len(rows) == 6
    assert divergence == sorted(divergence, reverse=True)
    assert divergence[0] > 1e-3 > 1e-6 > divergence[-1]
    texts = re.findall(r"^\$ edgekit run .*\n\n(.*)", done.stdout, re.M)
    assert len(texts) == 2
    assert all(texts)
