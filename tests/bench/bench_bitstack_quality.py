"""BitStack's quality per byte on both samples: the reference, ours, `nested`, llama.cpp's mixes.

The reference decomposes every matrix as the original does: its columns scaled by the norm of their
inputs, full SVDs, unrounded factors in the residual, float16 factors of rank 16, here of rank 4 as
well, since a rank of 16 costs more than the signs where matrices have 256 columns. At the bytes of
each of its depths 1 to 8: ours on the ladders B and R, packed, and the plan of a `nested` artifact.
Then all of them at the bytes of llama-quantize's mixes, made with the same importance matrix. KL to
the source on text that was not calibrated on. Prints one JSON line last.

    python tests/bench/bench_bitstack_quality.py --threads 1
"""

import argparse
import ctypes
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import torch

from edgekit.artifact import Artifact, open_artifact
from edgekit.assembly import Assembly
from edgekit.convert import convert
from edgekit.convert_options import DEFAULT_TIERS, Options
from edgekit.errors import DoesNotFitError
from edgekit.evaluate import Reference, evaluate
from edgekit.exporters.gguf import TensorInfo, write_gguf
from edgekit.imatrix import Imatrix, read_imatrix
from edgekit.kernels.bitstack_level import to_bytes
from edgekit.kernels.bitstack_matmul import dense_ref
from edgekit.kernels.bitstack_rows import add_levels
from edgekit.kernels.block_matmul import dense_ref as blocks_ref
from edgekit.kernels.decompose_ref import decompose_ref
from edgekit.measure import highest_depths
from edgekit.planner import Depths, fill, packed_bytes, resident_bytes
from edgekit.progress import Silent
from edgekit.samples import HELDOUT_TEXT
from edgekit.sink import FileSink
from edgekit.text import read_text
from edgekit.torch_runtime import Matrix, Weights

sys.path.append(str(Path(__file__).resolve().parent))
from bench_quality import MIXES, ROOT, SAMPLES, column_weights, silent

N_DEPTHS = 8
RANKS = (16, 4)
LADDERS = {
    "B": ("Q2_K", *(f"B{i}" for i in range(1, N_DEPTHS + 1)), "source"),
    "R": ("Q2_K", *(f"R{i}" for i in range(1, 6)), "source"),
    "nested": DEFAULT_TIERS,
}
Values = dict[str, np.ndarray]


class Judge:
    """Scores weights of one model against its source."""

    def __init__(self, artifact: Artifact, text: str, folder: Path, n_tokens: int, threads: int):
        """Run the source."""
        self.header, self.folder, self.threads = artifact.header, folder, threads
        with Assembly(artifact, highest_depths(artifact)) as top:
            self.reference = Reference.open(top, text, n_tokens=n_tokens, n_threads=threads)

    def kl(self, values: Values) -> float:
        """KL divergence of a model with these weights, all of them in float32."""
        path = self.folder / "values.gguf"
        infos = [TensorInfo(t.name, "F32", t.shape) for t in self.header.tensors]
        with path.open("wb") as file:
            write_gguf(file, self.header.metadata, infos, ([values[i.name]] for i in infos))
        return float(evaluate(path, self.reference, n_threads=self.threads).kl_mean or 0.0)


def dense(matrix: Matrix) -> np.ndarray:
    """The weight that a runtime computes with."""
    parts = [blocks_ref(matrix.blocks, torch.float32)] if matrix.blocks is not None else []
    parts += [dense_ref(matrix.levels, torch.float32)] if matrix.levels else []
    return sum(part.numpy() for part in parts)


def values_of(artifact: Artifact, depths: Depths) -> Values:
    """All weights of a depth, as a packed runtime has them."""
    weights = Weights(artifact, depths, "cpu")
    return {
        s.name: np.stack([dense(weights.matrix(s.name, e)) for e in range(s.n_experts)])
        for s in artifact.stacks
    }


def reference_depths(
    source: Values, artifact: Artifact, imatrix: Imatrix, rank: int
) -> Iterator[tuple[int, Values]]:
    """Bytes and weights of the original method at depths 1 to 8, every matrix decomposed."""
    kept = {s.name for s in artifact.stacks if len(s.levels) == 1}
    n_bytes = sum(resident_bytes(s, s.tiers[0]) for s in artifact.stacks if s.name in kept)
    stacks, sums = {}, {n: v if n in kept else np.zeros_like(v) for n, v in source.items()}
    scales = {}
    for stack in (s for s in artifact.stacks if s.name not in kept):
        found = imatrix.weights_for(stack.name, stack.n_experts, stack.cols)
        scale = np.ones((stack.n_experts, stack.cols)) if found is None else np.sqrt(found) + 1e-3
        scales[stack.name] = scale.astype(np.float32)
        stacks[stack.name] = [
            decompose_ref(w * s, N_DEPTHS, rank)
            for w, s in zip(source[stack.name], scales[stack.name], strict=True)
        ]
    for depth in range(N_DEPTHS):
        for name, experts in stacks.items():
            for e, levels in enumerate(experts):
                part = np.zeros_like(sums[name][e])
                add_levels([levels[depth]], part)
                sums[name][e] += part / scales[name][e]
                n_bytes += len(to_bytes(levels[depth]))
        yield n_bytes, sums


