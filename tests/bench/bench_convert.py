"""Convert to all default tiers against llama.cpp's quantizer run once per tier, in turns.

Ours is `edgekit convert --no-calibration --no-measure`: it writes the base, every level up to the
lossless source, and syncs them. Theirs is `llama_model_quantize` (pure) from an F16 GGUF of the
same model to Q2_K, Q3_K, Q4_K, Q5_K, Q6_K and Q8_0, one file after the other. Both run as processes
of their own with as many threads; times are of the whole process. Peaks: VmHWM, and the most
anonymous memory seen ten times a second. Prints one JSON line last.

    python tests/bench/bench_convert.py --shape llama-3.2-1b --pairs 3
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoints import SHAPES, make_checkpoint

FTYPES = {
    "Q2_K": "Q2_K",
    "Q3_K": "Q3_K_M",
    "Q4_K": "Q4_K_M",
    "Q5_K": "Q5_K_M",
    "Q6_K": "Q6_K",
    "Q8_0": "Q8_0",
}
QUANTIZE = """
import ctypes, os, sys
import llama_cpp
log = llama_cpp.llama_log_callback(lambda level, text, data: None)
llama_cpp.llama_log_set(log, ctypes.c_void_p(0))
source, folder, threads, *names = sys.argv[1:]
for name in names:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}")
    params.nthread, params.pure = int(threads), len(names) > 1
    out = os.path.join(folder, f"{name}.gguf")
    if llama_cpp.llama_model_quantize(source.encode(), out.encode(), params):
        sys.exit(f"quantizing to {name} failed")
"""


@dataclass(frozen=True)
class Run:
    """Wall seconds and peaks of one process."""

    seconds: float
    peak_bytes: int
    peak_anonymous_bytes: int


def measured(*command: object) -> Run:
    """Run a process, watching its memory."""
    started, peaks = time.perf_counter(), {"VmHWM": 0, "RssAnon": 0}
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [str(word) for word in command], stdout=subprocess.DEVNULL, stderr=errors
        )
        while process.poll() is None:
            for key, value in _memory(process.pid).items():
                peaks[key] = max(peaks[key], value)
            time.sleep(0.1)
        seconds = time.perf_counter() - started
        if process.returncode:
            errors.seek(0)
            sys.exit(f"{command[0]} failed: {errors.read().decode()[-2000:]}")
    return Run(seconds, peaks["VmHWM"], peaks["RssAnon"])


def _memory(pid: int) -> dict[str, int]:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # it has just ended, or this system has no /proc
        return {}
    fields = dict(line.split(":", 1) for line in lines)
    keys = ("VmHWM", "RssAnon")
    return {key: 1024 * int(fields[key].split()[0]) for key in keys if key in fields}


def convert(checkpoint: Path, output: Path, threads: int) -> Run:
    """One conversion with the default tiers."""
    options = ("--no-calibration", "--no-measure", "--force", "--jobs", threads)
    return measured(sys.executable, "-m", "edgekit", "convert", checkpoint, "-o", output, *options)


def quantize(source: Path, folder: Path, threads: int, *names: str) -> Run:
    """llama.cpp's quantizer, once per name, in one process."""
    return measured(sys.executable, "-c", QUANTIZE, source, folder, threads, *names)


def f16_gguf(artifact: Path, folder: Path, threads: int) -> Path:
    """An F16 GGUF of the model: our source tier, rounded by llama.cpp."""
    source = folder / "source.gguf"
    command = ("materialize", artifact, "--tier", "source", "-o", source)
    measured(sys.executable, "-m", "edgekit", *command)
    quantize(source, folder, threads, "F16")
    source.unlink()
    return folder / "F16.gguf"


def stored_bits(artifact: Path) -> dict[str, float]:
    """Bits per weight that each tier adds to the artifact, 1-D tensors left out."""
    manifest = json.loads((artifact / "edgekit.json").read_text())
    weights = {t["name"]: _product(t["shape"]) for t in manifest["tensors"] if len(t["shape"]) > 1}
    n_bytes = dict.fromkeys(manifest["tiers"], 0)
    for row in manifest["levels"]:
        if row["tensor"] in weights and row["tier"] in n_bytes:
            n_bytes[row["tier"]] += row["bytes"]
    total = sum(weights.values())
    return {tier: round(8 * n / total, 3) for tier, n in n_bytes.items()}


def _product(shape: list[int]) -> int:
    n = 1
    for size in shape:
        n *= size
    return n


def compare(checkpoint: Path, folder: Path, threads: int, pairs: int) -> dict[str, Any]:
    """Alternate ``pairs`` times in ``folder``."""
    artifact, theirs = folder / "edge", folder / "quantized"
    theirs.mkdir()
    convert(checkpoint, artifact, threads)  # also warms the page cache
    source, rows = f16_gguf(artifact, folder, threads), []
    for _ in range(pairs):
        row = (
            convert(checkpoint, artifact, threads),
            quantize(source, theirs, threads, *FTYPES.values()),
        )
        print(f"edgekit {row[0].seconds:.1f} s, llama.cpp {row[1].seconds:.1f} s", flush=True)
        rows.append(row)
    ratios = [ours.seconds / peer.seconds for ours, peer in rows]
    n_bytes = sum(path.stat().st_size for path in artifact.iterdir())
    source_bytes = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    return {
        "threads": threads,
        "source_bytes": source_bytes,
        "artifact_bytes": n_bytes,
        "size_ratio": round(n_bytes / source_bytes, 4),
        "bits_per_weight_stored": stored_bits(artifact),
        "edgekit": [vars(ours) for ours, _ in rows],
        "llama_model_quantize": [vars(peer) for _, peer in rows],
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
    }


def main() -> None:
    """Make what is missing, compare, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--checkpoint", type=Path, help="use this; default: one is made")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3.2-1b-2-layers")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        checkpoint = args.checkpoint or make_checkpoint(folder / "model", SHAPES[args.shape])
        report = compare(checkpoint, folder, args.threads, args.pairs)
        shutil.rmtree(folder / "quantized")
    for tier, bits in report["bits_per_weight_stored"].items():
        print(f"{tier:8} {bits:6.3f} bits per weight stored")
    model = args.checkpoint.name if args.checkpoint else args.shape
    print(json.dumps({"benchmark": "convert", "model": model, **report}))


if __name__ == "__main__":
    main()
