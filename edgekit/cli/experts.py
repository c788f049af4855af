"""What is known of a model's experts, as tables."""

from math import nan
from typing import Any

from edgekit.cli.console import note, print_table


def print_experts(experts: dict[str, Any]) -> None:
    """Hit rates by size of cache, SRP and SCH, and the verdict, as far as they are told."""
    curves = experts["hit_curves"]
    sizes = curves[0]["experts_per_layer"] if curves else ()
    rows = [(c["policy"], *(f"{rate:.1%}" for rate in c["hit_rate"])) for c in curves]
    n, used = experts["n_experts"], experts["n_used"]
    print_table(
        f"Hit rate of a cache, in experts per layer ({used} of {n} are used by a token)",
        ("policy", *map(str, sizes)),
        rows,
    )
    sch = {(row["segment"], row["rho"]): row["model"] for row in experts.get("sch", ())}
    rhos = sorted({rho for _, rho in sch})
    consistency = [
        (
            row["segment"],
            f"{row['model']:.3f}",
            f"{row['cache_ratio']:.2f}",
            *(f"{sch.get((row['segment'], rho), nan):.3f}" for rho in rhos),
        )
        for row in experts.get("srp", ())
    ]
    columns = ("segment", "SRP", "cache ratio", *(f"SCH, rho {rho}" for rho in rhos))
    print_table("How local routing is", columns, consistency)
    trace = experts.get("trace", {})
    note(
        f"traced: {trace.get('n_tokens', 'unknown')} tokens of {trace.get('text', 'unknown')} "
        f"({trace.get('runtime', 'unknown')}); the tenth of the experts used most takes "
        f"{experts.get('top_share', nan):.0%}"
    )
    note(experts["verdict"])
