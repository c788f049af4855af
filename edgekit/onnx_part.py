"""What an artifact holds for ONNX Runtime: files, depths, and the place of every tensor.

The files lie in the artifact's folder ``onnx/``; what is told of them stands in ``edgekit.json``
under ``onnx``. Planning and composing whole codes read this, not the graphs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from edgekit.errors import RefusedError
from edgekit.exporters.onnx_decoder import Array, Place
from edgekit.exporters.onnx_store import DEPTHS, Plane, Planes, Stored, data_name, plane_bits
from edgekit.kernels.slices import BLOCKS
from edgekit.stack import FileRecord

FOLDER = "onnx"
LARGEST = 1 << 40
CHAINS = ((2, 4, 8), (4, 8))
Json = dict[str, Any]


def graph_name(depth: int) -> str:
    """The graph of a depth."""
    return f"model_d{depth}.onnx"


@dataclass(frozen=True)
class Facts:
    """What memory follows from; counts, ``head`` and ``hidden`` are widths."""

    n_layers: int
    n_heads: int
    n_kv_heads: int
    head: int
    hidden: int
    feed_forward: int
    vocab: int
    context: int


@dataclass(frozen=True)
class OnnxPart:
    """The model as ONNX Runtime loads it.

    Attributes:
        block: Weights that share a scale, where rows allow it.
        facts: Of the model.
        files: Every file in the folder.
        store: Every tensor by name.
        errors: Depth -> relative error of the nested codes, and of codes for that depth alone.
    """

    block: int
    facts: Facts
    files: tuple[FileRecord, ...]
    store: Mapping[str, Stored]
    errors: Mapping[int, tuple[float, float]]

    @property
    def matrices(self) -> tuple[Planes, ...]:
        """All matrices in planes."""
        return tuple(item for item in self.store.values() if isinstance(item, Planes))

    @property
    def n_weights(self) -> int:
        """Weights of all matrices."""
        return sum(matrix.n_weights for matrix in self.matrices)

    def file(self, name: str) -> FileRecord:
        """What is told of a file."""
        return next(record for record in self.files if record.name == name)

    def depth_bytes(self, depth: int) -> int:
        """Bytes of the data files that a depth reads."""
        total = 0
        for item in self.store.values():
            if isinstance(item, Array):
                total += item.place.n_bytes
                continue
            whole = item.at(depth)
            total += sum(term.codes.place.n_bytes for term in whole.terms)
            total += whole.terms[-1].scales.place.n_bytes
        return total

    def to_json(self) -> Json:
        """As it stands in the manifest."""
        return {
            "folder": FOLDER,
            "block": self.block,
            "facts": {field.name: getattr(self.facts, field.name) for field in fields(Facts)},
            "depths": [
                {
                    "depth": depth,
                    "graph": graph_name(depth),
                    "bytes": self.depth_bytes(depth),
                    "error": _rounded(self.errors[depth][0]),
                    "dedicated_error": _rounded(self.errors[depth][1]),
                }
                for depth in DEPTHS
            ],
            "files": [{"file": r.name, "bytes": r.n_bytes, "sha256": r.sha256} for r in self.files],
            "arrays": [
                {"name": name, "shape": list(item.shape), "place": _place_json(item.place)}
                for name, item in self.store.items()
                if isinstance(item, Array)
            ],
            "matrices": [_matrix_json(item) for item in self.matrices],
        }


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def _place_json(place: Place) -> list[Any]:
    return [place.file, place.offset, place.n_bytes]


def _matrix_json(item: Planes) -> Json:
    return {
        "name": item.name,
        "shape": list(item.shape),
        "block": item.block,
        "planes": [
            {"depth": p.depth, "codes": _place_json(p.codes), "scales": _place_json(p.scales)}
            for p in item.planes
        ],
    }


def read_part(body: Json, files: tuple[FileRecord, ...]) -> OnnxPart:
    """Check what the manifest tells under ``onnx``; ``files`` have been checked.

    Raises:
        RefusedError: A field is missing or out of range, or a tensor lies outside of its file.
    """
    try:
        facts = Facts(**{f.name: _count(body["facts"][f.name]) for f in fields(Facts)})
        sizes = {record.name: record.n_bytes for record in files}
        store: dict[str, Stored] = {}
        for row in body["arrays"]:
            store[_name(row, store)] = _array(row, sizes)
        for row in body["matrices"]:
            store[_name(row, store)] = _matrix(row, sizes)
        errors = {row["depth"]: (_real(row["error"]), _real(row["dedicated_error"]))
                  for row in body["depths"]}  # fmt: skip
        block = body["block"]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise RefusedError(
            f"edgekit.json: what it tells of the ONNX files is damaged ({error!r:.80}); get the "
            "artifact again"
        ) from error
    graphs = {graph_name(depth) for depth in DEPTHS} | {data_name(depth) for depth in DEPTHS}
    if body.get("folder") != FOLDER or block not in BLOCKS or tuple(errors) != DEPTHS:
        raise RefusedError("edgekit.json: its ONNX part has another layout than this edgekit reads")
    if graphs - set(sizes):
        raise RefusedError(f"edgekit.json: its ONNX part has no {min(graphs - set(sizes))}")
    return OnnxPart(block, facts, files, store, errors)


def _count(value: object) -> int:
    if type(value) is not int or not 0 < value < LARGEST:
        raise ValueError(f"{value!r} is no count")
    return value


def _real(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e6:
        raise ValueError(f"{value!r} is no error")
    return float(value)


def _name(row: Json, taken: Mapping[str, Stored]) -> str:
    name = row["name"]
    if not isinstance(name, str) or not name.isprintable() or name in taken:
        raise ValueError(f"{name!r:.80} is no name, or stands twice")
    return name


def _shape(row: Json, least: int) -> tuple[int, ...]:
    shape = tuple(map(_count, row["shape"]))
    if not least <= len(shape) <= 3:
        raise ValueError(f"{row['name']!r:.80} has the shape {shape}")
    return shape


def _place(value: Any, sizes: Mapping[str, int], n_bytes: int) -> Place:
    file, offset, told = value
    if told != n_bytes or type(offset) is not int or not 0 <= offset <= sizes[file] - n_bytes:
        raise ValueError(f"{file!r:.40} does not hold {n_bytes} bytes at {offset!r:.40}")
    return Place(file, offset, n_bytes)


def _array(row: Json, sizes: Mapping[str, int]) -> Array:
    shape = _shape(row, 1)
    n_bytes = 4
    for extent in shape:
        n_bytes *= extent
    return Array(shape, "float32", _place(row["place"], sizes, n_bytes))


def _matrix(row: Json, sizes: Mapping[str, int]) -> Planes:
    shape, block = _shape(row, 2), row["block"]
    if block not in BLOCKS:
        raise ValueError(f"blocks of {block!r:.40}")
    depths = tuple(plane["depth"] for plane in row["planes"])
    if depths not in CHAINS:
        raise ValueError(f"depths {depths!r:.40}")
    sized = Planes(row["name"], shape, block, ())
    planes = tuple(
        Plane(
            depth,
            _place(plane["codes"], sizes, sized.code_bytes(plane_bits(depths[0], depth))),
            _place(plane["scales"], sizes, sized.scale_bytes),
        )
        for depth, plane in zip(depths, row["planes"], strict=True)
    )
    return Planes(row["name"], shape, block, planes)
