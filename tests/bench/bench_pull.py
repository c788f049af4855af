"""What ``edgekit pull`` fetches that the plan for the budget does not load, over all depths.

    python tests/bench/bench_pull.py ARTIFACT... [--sizes 39]

In percent of the base and the levels that are loaded, at sizes of weights spread between the lowest
and the highest depth: all that is passed over, and of it what the two load orders alone make, had
the plan stopped at the first level that no longer fits instead of filling the rest with smaller
ones. Then the loss, by the manifest's numbers, of a plan that has the levels up to there only, as a
multiple of the plan's. Nothing is transferred: manifests tell it all. Prints a JSON line last.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from edgekit.catalog import Catalog, open_catalog
from edgekit.planner import Depths, fill, resident_bytes, resident_step, uniform
from edgekit.pull import levels_prefix, passed_over


def strictly(catalog: Catalog, weights_bytes: int) -> Depths:
    """The depths that the resident order reaches up to its first level that does not fit."""
    names = {stack.name: stack for stack in catalog.stacks}
    left = weights_bytes - uniform(catalog.stacks, lambda stack: stack.tiers[0]).weights_bytes
    order = catalog.manifest.resident_order
    for n, (name, tier) in enumerate(order):
        left -= resident_step(names[name], names[name].tiers.index(tier))
        if left < 0:
            return fill(catalog.stacks, order[:n], weights_bytes)
    return fill(catalog.stacks, order, weights_bytes)


def share(catalog: Catalog, depths: Depths) -> float:
    """Bytes passed over, in percent of the base and the levels that are loaded."""
    stop = levels_prefix(catalog, depths)
    unused = passed_over(catalog, depths, stop)
    return 100 * unused / (catalog.manifest.base.n_bytes + stop - unused)


def times_loss(catalog: Catalog, weights_bytes: int) -> float:
    """The loss without the levels behind the first that does not fit, by the loss with them."""
    stop = levels_prefix(catalog, strictly(catalog, weights_bytes))
    losses = []
    for here in (Catalog(catalog.folder, catalog.manifest, stop), catalog):
        order = here.order(here.manifest.resident_order)
        depths = fill(here.stacks, order, weights_bytes)
        tiers = ((stack, stack.depth_of(depths.tier(stack.name))) for stack in here.stacks)
        losses.append(sum(stack.levels[depth - 1].loss for stack, depth in tiers))
    return losses[0] / losses[1]


def spread(values: list[float]) -> dict[str, float]:
    """Median, the ninth of ten, the most."""
    ninth = statistics.quantiles(values, n=10)[-1]
    found = {"median": statistics.median(values), "p90": ninth, "most": max(values)}
    return {name: round(value, 2) for name, value in found.items()}


def measure(catalog: Catalog, n_sizes: int) -> dict[str, dict[str, float]]:
    """Both shares of one artifact, percent, and the loss, a ratio."""
    lowest, highest = (
        sum(resident_bytes(stack, stack.tiers[end]) for stack in catalog.stacks) for end in (0, -1)
    )
    sizes = [lowest + (highest - lowest) * i // (n_sizes + 1) for i in range(1, n_sizes + 1)]
    filled = [fill(catalog.stacks, catalog.manifest.resident_order, size) for size in sizes]
    return {
        "all": spread([share(catalog, depths) for depths in filled]),
        "orders alone": spread([share(catalog, strictly(catalog, size)) for size in sizes]),
        "times the loss": spread([times_loss(catalog, size) for size in sizes]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("artifacts", nargs="+", type=Path)
    parser.add_argument("--sizes", type=int, default=39)
    options = parser.parse_args()
    found: dict[str, Any] = {}
    for path in options.artifacts:
        catalog = open_catalog(path)
        name = catalog.manifest.name
        found[name] = measure(catalog, options.sizes)
        for kind, row in found[name].items():
            told = ", ".join(f"{key} {value}" for key, value in row.items())
            print(f"{name}, {kind}: {told}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