def at_bytes(artifact: Artifact, n_bytes: int, *, packed: bool) -> Depths | None:
    """The plan for so many bytes of weights; ``None`` where the lowest depth is larger."""
    manifest = artifact.manifest
    order = manifest.stored_order if packed else manifest.resident_order
    try:
        return fill(artifact.stacks, order, n_bytes, packed_bytes if packed else resident_bytes)
    except DoesNotFitError:
        return None


def bench(name: str, text: str, n_tokens: int, threads: int) -> dict[str, Any]:
    """Convert a sample three times and compare."""
    with tempfile.TemporaryDirectory() as temporary:
        folder, artifacts = Path(temporary), {}
        imatrix = folder / "imatrix.gguf"
        for ladder, tiers in LADDERS.items():
            codec = "nested" if ladder == "nested" else "bitstack"
            options = Options(tiers, codec, measure=False, jobs=threads, save_imatrix=imatrix)
            convert(ROOT / "samples" / name, folder / ladder, options, Silent())
            artifacts[ladder] = open_artifact(folder / ladder)
        nested = artifacts["nested"]
        judge = Judge(nested, text, folder, n_tokens, threads)
        source = values_of(nested, highest_depths(nested))

        def row(n_bytes: int, **more: Any) -> dict[str, Any]:
            found = {"bytes": n_bytes, **more}
            for ladder, artifact in artifacts.items():
                depths = at_bytes(artifact, n_bytes, packed=ladder != "nested")
                found[ladder] = depths and judge.kl(values_of(artifact, depths))
            print(name, json.dumps(found), flush=True)
            return found

        rows = [
            row(n_bytes, rank=rank, depth=depth, reference=judge.kl(values))
            for rank in RANKS
            for depth, (n_bytes, values) in enumerate(
                reference_depths(source, nested, read_imatrix(imatrix), rank), 1
            )
        ]
        highest = highest_depths(nested)
        with (folder / "source.gguf").open("wb") as file, Assembly(nested, highest) as top:
            top.write_to(FileSink(file.fileno()), lambda n_bytes: None)
        mixes = list(at_mixes(nested, judge, folder, imatrix, row))
        uniform = {tier: uniform_kl(artifacts, judge, tier) for tier in ("B1", "B2", "B3", "B4")}
        return {"n_tokens": len(judge.reference.sequences.targets), "depths": rows,
                "mixes": mixes, "uniform": uniform}  # fmt: skip


def uniform_kl(artifacts: dict[str, Artifact], judge: Judge, tier: str) -> dict[str, float]:
    """Every tensor at one step of B: packed, and transcoded for llama.cpp."""
    artifact = artifacts["B"]
    tiers = {s.name: tier if tier in s.tiers else s.tiers[0] for s in artifact.stacks}
    depths = Depths(tiers, 0)
    with Assembly(artifact, depths) as gguf:
        transcoded = evaluate(gguf, judge.reference, n_threads=judge.threads)
    sizes = {
        kind: sum(of(s, tiers[s.name]) for s in artifact.stacks)
        for kind, of in (("packed_bytes", packed_bytes), ("transcoded_bytes", resident_bytes))
    }
    packed = judge.kl(values_of(artifact, depths))
    return {**sizes, "packed": packed, "transcoded": float(transcoded.kl_mean or 0.0)}


def at_mixes(
    nested: Artifact, judge: Judge, folder: Path, imatrix: Path, row: Callable[..., dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """A row for each of llama-quantize's mixes."""
    from stock import quantize

    source = folder / "source.gguf"
    weights = column_weights(source, imatrix)
    for mix in MIXES:
        path = quantize(source, folder / f"{mix}.gguf", mix, weights=weights, pure=False)
        quality = evaluate(path, judge.reference, n_threads=judge.threads)
        yield row(quality.weights_bytes, mix=mix, mix_kl=quality.kl_mean)


def main() -> None:
    """Compare both samples, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--samples", nargs="+", choices=SAMPLES, default=SAMPLES)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    torch.set_num_threads(args.threads)
    text = read_text(HELDOUT_TEXT)
    results = {name: bench(name, text, args.tokens, args.threads) for name in args.samples}
    print(json.dumps({"benchmark": "bitstack_quality", "results": results}))


if __name__ == "__main__":
    main()
