"""How each peer makes its files of a checkpoint by its own tools: commands and their results."""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from commands import HERE, Failed, timed
from venvs import llama_cpp, python_of

ROOT = HERE.parents[2]
MIXES = ("Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K")
PRE_TOKENIZER = "gpt-2"  # of the samples' tokenizers, which llama.cpp's converter does not know
AUTOROUND = {"GGUF:Q2_K_S": "gguf:q2_k_s", "GGUF:Q4_K_M": "gguf:q4_k_m"}


@dataclass(frozen=True)
class Built:
    """A model that a peer made.

    Attributes:
        tool: Of the peer.
        name: Of the file, as its users know it.
        path: What its runner takes.
        runner: File beside this one; ``python`` runs it.
        files: Of the weights.
        seconds: Of making it, loading the checkpoint included.
        peak_bytes: Of the process that made it.
    """

    tool: str
    name: str
    path: Path
    runner: str
    python: Path
    files: tuple[Path, ...]
    seconds: float
    peak_bytes: int


def edgekit(checkpoint: Path, out: Path) -> tuple[Path, float, int]:
    """Convert; the artifact, seconds and peak. The importance matrix is saved for llama.cpp."""
    words = [sys.executable, "-m", "edgekit", "convert", checkpoint, "-o", out / "edge", "--force"]
    words += ["--save-imatrix", out / "imatrix.gguf"]
    seconds, peak = timed(words, out / "edgekit.log")
    return out / "edge", seconds, peak


def by_llama_cpp(checkpoint: Path, out: Path, work: Path) -> Iterator[Built]:
    """convert_hf_to_gguf to BF16, then llama_model_quantize with the same importance matrix."""
    python, folder, source = python_of(work, "llama.cpp"), llama_cpp(work), out / "bf16.gguf"
    words = [python, HERE / "convert_named.py", PRE_TOKENIZER, folder, checkpoint]
    converted, peak = timed([*words, "--outtype", "bf16", "--outfile", source], out / "gguf.log")
    for mix in MIXES:
        path = out / f"{mix}.gguf"
        words = [sys.executable, HERE / "quantize.py", source, path, mix, out / "imatrix.gguf"]
        seconds, most = timed(words, out / f"{mix}.log")
        yield Built(
            "llama.cpp", mix, path, "run_gguf.py", Path(sys.executable), (path,),
            converted + seconds, max(peak, most),
        )  # fmt: skip


def by_onnxruntime_genai(checkpoint: Path, out: Path, work: Path) -> Iterator[Built]:
    """The model builder, 4 bits in blocks of 32 for the processor, as it comes."""
    python, path = python_of(work, "onnxruntime-genai"), out / "onnx-int4"
    words = [python, "-m", "onnxruntime_genai.models.builder", "-m", "sample", "-i", checkpoint]
    words += ["-o", path, "-p", "int4", "-e", "cpu", "-c", out / "onnx-cache"]
    seconds, peak = timed(words, out / "onnx-int4.log")
    files = (path / "model.onnx", path / "model.onnx.data")
    yield Built("onnxruntime-genai", "int4", path, "run_onnx.py", python, files, seconds, peak)


def by_mlx(checkpoint: Path, out: Path, work: Path) -> Iterator[Built]:
    """mlx_lm convert, groups of 64."""
    python = python_of(work, "mlx-lm")
    for bits in (4, 6):
        path = out / f"mlx-{bits}"
        words = [python, "-m", "mlx_lm", "convert", "--hf-path", checkpoint, "--mlx-path", path]
        seconds, peak = timed([*words, "-q", "--q-bits", bits], out / f"mlx-{bits}.log")
        files = (path / "model.safetensors",)
        yield Built("mlx-lm", f"{bits} bits", path, "run_mlx.py", python, files, seconds, peak)


def by_autoround(checkpoint: Path, out: Path, work: Path) -> Iterator[Built]:
    """auto-round to GGUF: rounding tuned by gradients, on the calibration text that ships here."""
    python, data = python_of(work, "AutoRound"), out / "calibration.jsonl"
    text = (ROOT / "samples" / "text" / "calibration.txt").read_text("utf-8")
    pieces = (text[i : i + 2400] for i in range(0, len(text) - 2400, 2400))
    data.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces))
    for scheme, kind in AUTOROUND.items():
        path = out / f"autoround-{kind.partition(':')[2]}"
        words = [python, HERE / "autoround_named.py", PRE_TOKENIZER, "--model_name", checkpoint]
        words += ["--format", kind, "--scheme", scheme, "--dataset", data, "--iters", 50]
        words += ["--nsamples", 32, "--seqlen", 512, "--device_map", "cpu", "--output_dir", path]
        seconds, peak = timed(words, out / f"{path.name}.log")
        file = next(iter(sorted(path.rglob("*.gguf"))), None)
        if file is None:
            raise Failed(f"auto-round left no GGUF in {path}")
        name = scheme.partition(":")[2]
        yield Built(
            "AutoRound", name, file, "run_gguf.py", Path(sys.executable), (file,), seconds, peak
        )


PEERS = {
    "llama.cpp": by_llama_cpp,
    "onnxruntime-genai": by_onnxruntime_genai,
    "mlx-lm": by_mlx,
    "AutoRound": by_autoround,
}
