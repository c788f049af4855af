"""edgekit beside its peers: the same checkpoint, the same text, the same bytes, on this machine.

    python tests/bench/peers/compare.py [--sample tiny-llama] [--work DIR] [--only llama.cpp ...]

Each peer gets a virtual environment of its own in ``--work``, made where it is missing, with pinned
versions. Its tool makes its files of the sample; each is run by its own runtime on the same tokens
of held-out text and compared with the checkpoint run in float32 by transformers. For each of them
edgekit's plan of as many bytes of weights is run too, in turns with it; times and speeds are
medians of those runs, peaks the highest. A peer that does not install or run is listed
with its own last words. Writes docs/compare.json and docs/compare.md; prints a JSON line last.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).resolve().parent))
from builders import PEERS, ROOT, Built, edgekit
from commands import HERE, Failed, timed
from table import page
from venvs import LLAMA_CPP, VENVS

LENGTH = 512  # tokens of a sequence; the second half is scored
PAIRS = 3  # runs of a peer's file and of edgekit's, in turns
Row = dict[str, Any]


def held_out_ids(checkpoint: Path, n: int) -> "np.ndarray[Any, np.dtype[np.int64]]":
    """``n`` sequences of held-out text, evenly from all of it, int64 ``[n, LENGTH]``."""
    from tokenizers import Tokenizer

    text = (ROOT / "samples" / "text" / "heldout.txt").read_text("utf-8")
    ids = Tokenizer.from_file(str(checkpoint / "tokenizer.json")).encode(text).ids
    starts = np.linspace(0, len(ids) - LENGTH, n).astype(int)
    return np.array([ids[start : start + LENGTH] for start in starts])


def log_softmax(rows: Any) -> Any:
    """In float64."""
    rows = rows.astype(np.float64)
    rows = rows - rows.max(axis=1, keepdims=True)
    return rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))


def kl_divergence(reference: Any, rows: Any) -> tuple[float, float]:
    """Mean over positions of KL(reference || rows), nats, and its standard error."""
    p, q = log_softmax(reference), log_softmax(rows[:, : reference.shape[1]])
    kls = (np.exp(p) * (p - q)).sum(axis=1)
    return float(kls.mean()), float(kls.std() / np.sqrt(len(kls)))


def run(built: Built, out: Path) -> Row:
    """Run a model in a process of its own; what the runner told, and where its logits are."""
    logits, log = out / "logits.npy", out / "run.log"
    words = [built.python, HERE / built.runner, built.path, out / "ids.npy", logits]
    timed(words, log)
    told: Row = json.loads(log.read_text().strip().splitlines()[-1])
    return told


def measured(pair: Sequence[Built], out: Path, reference: Any) -> list[Row]:
    """A row for each: what it took to make, and what it does."""
    told: list[list[Row]] = [[] for _ in pair]
    divergences = [(0.0, 0.0) for _ in pair]
    for _ in range(PAIRS):
        for i, built in enumerate(pair):
            told[i].append(run(built, out))
            divergences[i] = kl_divergence(reference, np.load(out / "logits.npy"))
    return [row(*of_one) for of_one in zip(pair, told, divergences, strict=True)]


def row(built: Built, told: Sequence[Row], divergence: tuple[float, float]) -> Row:
    """A row from all runs of a file."""
    of_runs = {key: [one[key] for one in told] for key in told[0]}
    return {
        "tool": built.tool,
        "name": built.name,
        "weights_bytes": weights_bytes(built),
        "convert_seconds": round(built.seconds, 2),
        "convert_peak_bytes": built.peak_bytes,
        "kl_mean": divergence[0],
        "kl_error": divergence[1],
        **{
            key: round(max(values) if "peak" in key else statistics.median(values), 4)
            for key, values in of_runs.items()
        },
    }


def ours(edge: Path, n_bytes: int, out: Path, made: tuple[float, int]) -> Built | None:
    """edgekit's GGUF of at most ``n_bytes`` of weights; ``None`` where its least has more."""
    path = out / "ours.gguf"
    words = [sys.executable, "-m", "edgekit", "materialize", edge, "--target-size", n_bytes]
    try:
        timed([*words, "-o", path, "--force"], out / "materialize.log")
    except Failed:
        return None
    return Built(
        "edgekit", f"{n_bytes} bytes", path, "run_gguf.py", Path(sys.executable), (path,), *made
    )


def weights_bytes(built: Built) -> int:
    """Of its files; the vocabulary in a GGUF's header is no weight."""
    from edgekit.exporters.gguf import read_header

    if built.path.suffix == ".gguf":
        return sum(tensor.n_bytes for tensor in read_header(built.path).tensors)
    return sum(path.stat().st_size for path in built.files)


def compare(sample: str, work: Path, chunks: int, only: list[str]) -> Row:
    """Everything."""
    checkpoint, out = ROOT / "samples" / sample, work / f"out-{sample}"
    out.mkdir(parents=True, exist_ok=True)
    np.save(out / "ids.npy", held_out_ids(checkpoint, chunks))
    float_model = Built("", "", checkpoint, "run_reference.py", Path(sys.executable), (), 0, 0)
    source = run(float_model, out)
    reference = np.load(out / "logits.npy")
    edge, seconds, peak = edgekit(checkpoint, out)
    rows, failures = list[Row](), dict[str, str]()
    for peer in only:
        try:
            for built in PEERS[peer](checkpoint, out, work):
                mine = ours(edge, weights_bytes(built), out, (seconds, peak))
                theirs, *own = measured([built, mine] if mine else [built], out, reference)
                rows.append(theirs | {"edgekit": own[0] if own else None})
                print(json.dumps(rows[-1]), flush=True)
        except (Failed, OSError, ValueError) as error:
            failures[peer] = " ".join(str(error).split())[:400]
            print(f"{peer}: {failures[peer]}", flush=True)
    size = sum(p.stat().st_size for p in edge.iterdir() if p.suffix in (".gguf", ".levels"))
    return {
        "sample": sample,
        "n_tokens": chunks * (LENGTH // 2 - 1),
        "chunks": chunks,
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "source": source,
        "edgekit": {"seconds": round(seconds, 2), "peak_bytes": peak, "artifact_bytes": size},
        "versions": {peer: VENVS[peer] for peer in only} | {"runtime of GGUF": (LLAMA_CPP,)},
        "models": rows,
        "failures": failures,
    }


def main() -> None:
    """Compare, write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sample", default="tiny-llama")
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache" / "edgekit-peers")
    parser.add_argument("--chunks", type=int, default=4)
    parser.add_argument("--only", nargs="+", choices=sorted(PEERS), default=list(PEERS))
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "compare.json")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    body = compare(options.sample, options.work.resolve(), options.chunks, options.only)
    options.output.write_text(json.dumps(body, indent=1) + "\n")
    options.output.with_suffix(".md").write_text(page(body))
    print(json.dumps(body))


if __name__ == "__main__":
    main()
