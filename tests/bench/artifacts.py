"""Artifacts for benchmarks that were given none, made once; `make clean` removes them."""

import shutil
import subprocess
import sys
from pathlib import Path

from checkpoints import SHAPES, make_checkpoint
from expert_models import Shape, make_artifact

from edgekit.artifact import Artifact, open_artifact

ROOT = Path(__file__).resolve().parents[2]
BUILT = ROOT / "build" / "bench"
SAMPLES = ("tiny-llama", "tiny-moe")
TINY_MOE = ROOT / "samples" / "tiny-moe"


def sample_artifact(name: str) -> str:
    """Folder of ``samples/NAME``, converted with the default tiers for both runtimes."""
    folder = BUILT / name
    if not folder.exists():
        _convert(ROOT / "samples" / name, folder, "--format", "gguf,onnx")
    return str(folder)


def opened(given: Path | None) -> Artifact:
    """Open ``given``, or tiny-moe's artifact."""
    return open_artifact(given or Path(sample_artifact(TINY_MOE.name)), remember=True)


def shape_artifact(shape: str = "llama-3.2-1b-2-layers") -> str:
    """Folder of random weights of a shape of `checkpoints`, converted with the default tiers."""
    folder = BUILT / shape
    if not folder.exists():
        checkpoint = make_checkpoint(BUILT / "checkpoint", SHAPES[shape])
        _convert(checkpoint, folder, "--no-calibration", "--no-measure")
        shutil.rmtree(checkpoint)
    return str(folder)


def expert_artifact() -> str:
    """Folder of a mixture of experts of 4.3 GiB with random weights."""
    folder = BUILT / "experts"
    return str(folder if folder.exists() else make_artifact(folder, Shape()))


def _convert(checkpoint: Path, folder: Path, *words: str) -> None:
    command = [sys.executable, "-m", "edgekit", "convert", str(checkpoint), "-o", str(folder)]
    subprocess.run([*command, *words], check=True, stdout=subprocess.DEVNULL)
