"""The text under the pointer: what a mark stands for, in the numbers and units of the tables."""

from collections.abc import Callable
from typing import Any

from edgekit.manifest import Json
from edgekit.report.numbers import Path, value_at, written


def describe(body: Json, path: Path) -> str:
    """The text of the mark whose numbers are at ``path``."""
    return _KINDS[str(path[0])](body, path)


def _told(row: Any, *parts: tuple[str, str, str]) -> str:
    """``weights 1.82 MiB, KL 0.16``: label, path below the row, unit."""
    found = ((label, value_at(row, key.split("/")), unit) for label, key, unit in parts)
    return ", ".join(f"{label} {written(value, unit)}".strip() for label, value, unit in found)


def _quality(body: Json, path: Path) -> str:
    row = value_at(body, path)
    return "measured: " + _told(
        row,
        ("weights", "weights_bytes", "size"),
        ("bits per weight", "bits_per_weight", "bits"),
        ("KL", "kl_mean", "kl"),
        ("perplexity", "ppl", "ppl"),
    )


def _peers(body: Json, path: Path) -> str:
    row = value_at(body, path)
    told = _told(row, ("weights", "weights_bytes", "size"), ("KL", "kl_mean", "kl"))
    return f"{row['tool']} {row['name']}, measured: {told}"


PARTS = {"kv_bytes": "KV cache", "compute_bytes": "compute", "overhead_bytes": "process"}


def _budgets(body: Json, path: Path) -> str:
    row, last = value_at(body, path[:2]), str(path[-1])
    name, size = PARTS.get(last, last), written(value_at(body, path), "size")
    return f"{name} {size}; " + _told(
        row,
        ("budget", "budget_bytes", "size"),
        ("used", "total_bytes", "size"),
        ("expected KL", "expected_kl", "kl"),
    )


def _maps(body: Json, path: Path) -> str:
    _, _, _, role, column = path
    bits = written(value_at(body, path), "bits")
    return f"{body['roles'][role]}, layer {body['columns'][column]}: {bits} bits per weight"


def _cache(body: Json, path: Path) -> str:
    row, kind = value_at(body, path[:2]), str(path[-1])
    size = written(value_at(body, path), "size")
    return f"{kind}: {size} for {written(row['context'], 'count')} tokens"


def _devices(body: Json, path: Path) -> str:
    row = value_at(body, path[:2])
    when = "context full" if path[-1] == "late_tokens_per_s" else "at the start"
    rate = written(value_at(body, path), "rate")
    return f"{row['device']['name']}, predicted, {when}: {rate}; " + _told(
        row["plan"], ("weights", "weights_bytes", "size"), ("expected KL", "expected_kl", "kl")
    )


def _measured(body: Json, path: Path) -> str:
    check = value_at(body, path[:3])
    kind = "measured" if "trial" in path else "predicted"
    rate = written(value_at(body, path), "rate")
    return f"{kind}: {rate}; " + _told(check, ("budget", "trial/budget_bytes", "size"))


def _experts(body: Json, path: Path) -> str:
    curve = value_at(body, path[:3])
    size = written(curve["experts_per_layer"][path[-1]], "count")
    rate = written(value_at(body, path), "share")
    return f"{curve['policy']}: {rate} with {size} experts per layer"


_KINDS: dict[str, Callable[[Json, Path], str]] = {
    "quality": _quality,
    "peers": _peers,
    "budgets": _budgets,
    "maps": _maps,
    "cache": _cache,
    "devices": _devices,
    "measured": _measured,
    "experts": _experts,
}
