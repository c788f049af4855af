"""Converting holds a few chunks, whatever the number of layers and the size of a tensor."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from bench.checkpoints import Shape, make_checkpoint

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
SHAPE = Shape(
    num_hidden_layers=2,
    hidden_size=512,
    intermediate_size=2048,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
    vocab_size=512,
)
MEASURED = """
import sys
from pathlib import Path
from edgekit.cli import main
try:
    main()
finally:
    # not ru_maxrss, which begins with what the parent held when it forked
    sys.stderr.write(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""
ALLOWANCE = 8 << 20  # bytes; two runs of the same conversion differ by up to 2 MiB


def peak_bytes(folder: Path, shape: Shape) -> tuple[int, int]:
    """Bytes of a checkpoint, and the most that the process which converts it held resident."""
    checkpoint = make_checkpoint(folder / "checkpoint", shape)
    command = ["convert", checkpoint, "-o", folder / "edge", "--tiers", "Q2_K,Q4_K,source"]
    command += ["--no-calibration", "--no-measure", "--jobs", "2", "--json"]
    result = subprocess.run(
        [sys.executable, "-c", MEASURED, *map(str, command)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)["source_bytes"], 1024 * int(result.stderr.split()[-1])


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[int, int]:
    return peak_bytes(tmp_path_factory.mktemp("small"), SHAPE)


def test_memory_does_not_grow_with_the_number_of_layers(small, tmp_path):
    n_bytes, peak = peak_bytes(tmp_path, replace(SHAPE, num_hidden_layers=6))
    assert n_bytes - small[0] > 3 * ALLOWANCE  # else this test could not fail
    assert peak - small[1] < ALLOWANCE


def test_memory_does_not_grow_with_the_largest_tensor(tmp_path):
    narrow = replace(
        SHAPE, num_hidden_layers=1, hidden_size=256, intermediate_size=256, vocab_size=20_000
    )
    small = peak_bytes(tmp_path / "narrow", narrow)  # of the same vocabulary, which takes memory
    n_bytes, peak = peak_bytes(tmp_path / "wide", replace(narrow, hidden_size=1024))
    assert n_bytes - small[0] > 3 * ALLOWANCE
    assert peak - small[1] < ALLOWANCE
