"""Virtual environments of the peers, outside the repository, every package that matters pinned."""

import json
import sys
import tarfile
from pathlib import Path

from commands import Failed, timed

TORCH = "torch==2.13.0"
VENVS = {
    "llama.cpp": (TORCH, "transformers==5.24.0", "numpy==2.4.6", "sentencepiece==0.2.3", "pyyaml"),
    "onnxruntime-genai": (
        TORCH,
        "onnxruntime-genai==0.18.0",
        "onnxruntime==1.32.0",
        "onnx==1.23.2",
        "onnx-ir==1.1.0",
        "transformers==5.24.0",
    ),
    "mlx-lm": ("mlx[cpu]==0.32.4", "mlx-lm==0.32.2"),
    "AutoRound": (TORCH, "auto-round==0.16.1", "gguf==0.19.0", "sentencepiece==0.2.3"),
}
LLAMA_CPP = "llama-cpp-python==0.3.36"  # its source distribution holds llama.cpp's


def python_of(work: Path, peer: str) -> Path:
    """The interpreter of a peer's environment, made where it is not there as it should be.

    torch comes from its CPU index or from what pip is configured to; never a CUDA build.

    Raises:
        Failed: pip could not install it.
    """
    folder, log = work / peer, work / f"{peer}.install.log"
    python, stamp = folder / "bin" / "python", folder / "peers.json"
    wanted = json.dumps(VENVS[peer])
    if stamp.is_file() and stamp.read_text() == wanted:
        return python
    timed([sys.executable, "-m", "venv", "--clear", folder], log)
    # -I: a file of the folder that one stands in must not pass for a module of pip's
    pip = [python, "-I", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if TORCH in VENVS[peer]:
        try:
            timed([*pip, f"{TORCH}+cpu"], log)
        except Failed:
            timed([*pip, TORCH, "--index-url", "https://download.pytorch.org/whl/cpu"], log)
    timed([*pip, *VENVS[peer]], log)
    stamp.write_text(wanted)
    return python


def llama_cpp(work: Path) -> Path:
    """The folder of llama.cpp's source, with convert_hf_to_gguf.py in it."""
    name = LLAMA_CPP.replace("-", "_").replace("==", "-")
    folder = work / name / "vendor" / "llama.cpp"
    if not (folder / "convert_hf_to_gguf.py").is_file():
        pip = [python_of(work, "llama.cpp"), "-I", "-m", "pip", "download", "--quiet", "--no-deps"]
        pip += ["--no-binary", LLAMA_CPP.partition("==")[0], "-d", work, LLAMA_CPP]
        timed(pip, work / "llama.cpp.download.log")
        with tarfile.open(work / f"{name}.tar.gz") as archive:
            archive.extractall(work, filter="data")
    return folder
