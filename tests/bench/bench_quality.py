"""Quality per byte: plans against llama.cpp's own mixes of as many bytes, on both samples.

Each sample is converted with the default tiers. From its source tier and the importance matrix that
the conversion saved, `llama_model_quantize` makes Q2_K, Q3_K_M, Q4_K_M, Q5_K_M and Q6_K; once more
without a matrix. Ours is the plan for the same bytes of weights. All are compared with the source
tier on text that was not calibrated on; the ratio is to the better of the two mixes. Then the KL
divergence at a dozen growing budgets: it must not rise by more than the standard error of the
difference. Prints one JSON line last.

    python tests/bench/bench_quality.py --threads 2
"""

import argparse
import ctypes
import json
import math
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import llama_cpp

from edgekit.artifact import Artifact, open_artifact
from edgekit.assembly import Assembly
from edgekit.convert import convert
from edgekit.convert_options import Options
from edgekit.evaluate import Quality, Reference, evaluate
from edgekit.exporters.gguf import read_header
from edgekit.imatrix import read_imatrix
from edgekit.measure import highest_depths, sizes_of
from edgekit.plan import plan_weights
from edgekit.planner import Depths
from edgekit.progress import Silent
from edgekit.samples import HELDOUT_TEXT
from edgekit.sink import FileSink
from edgekit.text import read_text

sys.path.append(str(Path(__file__).resolve().parents[1]))
from stock import quantize

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = ("tiny-llama", "tiny-moe")
MIXES = ("Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K")


@llama_cpp.llama_log_callback
def silent(_level: int, _text: bytes, _data: ctypes.c_void_p) -> None:
    """Take llama.cpp's log."""


class Comparison:
    """One artifact and its source tier's logits on a text."""

    def __init__(self, artifact: Artifact, folder: Path, text: str, threads: int) -> None:
        """Write the source tier into ``folder`` and run it."""
        self.artifact, self.folder, self.threads = artifact, folder, threads
        self.source = folder / "source.gguf"
        highest = highest_depths(artifact)
        with self.source.open("wb") as file, Assembly(artifact, highest) as source:
            source.write_to(FileSink(file.fileno()), lambda n_bytes: None)
        self.reference = Reference.open(self.source, text, n_threads=threads)

    def ours(self, depths: Depths) -> Quality:
        """Quality of a plan."""
        with Assembly(self.artifact, depths) as source:
            return evaluate(source, self.reference, n_threads=self.threads)

    def mix(self, name: str, weights: dict[str, Any] | None) -> Quality:
        """Quality of llama.cpp's mix ``name``, quantized with ``weights`` of the columns."""
        path = quantize(
            self.source, self.folder / f"{name}.gguf", name, weights=weights, pure=False
        )
        return evaluate(path, self.reference, n_threads=self.threads)


def convert_sample(name: str, folder: Path, threads: int) -> tuple[Path, Path, float]:
    """Convert a sample: the artifact, the importance matrix, bytes over the checkpoint's."""
    artifact, imatrix = folder / "edge", folder / "imatrix.gguf"
    options = Options(measure=False, jobs=threads, save_imatrix=imatrix)
    report = convert(ROOT / "samples" / name, artifact, options, Silent())
    return artifact, imatrix, report.artifact_bytes / report.source_bytes


def column_weights(source: Path, imatrix: Path) -> dict[str, Any]:
    """What llama-quantize would weigh the columns of each tensor with."""
    statistics, weights = read_imatrix(imatrix), {}
    for tensor in read_header(source).tensors:
        experts = tensor.shape[0] if len(tensor.shape) == 3 else 1
        weights[tensor.name] = statistics.weights_for(tensor.name, experts, tensor.shape[-1])
    return {name: values for name, values in weights.items() if values is not None}


def at_mixes(comparison: Comparison, weights: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each mix: its bytes, its KL with and without the matrix, and ours."""
    rows = []
    for name in MIXES:
        same, plain = comparison.mix(name, weights), comparison.mix(name, None)
        ours = comparison.ours(plan_weights(comparison.artifact, same.weights_bytes).depths)
        best = min(same.kl_mean or 0.0, plain.kl_mean or 0.0)
        row = {"mix": name, "bytes": same.weights_bytes, "our_bytes": ours.weights_bytes}
        row |= {"kl": ours.kl_mean, "kl_error": ours.kl_error}
        row |= {"mix_kl": same.kl_mean, "mix_kl_error": same.kl_error}
        row |= {"plain_mix_kl": plain.kl_mean, "ratio": (ours.kl_mean or 0.0) / best}
        print(
            f"{name:7} {same.weights_bytes:9} {ours.kl_mean:.6f} +- {ours.kl_error:.6f}  "
            f"{same.kl_mean:.6f} +- {same.kl_error:.6f}  {plain.kl_mean:.6f}  {row['ratio']:.3f}",
            flush=True,
        )
        rows.append(row)
    return rows


def at_budgets(comparison: Comparison) -> list[dict[str, Any]]:
    """A row for each of a dozen budgets, and how far each rises above the one before, in errors."""
    found = [comparison.ours(depths) for depths in sizes_of(comparison.artifact)]
    rows = [{"bytes": q.weights_bytes, "kl": q.kl_mean, "kl_error": q.kl_error} for q in found]
    for before, row in pairwise(rows):
        error = math.hypot(before["kl_error"], row["kl_error"])
        row["rise"] = (row["kl"] - before["kl"]) / error if error else 0.0
        print(f"{row['bytes']:9} {row['kl']:.6f} +- {row['kl_error']:.6f}  rise {row['rise']:.2f}")
    return rows


def bench(name: str, text: str, threads: int) -> dict[str, Any]:
    """Convert and compare one sample."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        path, imatrix, size_ratio = convert_sample(name, folder, threads)
        with open_artifact(path) as artifact:
            comparison = Comparison(artifact, folder, text, threads)
            n_tokens = len(comparison.reference.sequences.targets)
            print(f"{name}: {n_tokens} tokens; KL of ours, of the mix, of the mix without matrix")
            with comparison.reference:
                mixes = at_mixes(comparison, column_weights(comparison.source, imatrix))
                budgets = at_budgets(comparison)
    mean = math.exp(sum(math.log(row["ratio"]) for row in mixes) / len(mixes))
    print(f"{name}: geometric mean of the ratios {mean:.3f}, artifact {size_ratio:.4f}")
    return {
        "n_tokens": n_tokens,
        "size_ratio": size_ratio,
        "mixes": mixes,
        "geometric_mean": mean,
        "largest_rise_in_errors": max(row.get("rise", 0.0) for row in budgets),
        "budgets": budgets,
    }


def main() -> None:
    """Compare both samples, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--samples", nargs="+", choices=SAMPLES, default=SAMPLES)
    parser.add_argument("--text", type=Path, default=HELDOUT_TEXT)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    text = read_text(args.text)
    results = {name: bench(name, text, args.threads) for name in args.samples}
    holds = all(
        row["ratio"] <= 1 for result in results.values() for row in result["mixes"]
    ) and all(result["geometric_mean"] <= 0.8 for result in results.values())
    report = {"benchmark": "quality", "text": args.text.name, "holds": holds, "results": results}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
