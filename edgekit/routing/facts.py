"""The ``experts`` field of a manifest, read back as untrusted input."""

from typing import Any

from edgekit.errors import RefusedError

MAX_LAYERS, MAX_EXPERTS, MAX_COUNT = 1 << 12, 1 << 16, 1 << 40
NUMBERS = {"srp": ("segment", "model", "cache_ratio"), "sch": ("segment", "rho", "model")}
Json = dict[str, Any]


def check_experts(experts: Json) -> Json:
    """Give ``experts`` back, what is read of it checked; one that is empty knows nothing.

    Sizes, hit curves, the verdict and the recommended cache are needed; the rest may be absent.

    Raises:
        RefusedError: A field is missing, of another kind or out of range.
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
    _check_told({"srp": [], "sch": [], "trace": {}, "top_share": 0.0} | experts)
    if not _is_table({"layers": [], "next_layer": []} | experts, n):
        raise RefusedError("edgekit.json: experts' next_layer is no table of experts and counts")
    return experts


def _check_told(experts: Json) -> None:
    """What is only shown."""
    for name, keys in NUMBERS.items():
        if not all(_is_number(row.get(key)) for row in _objects(experts, name) for key in keys):
            raise RefusedError(f"edgekit.json: experts' {name} needs numbers {', '.join(keys)}")
    if not isinstance(experts["trace"], dict):
        raise RefusedError("edgekit.json: experts' trace is no object")
    if not _is_number(experts["top_share"]):
        raise RefusedError("edgekit.json: experts' top_share is no number")


def _is_table(experts: Json, n: int) -> bool:
    """Whether ``next_layer`` has pairs of an expert and a count for each of ``n`` experts."""
    layers, tables = experts["layers"], experts["next_layer"]
    return (
        isinstance(layers, list)
        and all(type(layer) is int for layer in layers)
        and isinstance(tables, list)
        and len(tables) <= len(layers) <= MAX_LAYERS
        and all(isinstance(table, list) and len(table) == n for table in tables)
        and all(isinstance(pairs, list) for table in tables for pairs in table)
        and all(_is_successor(pair, n) for table in tables for pairs in table for pair in pairs)
    )


def _is_successor(pair: object, n: int) -> bool:
    if not isinstance(pair, list) or len(pair) != 2 or any(type(item) is not int for item in pair):
        return False
    return 0 <= pair[0] < n and 0 <= pair[1] <= MAX_COUNT


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


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


def is_expert_tensor(name: str) -> bool:
    """Whether a GGUF name is that of a 3-D tensor of experts' weights."""
    return name.endswith("_exps.weight")
