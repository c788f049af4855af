"""``edgekit prune --report``: every way to prune at 10, 20, 30 %, and pruning against quantization.

The question behind the second table: at equal bytes, and at equal speed, is a pruned and quantized
model better than the whole model quantized further? Where it is not, the report says so.
"""

import json
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from edgekit.artifact import Artifact, open_artifact
from edgekit.assembly import Assembly
from edgekit.convert import convert
from edgekit.convert_options import Options as ConvertOptions
from edgekit.devices.memory import peak_rss_bytes
from edgekit.evaluate import Reference, evaluate
from edgekit.llama import Context, open_model
from edgekit.planner import Depths, fill, tier_at, uniform
from edgekit.progress import Progress
from edgekit.pruning.compare import Comparison
from edgekit.pruning.prune import Options
from edgekit.samples import heldout_text
from edgekit.spool import write_atomically

Json = dict[str, Any]

RATIOS = (0.1, 0.2, 0.3)
TIERS = ("Q2_K", "Q3_K", "Q4_K", "Q6_K", "Q8_0", "source")
N_TOKENS = 2048  # scored per model
N_TIMED, N_RUNS = 32, 9  # tokens decoded per timing, and timings, of which the fastest counts
SAME_SPEED = 0.97  # speeds this near each other count as equal
MAX_SPREAD = 0.1  # between timings of one model; where they differ more, no speed is compared


def report(folder: Path, pruned: Path, options: Options, progress: Progress) -> Json:
    """Measure both tables; write ``report.json`` and ``report.md`` into ``pruned``.

    Args:
        folder: The checkpoint that was pruned.
        pruned: The result of `edgekit.pruning.prune.prune`.
        options: It was made with.
        progress: Told every row.
    """
    comparison = Comparison(
        folder,
        text=options.calibration,
        n_tokens=options.tokens,
        multiple=options.multiple,
        progress=progress,
    )
    ways = [row for ratio in RATIOS for row in comparison.rows(ratio)]
    rows = against_quantization(folder, pruned, options.calibration, progress)
    body = {
        "ways": ways,
        "against_quantization": rows,
        "verdict": verdict(rows),
        "peak_rss_bytes": peak_rss_bytes(),
    }
    write_atomically(pruned / "report.json", json.dumps(body, indent=1).encode())
    write_atomically(pruned / "report.md", as_markdown(body).encode())
    return body


def against_quantization(
    folder: Path, pruned: Path, text: Path | None, progress: Progress
) -> list[Json]:
    """Pruned and quantized to the bytes of each tier, beside the whole model at the same bytes.

    Returns:
        Rows with ``model`` (``pruned`` or ``whole``), ``at``, ``weights_bytes``, ``kl_mean`` to the
        source, ``ppl``, ``tokens_per_second`` and ``speed_spread``; each pruned row, with its
        ``budget_bytes``, is followed by the whole model within the same budget. Both are filled up
        in their artifact's own order, so neither comes to the last byte of it.
    """
    asked = ConvertOptions(tiers=TIERS, calibration=text, measure=False)
    with tempfile.TemporaryDirectory(prefix="edgekit-report-") as name:
        for source, target in ((folder, "whole"), (pruned, "pruned")):
            convert(source, Path(name) / target, asked, progress)
        with (
            open_artifact(Path(name) / "whole") as whole,
            open_artifact(Path(name) / "pruned") as small,
        ):
            return _rows(whole, small, progress)


def _rows(whole: Artifact, small: Artifact, progress: Progress) -> list[Json]:
    rows: list[Json] = []
    highest = uniform(whole.stacks, lambda stack: stack.tiers[-1])
    least = uniform(whole.stacks, lambda stack: stack.tiers[0]).weights_bytes
    progress.start("compare", 2 * len(TIERS))
    with (
        Assembly(whole, highest) as source,
        Reference.open(source, heldout_text(), n_tokens=N_TOKENS) as reference,
    ):
        for tier in TIERS:
            n_bytes = uniform(small.stacks, partial(tier_at, tier=tier)).weights_bytes
            row = {"budget_bytes": n_bytes, **_measured(small, _filled(small, n_bytes), reference)}
            rows.append({"model": "pruned", "at": f"bytes of {tier}", **row})
            if n_bytes >= least:
                row = _measured(whole, _filled(whole, n_bytes), reference)
                rows.append({"model": "whole", "at": f"bytes of pruned {tier}", **row})
            progress.advance(1)
        for tier in TIERS[:-1]:
            depths = uniform(whole.stacks, partial(tier_at, tier=tier))
            rows.append({"model": "whole", "at": tier, **_measured(whole, depths, reference)})
            progress.advance(1)
    return rows


