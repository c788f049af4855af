"""Draw what a budget buys: KL divergence to the source over the bytes of the weights.

    python tests/bench/plot_budget_quality.py demo/tiny-llama -o docs/budget-quality.svg

Reads the measured rows of an artifact's manifest. The picture is readable on white and on black.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

INK, LINE = "#808080", "#3b82c4"  # contrast of 3.9 or more on white and on black
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "edgekit",  # the same file for the same figures
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def main() -> None:
    """Read the manifest, write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    manifest = json.loads((args.artifact / "edgekit.json").read_text(encoding="utf-8"))
    draw(manifest["name"], manifest["quality"], args.output)


def draw(name: str, quality: list[dict[str, Any]], output: Path) -> None:
    """Draw the rows of ``quality`` below the source, whose divergence is zero."""
    rows = [row for row in quality if row["kl_mean"] > 1e-7]
    sizes = [row["weights_bytes"] / 2**20 for row in rows]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.2, 3.4))
        axes.plot(sizes, [row["kl_mean"] for row in rows], "o-", color=LINE, markersize=4)
        axes.set_yscale("log")
        axes.set_xlabel(f"weights in memory, MiB ({name}, one artifact)")
        axes.set_ylabel("KL divergence to the source")
        top = axes.secondary_xaxis("top", functions=_bits(rows[0]))
        top.set_xlabel("bits per weight")
        axes.grid(visible=True, color=INK, alpha=0.25, linewidth=0.5)
        figure.tight_layout()
        figure.savefig(output, transparent=True, metadata={"Date": None})
        plt.close(figure)


def _bits(row: dict[str, Any]) -> tuple[Any, Any]:
    """MiB to bits per weight and back."""
    ratio = row["bits_per_weight"] / (row["weights_bytes"] / 2**20)
    return (lambda mib: mib * ratio), (lambda bits: bits / ratio)


if __name__ == "__main__":
    main()
