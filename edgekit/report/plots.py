"""The plots of the page, by matplotlib: one function each, JSON in, figure out.

Every mark that stands for numbers carries their path in the JSON as its ``gid``, which
`edgekit.report.svg` turns into the text under the pointer. Colours stand for variables of the
page's style sheet.
"""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from edgekit.manifest import Json

MIB = 1 << 20
WIDTH, HEIGHT = 5.0, 3.3  # inches; small enough that its letters can be read on a phone
LEAST_KL = 1e-7  # below that the logarithmic axis ends

# Colours that stand for variables of the style sheet: `edgekit.report.svg` replaces them
INK, GRID, LINE, ACCENT = "#010101", "#010102", "#010103", "#010104"
SERIES = tuple(f"#0102{i:02d}" for i in range(8))
STEPS = tuple(f"#0103{i:02d}" for i in range(8))  # few to many bits per weight
PARTS = {"kv": "#010401", "compute": "#010402", "overhead": "#010403"}
PEERS = (1, 3, 4, 5, 7)  # of SERIES: those that are not our own line's blue
STEP_BITS = (3, 4, 5, 6, 7, 9, 17)  # a weight of fewer bits than these has that step
STYLE: Any = {  # matplotlib types it as a dictionary of its own names
    "svg.fonttype": "none",
    "svg.hashsalt": "edgekit",  # the same page for the same figures
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.6,
    "figure.facecolor": "none",
    "figure.constrained_layout.use": True,
}


def step_of(bits: float) -> int:
    """Which of `STEPS` a number of bits per weight has."""
    return sum(bits >= limit for limit in STEP_BITS)


def _axes(x: str, y: str, height: float = HEIGHT) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height))
    axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return figure, axes


def _mib(rows: Sequence[Json], key: str) -> list[float]:
    return [row[key] / MIB for row in rows]


def quality(body: Json) -> Figure | None:
    """KL divergence over weights: the staircase, what was measured, and other tools' files."""
    rows = [(i, row) for i, row in enumerate(body["quality"]) if row["kl_mean"] > LEAST_KL]
    if not rows:
        return None
    figure, axes = _axes("weights in memory, MiB", "KL divergence to the source, nats per token")
    stairs = [row for row in body["stairs"] if row["expected_kl"] > LEAST_KL]
    x, y = _mib(stairs, "weights_bytes"), [row["expected_kl"] for row in stairs]
    axes.step(x, y, where="post", color=LINE, linewidth=1, label="each level, expected")
    for i, row in rows:
        label = "measured" if i == rows[0][0] else None
        point = (row["weights_bytes"] / MIB, row["kl_mean"])
        axes.plot(*point, "o", color=LINE, markersize=5, label=label, gid=f"at:quality/{i}")
    tools = list(dict.fromkeys(row["tool"] for row in body["peers"]))
    for i, row in enumerate(body["peers"]):
        which = tools.index(row["tool"])
        first = next(k for k, other in enumerate(body["peers"]) if other["tool"] == row["tool"])
        label = row["tool"] if i == first else None
        point = (row["weights_bytes"] / MIB, max(row["kl_mean"], LEAST_KL))
        colour, marker = SERIES[PEERS[which % len(PEERS)]], "sD^vP"[which % len(PEERS)]
        axes.plot(*point, marker, color=colour, markersize=6, label=label, gid=f"at:peers/{i}")
    axes.set_yscale("log")
    axes.legend(loc="upper right")
    return figure


def perplexity(body: Json) -> Figure | None:
    """Perplexity over weights, and the source's."""
    rows = body["quality"]
    if not rows or rows[0].get("ppl") is None:
        return None
    figure, axes = _axes("weights in memory, MiB", "perplexity")
    axes.plot(_mib(rows, "weights_bytes"), [row["ppl"] for row in rows], color=LINE)
    for i, row in enumerate(rows):
        point = (row["weights_bytes"] / MIB, row["ppl"])
        axes.plot(*point, "o", color=LINE, markersize=5, gid=f"at:quality/{i}")
    if body["reference_ppl"] is not None:
        axes.axhline(body["reference_ppl"], color=ACCENT, linewidth=1, linestyle="--")
    return figure


