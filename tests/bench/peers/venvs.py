"""Virtual environments of the peers, outside the repository, every package that matters pinned."""

import json
import subprocess
import sys
import tarfile
from pathlib import Path

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
        CalledProcessError: pip failed; its output is on stderr.
    """
    folder = work / peer
    python, stamp = folder / "bin" / "python", folder / "peers.json"
    wanted = json.dumps(VENVS[peer])
    if stamp.is_file() and stamp.read_text() == wanted:
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    others = [name for name in VENVS[peer] if name != TORCH]
    if TORCH in VENVS[peer]:
        exact = subprocess.run([*pip, f"{TORCH}+cpu"], capture_output=True)
        if exact.returncode != 0:
            index = "https://download.pytorch.org/whl/cpu"
            subprocess.run([*pip, TORCH, "--index-url", index], check=True)
        others.append(TORCH)
    subprocess.run([*pip, *others], check=True)
    stamp.write_text(wanted)
    return python


def llama_cpp(work: Path) -> Path:
    """The folder of llama.cpp's source, with convert_hf_to_gguf.py in it."""
    name = LLAMA_CPP.replace("-", "_").replace("==", "-")
    folder = work / name / "vendor" / "llama.cpp"
    if not (folder / "convert_hf_to_gguf.py").is_file():
        pip = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
        ]
        subprocess.run([*pip, "--no-binary", ":all:", LLAMA_CPP, "-d", work], check=True)
        with tarfile.open(work / f"{name}.tar.gz") as archive:
            archive.extractall(work, filter="data")
    return folder
