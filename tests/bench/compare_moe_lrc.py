"""SRP and SCH beside the code of their authors, on one trace.

    python tests/bench/compare_moe_lrc.py CHECKOUT [TRACE]

CHECKOUT is a work tree of github.com/ljcleo/moe-lrc. Its functions run as they are, with their
configuration stubbed; without TRACE on random routing with skew and persistence. Prints the largest
differences, a JSON line last, and fails above 1e-6 (their SCH is float32).
"""

import argparse
import importlib.util
import json
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from edgekit.routing.consistency import sch, srp
from edgekit.routing.trace import Trace, read_trace, trace_of

SEGMENTS, RHOS = (4, 16, 64), (1, 2, 3)
LENGTH = 128  # tokens of a sequence that a trace is cut into
LEAST = 65  # sequences: their loop over segments ends at the number of samples


class _Config:
    """What their code reads of its table of models."""

    def __init__(self, trace: Trace) -> None:
        facts = {
            "num_layers": trace.experts.shape[1],
            "num_experts": trace.n_experts,
            "top_k": trace.n_used,
            "type": "causal",
        }
        self.loc = {("m", key): value for key, value in facts.items()}


def their_module(checkout: Path, name: str, trace: Trace) -> Any:
    """One of their scripts, imported with `misc` stubbed."""
    misc: Any = types.ModuleType("misc")
    settings = {"seg_lengths": list(SEGMENTS), "num_bootstrap": 1}
    misc.get_global_config = settings.__getitem__
    misc.model_config, misc.stable_hash = _Config(trace), lambda _: 0
    misc.print_log = lambda *_: None
    misc.get_model_keys = misc.get_model_key = lambda *_, **__: "m"
    sys.modules["misc"] = misc
    bar: Any = types.ModuleType("tqdm")
    bar.tqdm, bar.trange = None, range
    sys.modules.setdefault("tqdm", bar)
    spec = importlib.util.spec_from_file_location(name, checkout / "src" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def their_srp(checkout: Path, trace: Trace) -> dict[int, float]:
    """Their best F1 of the whole model, by segment length; sequences must be equally long."""
    module = their_module(checkout, "30_srp_calc", trace)
    sequences = np.stack(list(trace.sequences()))  # [sequences, tokens, layers, used]
    ranks = np.zeros((*sequences.shape[:3], trace.n_experts), np.int16)
    for place in range(trace.n_used):
        ids = sequences[..., place : place + 1].astype(np.int64)
        np.put_along_axis(ranks, ids, trace.n_experts - 1 - place, axis=3)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for layer in range(ranks.shape[2]):
            rank = torch.from_numpy(ranks[:, :, layer].copy())
            save_file({"d": rank}, place / f"m_{layer:02d}.safetensors")
        (place / "out").mkdir()
        module.seg_stat(1, place, place / "out", "m")
        stats = load_file(place / "out" / "m.safetensors")
    found = {}
    for segment in SEGMENTS:
        sums = {
            kind: sum(v.sum(1) for k, v in stats.items() if k.endswith(f"_{segment:03d}_{kind}"))
            for kind in "mpa"
        }
        f1 = sums["m"] * 2 / (sums["p"] + sums["a"]).clamp(min=1)  # as 31_srp_refine.py
        found[segment] = f1[0].max().item()
    return found


def their_sch(checkout: Path, trace: Trace, segment: int, cache: int) -> list[float]:
    """Their hit rate of each layer, mean over sequences."""
    module = their_module(checkout, "41_sch_calc", trace)
    return [
        float(
            np.mean(
                [
                    module.calc_fsf(
                        torch.from_numpy(ids[:, layer].astype(np.int64)), trace.n_experts, segment
                    )[cache - 1].item()
                    for ids in trace.sequences()
                ]
            )
        )
        for layer in range(trace.experts.shape[1])
    ]


def random_trace() -> Trace:
    """Routing that is skewed and persists from token to token."""
    random = np.random.default_rng(0)
    n_sequences, n_tokens, layers, experts, used = LEAST, LENGTH, 3, 16, 3
    scores = random.normal(size=(layers, experts))
    ids = np.empty((n_sequences * n_tokens, layers, used), np.int64)
    state = np.zeros((layers, experts))
    for t in range(len(ids)):
        state = 0.7 * state + random.normal(size=state.shape)
        ids[t] = np.argsort(-(scores + state), axis=1)[:, :used]
    return trace_of(ids, experts, tuple(range(0, len(ids), n_tokens)))


def cut(trace: Trace) -> Trace:
    """The trace as sequences of one length."""
    n = trace.n_tokens // LENGTH
    if n < LEAST:
        raise SystemExit(f"the trace has {trace.n_tokens} tokens, {LEAST * LENGTH} are needed")
    ids = trace.experts[: n * LENGTH]
    return trace_of(ids, trace.n_experts, tuple(range(0, len(ids), LENGTH)))


def main() -> None:
    """Compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("trace", type=Path, nargs="?")
    args = parser.parse_args()
    trace = cut(read_trace(args.trace)) if args.trace else random_trace()
    worst = {"srp": 0.0, "sch": 0.0}
    theirs = their_srp(args.checkout, trace)
    for segment in SEGMENTS:
        ours = srp(trace, segment).model
        print(f"SRP({segment}): ours {ours:.6f}, theirs {theirs[segment]:.6f}")
        worst["srp"] = max(worst["srp"], abs(ours - theirs[segment]))
        for rho in RHOS:
            cache = min(rho * trace.n_used, trace.n_experts)
            a, b = sch(trace, segment, cache), their_sch(args.checkout, trace, segment, cache)
            print(f"SCH({segment}, {rho}): ours {np.mean(a):.6f}, theirs {np.mean(b):.6f}")
            worst["sch"] = max(worst["sch"], float(np.abs(np.subtract(a, b)).max()))
    print(json.dumps(worst))
    sys.exit(max(worst.values()) > 1e-6)


if __name__ == "__main__":
    main()
