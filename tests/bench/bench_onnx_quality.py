"""What nested codes cost: joint choice, plain slices, one depth alone, error feedback, GGUF tiers.

All with one importance matrix, KL divergence to the checkpoint in float32 on held-out text, as the
artifacts ship (ONNX: activations in 8 bits). Plain slices ignore importance, as rounding does.
Codes for one depth are stored in the same planes; those of 8 bits reach further than planes hold,
so for them the error of the weights is what is compared (`onnx.depths` of the manifest).
"""

import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.artifact import open_artifact
from edgekit.assembly import Assembly
from edgekit.calibration import calibrate
from edgekit.checkpoint import Checkpoint
from edgekit.convert import convert
from edgekit.convert_options import Options
from edgekit.evaluate import Reference, compare, evaluate
from edgekit.imatrix import write_imatrix
from edgekit.kernels import slices
from edgekit.kernels.feedback import CARRIED
from edgekit.onnx import slicing
from edgekit.onnx.artifact import open_onnx
from edgekit.onnx.cache import model_folder
from edgekit.onnx.evaluate import logits_of
from edgekit.plan import plan_tier
from edgekit.progress import Silent
from edgekit.samples import heldout_text

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = ("tiny-llama", "tiny-moe")
TIERS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q8_0", "source")
N_TOKENS = 4096
Encode = Callable[[slices.F32Array, slices.F32Array, int], slices.Slices]


def plain(weights: slices.F32Array, importance: slices.F32Array, low: int) -> slices.Slices:
    return slices.plain(weights, low)


def dedicated(bits: int) -> Encode:
    """Codes for one depth alone, as leading bits of master codes whose other bits are zero."""

    def encode(weights: slices.F32Array, importance: slices.F32Array, low: int) -> slices.Slices:
        own = max(bits, low)
        codes, scale = slices.dedicated_codes(weights, importance, own)
        master = (codes * {2: 64, 4: 16}[own]).astype(np.int32)
        scales = np.stack([scale / 16, scale, scale * 4] if own == 4 else
                          [scale / 64, scale / 4, scale])  # fmt: skip
        return slices.Slices(master.astype(np.int8), scales.astype(np.float16).astype(np.float32))

    return encode


@contextmanager
def encoding(encode: Encode, lowest: int) -> Iterator[None]:
    """Planes that begin at ``lowest`` bits hold all codes of so many bits."""
    ours = slices.encode, slicing.lowest_depth
    slices.encode = encode
    if lowest == 4:
        slicing.lowest_depth = lambda name: 4
    try:
        yield
    finally:
        slices.encode, slicing.lowest_depth = ours


def onnx_rows(
    checkpoint: Path,
    folder: Path,
    imatrix: Path,
    reference: Reference,
    name: str,
    depths: Any,
    carried: str | None = None,
) -> Iterator[dict[str, Any]]:
    options = Options(formats=("onnx",), imatrix=imatrix, measure=False, error_feedback=carried)
    convert(checkpoint, folder, options, Silent())
    artifact = open_onnx(folder)
    for depth in depths:
        with model_folder(artifact, depth) as model:
            size = artifact.part.depth_bytes(depth)
            quality = compare(logits_of(artifact, model, reference), reference, size)
        error = artifact.part.errors[depth][0]
        yield row(name, f"{depth} bits", quality) | {"error": round(error, 5)}


def gguf_rows(
    checkpoint: Path, folder: Path, imatrix: Path, reference: Reference
) -> Iterator[dict[str, Any]]:
    convert(checkpoint, folder, Options(tiers=TIERS, imatrix=imatrix, measure=False), Silent())
    with open_artifact(folder) as artifact:
        for tier in TIERS[:-1]:
            with Assembly(artifact, plan_tier(artifact, tier).depths) as source:
                yield row("gguf", tier, evaluate(source, reference))


def row(codes: str, depth: str, quality: Any) -> dict[str, Any]:
    q = dataclasses.asdict(quality)
    return {
        "codes": codes, "depth": depth, "bytes": q["weights_bytes"],
        "kl": float(f"{q['kl_mean']:.4g}"), "kl_error": float(f"{q['kl_error']:.2g}"),
        "top1": round(q["top1_agreement"], 4), "ppl": round(q["ppl"], 3),
    }  # fmt: skip


def measure(name: str) -> list[dict[str, Any]]:
    checkpoint, rows = ROOT / "samples" / name, []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        imatrix = folder / "imatrix.gguf"
        write_imatrix(calibrate(Checkpoint.open(checkpoint)), imatrix)
        with Reference.open(checkpoint, heldout_text(), n_tokens=N_TOKENS) as reference:
            rounds = (
                ("joint", slices.encode, (8, 4, 2)),
                ("plain slices", plain, (8, 4, 2)),
                ("4 bits alone", dedicated(4), (4,)),
                ("2 bits alone", dedicated(2), (2,)),
            )
            for at, (label, encode, depths) in enumerate(rounds):
                with encoding(encode, depths[0]):
                    rows += onnx_rows(
                        checkpoint, folder / f"onnx{at}", imatrix, reference, label, depths
                    )
            for carried in CARRIED:
                label, place = f"feedback {carried}", folder / f"feedback-{carried}"
                rows += onnx_rows(checkpoint, place, imatrix, reference, label, (8, 4, 2), carried)
            rows += gguf_rows(checkpoint, folder / "gguf", imatrix, reference)
    for each in rows:
        print(f"{name:12} {each['codes']:14} {each['depth']:8} {each['bytes']:>9} "
              f"KL {each['kl']:.5g} +- {each['kl_error']:.2g} top1 {each['top1']:.4f}")  # fmt: skip
    return rows


if __name__ == "__main__":
    chosen = sys.argv[1:] or SAMPLES
    print(json.dumps({name: measure(name) for name in chosen}))
