"""``edgekit.expert.*``: what is known of experts, as metadata of a GGUF.

Other readers pass over keys that they do not know. Tables are flat arrays, row after row.
"""

from collections.abc import Sequence

from gguf import GGUFValueType

from edgekit.exporters.gguf import TensorInfo, tensor_offsets
from edgekit.exporters.gguf_values import Value, array, f32, string, u32
from edgekit.routing.facts import is_expert_tensor
from edgekit.routing.trace import Json

PREFIX = "edgekit.expert."
_U32, _I32 = GGUFValueType.UINT32, GGUFValueType.INT32
_F32, _U64 = GGUFValueType.FLOAT32, GGUFValueType.UINT64


def expert_metadata(experts: Json) -> dict[str, Value]:
    """The manifest's ``experts`` as keys; none where nothing is known."""
    if not experts:
        return {}
    keys = {
        "count": u32(experts["n_experts"]),
        "used_count": u32(experts["n_used"]),
        "layers": array(_U32, experts["layers"]),
        "verdict": string(experts["verdict"]),
        "recommended.experts_per_layer": u32(experts["recommended"]["experts_per_layer"]),
        "recommended.hit_rate": f32(experts["recommended"]["hit_rate"]),
        "histogram": array(_U32, [n for row in experts["histogram"] for n in row]),
    }
    for name in ("next_token", "next_layer"):
        keys |= _transitions(name, experts[name])
    for curve in experts["hit_curves"]:
        name = f"hit_curve.{curve['policy']}"
        keys[f"{name}.experts_per_layer"] = array(_U32, curve["experts_per_layer"])
        keys[f"{name}.hit_rate"] = array(_F32, curve["hit_rate"])
    for row in experts["srp"]:
        name = f"srp.{row['segment']}"
        keys[name], keys[f"{name}.cache_ratio"] = f32(row["model"]), f32(row["cache_ratio"])
    for row in experts["sch"]:
        keys[f"sch.{row['segment']}.{row['rho']}"] = f32(row["model"])
    for name, value in experts["trace"].items():
        if isinstance(value, (int, str)):
            keys[f"trace.{name}"] = u32(value) if isinstance(value, int) else string(value)
    return {PREFIX + name: value for name, value in keys.items()}


def range_metadata(tensors: Sequence[TensorInfo], alignment: int) -> dict[str, Value]:
    """Where experts lie: of each tensor of experts the place in the data section, and the step.

    Expert ``e`` of ``tensors[i]`` is the bytes ``[offsets[i] + e * bytes[i], + bytes[i])`` behind
    the header. None where the model has no experts.
    """
    offsets = tensor_offsets(tensors, alignment)
    rows = [
        (tensor.name, offset, tensor.n_bytes // tensor.shape[0])
        for tensor, offset in zip(tensors, offsets, strict=True)
        if is_expert_tensor(tensor.name)
    ]
    if not rows:
        return {}
    names, starts, sizes = zip(*rows, strict=True)
    return {
        f"{PREFIX}tensors": array(GGUFValueType.STRING, list(names)),
        f"{PREFIX}offsets": array(_U64, list(starts)),
        f"{PREFIX}bytes": array(_U64, list(sizes)),
    }


def _transitions(name: str, tables: list[list[list[list[int]]]]) -> dict[str, Value]:
    """Likeliest successors as ``from, to, count`` triples; where each layer's begin."""
    triples, starts = list[int](), list[int]()
    for layer in tables:
        starts.append(len(triples))
        for expert, successors in enumerate(layer):
            for successor, count in successors:
                triples += [expert, successor, count]
    if not triples:
        return {}
    return {name: array(_I32, triples), f"{name}.starts": array(_U32, starts)}