def memory(body: Json) -> Figure:
    """What the process holds at every budget, stacked: weights by tier, and the rest."""
    figure, axes = _axes("budget, MiB", "resident, MiB")
    tiers = [row["tier"] for row in body["tiers"]]
    others = [tier for row in body["budgets"] for tier in row["by_tier"] if tier not in tiers]
    names = [*dict.fromkeys(others), *tiers]
    colours = {tier: STEPS[_spread(i, len(names))] for i, tier in enumerate(names)}
    layers = [("process", "overhead_bytes", PARTS["overhead"])]
    layers += [
        ("compute", "compute_bytes", PARTS["compute"]),
        ("KV cache", "kv_bytes", PARTS["kv"]),
    ]
    layers += [(tier, f"by_tier/{tier}", colours[tier]) for tier in names]
    bottoms, handles = [0.0] * len(body["budgets"]), []
    for _, key, colour in layers:
        for i, row in enumerate(body["budgets"]):
            part = row["by_tier"].get(key.removeprefix("by_tier/"), row.get(key, 0)) / MIB
            if part:
                gid = f"at:budgets/{i}/{key}"
                axes.bar(i, part, 0.8, bottoms[i], color=colour, linewidth=0, gid=gid)
                bottoms[i] += part
        handles.append(Rectangle((0, 0), 1, 1, facecolor=colour, linewidth=0))
    places = range(0, len(body["budgets"]), max(1, len(body["budgets"]) // 5))
    axes.set_xticks(places, [f"{body['budgets'][i]['budget_bytes'] / MIB:.4g}" for i in places])
    axes.grid(visible=False, axis="x")
    names = [name for name, _, _ in layers]
    figure.legend(handles[::-1], names[::-1], loc="outside right upper")
    return figure


def _spread(i: int, n: int) -> int:
    """Place ``i`` of ``n`` among the steps of the colour scale."""
    return round(i * (len(STEPS) - 1) / max(1, n - 1))


def bits(body: Json, which: int) -> Figure:
    """Bits per weight of every matrix at one budget: roles down, layers across."""
    roles, columns = body["roles"], body["columns"]
    height = max(1.9, 0.75 + 0.19 * len(roles))  # the legend has up to eight lines
    figure, axes = _axes("layer", "", height)
    for r in range(len(roles)):
        for c in range(len(columns)):
            value = body["maps"][which]["bits"][r][c]
            if value is None:
                continue
            gid = f"at:maps/{which}/bits/{r}/{c}"
            box = Rectangle((c + 0.04, r + 0.06), 0.92, 0.88, gid=gid, linewidth=0)
            box.set_facecolor(STEPS[step_of(value)])
            axes.add_patch(box)
    axes.set_xlim(0, len(columns))
    axes.set_ylim(len(roles), 0)
    step = max(1, len(columns) // 10)
    shown = [i for i in range(len(columns)) if i % step == 0 or i == len(columns) - 1]
    axes.set_xticks([i + 0.5 for i in shown], [columns[i] for i in shown])
    axes.set_yticks([i + 0.5 for i in range(len(roles))], roles)
    axes.tick_params(length=0)
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    found = sorted({v for row in body["maps"][which]["bits"] for v in row if v is not None})
    keys = [Rectangle((0, 0), 1, 1, facecolor=STEPS[step_of(v)], linewidth=0) for v in found]
    names = [f"{v:.4g}" for v in found]
    figure.legend(keys, names, loc="outside right upper", title="bits", title_fontsize=8)
    return figure


def cache(body: Json) -> Figure:
    """Bytes of the KV cache over the context, for every type."""
    figure, axes = _axes("context, tokens", "KV cache, MiB")
    contexts = [row["context"] for row in body["cache"]]
    for k, kind in enumerate(body["cache"][0]["by_type"]):
        sizes = [row["by_type"][kind] / MIB for row in body["cache"]]
        axes.plot(contexts, sizes, color=SERIES[2 * k], label=kind)
        for i, size in enumerate(sizes):
            gid = f"at:cache/{i}/by_type/{kind}"
            axes.plot(contexts[i], size, "o", color=SERIES[2 * k], markersize=4, gid=gid)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:.0f}")
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:.4g}")
    axes.legend()
    return figure


def speed(body: Json) -> Figure | None:
    """Tokens per second that each device is predicted to decode."""
    rows = [(i, row) for i, row in enumerate(body["devices"]) if row["predicted"]]
    if not rows:
        return None
    figure, axes = _axes("decoded tokens per second, predicted", "", 0.8 + 0.24 * len(rows))
    for place, (i, row) in enumerate(rows):
        for key, colour, width in (
            ("decode_tokens_per_s", SERIES[2], 0.8),
            ("late_tokens_per_s", SERIES[0], 0.4),
        ):
            gid = f"at:devices/{i}/predicted/{key}"
            axes.barh(place, row["predicted"][key], width, color=colour, linewidth=0, gid=gid)
    axes.set_yticks(range(len(rows)), [row["device"]["name"] for _, row in rows])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    return figure


def trials(body: Json) -> Figure | None:
    """Tokens per second on this machine: predicted and measured, over budgets."""
    if not body["measured"]:
        return None
    checks = body["measured"]["checks"]
    figure, axes = _axes("budget, MiB", "decoded tokens per second")
    x = [check["trial"]["budget_bytes"] / MIB for check in checks]
    predicted = [check["decode_tokens_per_s"] for check in checks]
    axes.plot(x, predicted, color=LINE, label="predicted")
    for i, check in enumerate(checks):
        label = "measured" if i == 0 else None
        rate = check["trial"]["decode_tokens_per_s"]
        gid = f"at:measured/checks/{i}/trial/decode_tokens_per_s"
        axes.plot(x[i], rate, "o", color=ACCENT, markersize=6, label=label, gid=gid)
        gid = f"at:measured/checks/{i}/decode_tokens_per_s"
        axes.plot(x[i], predicted[i], "o", color=LINE, markersize=3.5, gid=gid)
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


def hits(body: Json) -> Figure | None:
    """Share of the experts asked for that a cache of so many per layer holds, by policy."""
    curves = body["experts"].get("hit_curves")
    if not curves:
        return None
    figure, axes = _axes("experts resident per layer", "hit rate")
    for k, curve in enumerate(curves):
        colour = SERIES[(2 * k) % 8]
        sizes, rates = curve["experts_per_layer"], curve["hit_rate"]
        axes.plot(sizes, rates, color=colour, label=curve["policy"])
        for i, (size, rate) in enumerate(zip(sizes, rates, strict=True)):
            gid = f"at:experts/hit_curves/{k}/hit_rate/{i}"
            axes.plot(size, rate, "o", color=colour, markersize=4, gid=gid)
    n = body["experts"]["n_experts"]
    axes.plot([0, n], [0, 1], color=INK, linewidth=1, linestyle=":", label="random routing")
    axes.set_ylim(0, 1.02)
    axes.legend(loc="lower right")
    return figure
