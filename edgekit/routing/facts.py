"""The ``experts`` field of a manifest, read back as untrusted input."""

from typing import Any

from edgekit.errors import RefusedError

MAX_LAYERS, MAX_EXPERTS = 1 << 12, 1 << 16
Json = dict[str, Any]


def check_experts(experts: Json) -> Json:
    """Give ``experts`` back, what is read of it checked; one that is empty knows nothing.

    Raises:
        RefusedError: A field that planning reads is missing or out of range.
    """
    if not experts:
        return experts
    n = _count(experts, "n_experts", MAX_EXPERTS)
    used = _count(experts, "n_used", n)
    for curve in _objects(experts, "hit_curves"):
        sizes, rates = curve.get("experts_per_layer"), curve.get("hit_rate")
        is_sound = (
            isinstance(sizes, list)
            and isinstance(rates, list)
            and len(sizes) == len(rates) > 0
            and all(type(size) is int and used <= size <= n for size in sizes)
            and sorted(set(sizes)) == sizes
            and all(isinstance(rate, (int, float)) and 0 <= rate <= 1 for rate in rates)
            and isinstance(curve.get("policy"), str)
        )
        if not is_sound:
            raise RefusedError("edgekit.json: a hit curve of experts is no list of sizes and rates")
    if len({tuple(curve["experts_per_layer"]) for curve in experts["hit_curves"]}) > 1:
        raise RefusedError("edgekit.json: hit curves of experts are told for different sizes")
    if not isinstance(experts.get("verdict"), str):
        raise RefusedError("edgekit.json: experts need a 'verdict' in words")
    recommended = experts.get("recommended")
    if not isinstance(recommended, dict):
        raise RefusedError("edgekit.json: experts need a 'recommended' cache")
    _count(recommended, "experts_per_layer", n)
    return experts


def hit_rate(experts: Json, cache: float, policy: str = "pool") -> float | None:
    """The hit rate of a cache of so many experts per layer, interpolated; ``None``: unknown."""
    curve = next((row for row in experts.get("hit_curves", ()) if row["policy"] == policy), None)
    if curve is None:
        return None
    points = list(zip(curve["experts_per_layer"], curve["hit_rate"], strict=True))
    below = [p for p in points if p[0] <= cache] or points[:1]
    above = [p for p in points if p[0] >= cache] or points[-1:]
    (x0, y0), (x1, y1) = below[-1], above[0]
    return float(y0 if x1 <= x0 else y0 + (y1 - y0) * (cache - x0) / (x1 - x0))


def _count(obj: Json, key: str, most: int) -> int:
    value = obj.get(key)
    if type(value) is not int or not 1 <= value <= most:
        raise RefusedError(f"edgekit.json: experts' {key} is {value!r:.40}, needs 1 to {most}")
    return value


def _objects(obj: Json, key: str) -> list[Json]:
    rows = obj.get(key)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise RefusedError(f"edgekit.json: experts' {key} needs a list of objects")
    return rows