def _filled(artifact: Artifact, n_bytes: int) -> Depths:
    return fill(artifact.stacks, artifact.order(artifact.manifest.resident_order), n_bytes)


def _measured(artifact: Artifact, depths: Depths, reference: Reference) -> Json:
    with Assembly(artifact, depths) as source:
        found = evaluate(source, reference)
    return {
        "weights_bytes": depths.weights_bytes,
        "kl_mean": found.kl_mean,
        "ppl": found.ppl,
        **_speed(artifact, depths),
    }


def _speed(artifact: Artifact, depths: Depths) -> Json:
    """Tokens decoded per second, one at a time: the run that other processes disturbed least.

    ``speed_spread`` is by how much more time the median run took.
    """
    with (
        Assembly(artifact, depths) as source,
        open_model(source) as model,
        Context(model, 2 * N_TIMED) as context,
    ):
        seconds = []
        for _ in range(N_RUNS):
            context.clear()
            started = time.perf_counter()
            for token in range(N_TIMED):
                context.decode([token % model.vocab.n_tokens])
            seconds.append(time.perf_counter() - started)
    fastest = min(seconds)
    return {
        "tokens_per_second": round(N_TIMED / fastest, 1),
        "speed_spread": round(median(seconds) / fastest - 1, 3),
    }


def verdict(rows: Sequence[Json]) -> list[str]:
    """One line for each size of the pruned model: who is better at equal bytes, at equal speed."""
    lines = []
    spread = max(row["speed_spread"] for row in rows)
    whole = [row for row in rows if row["model"] == "whole"]
    for row in (row for row in rows if row["model"] == "pruned"):
        small = [w for w in whole if w["weights_bytes"] <= row["budget_bytes"]]
        least = SAME_SPEED * row["tokens_per_second"]
        fast = [w for w in whole if w["tokens_per_second"] >= least]
        by_bytes, by_speed = _compared(row, small, "bytes"), _compared(row, fast, "tokens/s")
        if spread > MAX_SPREAD:
            by_speed = f"speeds cannot be compared, timings of one model differ by {spread:.0%}"
        lines.append(f"pruned, {row['at']}: {by_bytes}; {by_speed}")
    return lines


def _compared(row: Json, others: Sequence[Json], what: str) -> str:
    if not others:
        return f"at equal {what} quantization alone cannot get there"
    best = min(other["kl_mean"] for other in others)
    who = "quantization alone" if best <= row["kl_mean"] else "pruning"
    return f"at equal {what} {who} is better (KL {best:.4g} whole, {row['kl_mean']:.4g} pruned)"


def as_markdown(body: Json) -> str:
    """The report as a page."""
    lines = [
        "# Pruning, measured",
        "",
        "KL divergence to the source in nats, on text that was not calibrated on.",
        "",
        "| asked | way | removed | parameters | KL | perplexity | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in body["ways"]:
        lines.append(
            f"| {r['ratio_asked']:.0%} | {r['name']} | {r['ratio']:.1%} | {r['n_parameters']:,} "
            f"| {r['kl_mean']:.4g} | {r['ppl']:.4g} | {r['seconds']} |"
        )
    lines += [
        "",
        "## Against quantization alone",
        "",
        "| model | at | bytes of weights | KL | perplexity | tokens/s | spread |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in body["against_quantization"]:
        lines.append(
            f"| {r['model']} | {r['at']} | {r['weights_bytes']:,} | {r['kl_mean']:.4g} "
            f"| {r['ppl']:.4g} | {r['tokens_per_second']} | {r['speed_spread']:.0%} |"
        )
    peak = f"Peak resident memory of the report: {body['peak_rss_bytes']:,} bytes."
    return "\n".join([*lines, "", *(f"- {line}" for line in body["verdict"]), "", peak, ""])
