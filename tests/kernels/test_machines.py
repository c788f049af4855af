"""Levels are the same bytes on every machine: the kernels compiled for ARM, and with Clang.

Where another machine's compiler and an emulator of it are installed (Debian: gcc-aarch64-linux-gnu,
libc6-dev-arm64-cross, qemu-user), or Clang, its levels are compared with this machine's.
"""

import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from edgekit.kernels import ggml, nested

KERNELS = Path(__file__).parents[2] / "kernels"
SOURCES = (
    "blocks",
    "level",
    "nested",
    "nested_float",
    "packing",
    "wide",
    "wide_codes",
    "wide_float",
)
FLAGS = ["-std=gnu11", "-O2", "-ffp-contract=off", "-fno-wrapv", "-static"]
# compiler, and what runs its programs here
MACHINES = {
    "aarch64": ("aarch64-linux-gnu-gcc", "qemu-aarch64"),
    "clang": ("clang", "env"),
}
CHAIN = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "BF16")
PAIRS = (*pairwise(CHAIN), ("Q4_0", "Q5_0"), ("Q5_0", "Q8_0"))


def blocks(kind: str, seed: int) -> np.ndarray:
    """Usual weights, and blocks of random bytes: scales that are infinite or no numbers."""
    rng = np.random.default_rng(seed)
    usual = ggml.quantize(kind, (rng.standard_normal((4, 512)) * 0.02).astype(np.float32))
    wild = rng.integers(0, 256, usual.nbytes, np.uint8)
    return np.concatenate([usual.reshape(-1).view(np.uint8), wild])


def case(parent: str, child: str) -> tuple[bytes, bytes]:
    """What the program reads for a pair of types, and what it is to answer."""
    low, high = blocks(parent, 1), blocks(child, 1)
    n = high.nbytes // ggml.TYPES[child].block_bytes * ggml.TYPES[child].block
    level = nested.encode(parent, child, low, high)
    kinds = ggml.TYPES[parent].id, ggml.TYPES[child].id
    head = np.array([*kinds, n, low.nbytes, high.nbytes, len(level.rest)], np.uint32)
    streams = level.streams
    answer = [level.limits, np.array([s.width for s in streams], np.uint8)]
    answer += [s.digits for s in streams] + [s.gaps for s in streams] + [s.values for s in streams]
    told = b"".join(part.tobytes() for part in (*answer, level.rest, high))
    return head.tobytes() + low.tobytes() + high.tobytes(), told


@pytest.mark.parametrize("machine", MACHINES)
def test_levels_are_the_same_bytes(machine: str, tmp_path: Path) -> None:
    compiler, runner = MACHINES[machine]
    if not (shutil.which(compiler) and shutil.which(runner)):
        pytest.skip(f"{compiler} and {runner} are not installed")
    program = tmp_path / "level"
    sources = [KERNELS / f"{name}.c" for name in SOURCES]
    main = Path(__file__).with_name("level_main.c")
    command = [compiler, *FLAGS, f"-I{KERNELS}", str(main), *map(str, sources), "-o", str(program)]
    subprocess.run(command, check=True)
    cases = [case(parent, child) for parent, child in PAIRS]
    done = subprocess.run(
        [runner, program], input=b"".join(asked for asked, _ in cases), capture_output=True
    )
    assert done.returncode == 0
    at = 0
    for (parent, child), (_, told) in zip(PAIRS, cases, strict=True):
        assert done.stdout[at : at + len(told)] == told, f"{parent} to {child}"
        at += len(told)
    assert at == len(done.stdout)
