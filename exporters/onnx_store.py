"""Where the weights of a sliced model lie: planes and scales of every matrix in data files.

``depth2.bin`` holds what depth 2 needs, ``depth4.bin`` and ``depth8.bin`` what the depths above it
add: a depth reads the files up to its own, and of them its own bytes only.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.exporters.hashed_file import HashedFile
from edgekit.exporters.onnx_decoder import Array, Place, Quantized, Term

DEPTHS = (2, 4, 8)
ALIGNMENT = 64  # bytes, of every tensor in a data file


def data_name(depth: int) -> str:
    """The data file with what ``depth`` adds."""
    return f"depth{depth}.bin"


@dataclass(frozen=True)
class Plane:
    """What lifts a matrix to a depth: residual codes, and that depth's scales."""

    depth: int
    codes: Place
    scales: Place


@dataclass(frozen=True)
class Planes:
    """A matrix in planes, lowest depth first.

    Attributes:
        name: With ``.weight``.
        shape: ``(rows, cols)`` or ``(experts, rows, cols)``.
        block: Weights that share a scale.
        planes: Of 2, 2 and 4 bits for depths 2, 4, 8; or of 4 and 4 bits for depths 4 and 8.
    """

    name: str
    shape: tuple[int, ...]
    block: int
    planes: tuple[Plane, ...]

    @property
    def blocks(self) -> int:
        """Blocks in a row."""
        return -(-self.shape[-1] // self.block)

    @property
    def n_weights(self) -> int:
        """Weights, padding not counted."""
        return int(np.prod(self.shape))

    def depth(self, asked: int) -> int:
        """The depth of this matrix when the model is asked for one: its lowest, or more."""
        return max(asked, self.planes[0].depth)

    def at(self, asked: int) -> Quantized:
        """The matrix at a depth, as a sum of planes."""
        depth = self.depth(asked)
        own = [plane for plane in self.planes if plane.depth <= depth]
        terms = [
            Term(
                bits=plane_bits(self.planes[0].depth, plane.depth),
                codes=self._codes(plane),
                scales=self._scales(own[-1]),
                factor=1 << (depth - plane.depth),
            )
            for plane in own
        ]
        return Quantized(self.shape, self.block, tuple(terms))

    def code_bytes(self, bits: int) -> int:
        """Bytes of codes of that many bits each."""
        return int(np.prod(self.shape[:-1])) * self.blocks * self.block * bits // 8

    @property
    def scale_bytes(self) -> int:
        """Bytes of one depth's scales, float16."""
        return int(np.prod(self.shape[:-1])) * self.blocks * 2

    def _codes(self, plane: Plane) -> Array:
        bits = plane_bits(self.planes[0].depth, plane.depth)
        shape = (*self.shape[:-1], self.blocks, self.block * bits // 8)
        return Array(shape, "uint8", plane.codes)

    def _scales(self, plane: Plane) -> Array:
        return Array((*self.shape[:-1], self.blocks), "float16", plane.scales)


def plane_bits(lowest: int, depth: int) -> int:
    """Bits of the residual codes that lift a matrix to ``depth``."""
    return depth if depth == lowest else depth // 2


Stored = Planes | Array
Store = Mapping[str, Stored]


def weights_at(store: Store, depth: int) -> dict[str, Array | Quantized]:
    """Every tensor at a depth, for `onnx_model.build`."""
    return {
        name: item.at(depth) if isinstance(item, Planes) else item for name, item in store.items()
    }


class DataFile(HashedFile):
    """A file of tensors, each at an aligned offset."""

    def begin(self) -> int:
        """Pad to the next aligned offset, and give it."""
        self.write(bytes(-self.n_bytes % ALIGNMENT))
        return self.n_bytes

    def append(self, array: npt.NDArray[Any]) -> None:
        """Append an array's bytes."""
        self.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)

    def end(self, start: int) -> Place:
        """What was appended since ``start``."""
        return Place(self.path.name, start, self.n_bytes - start)

    def add(self, array: npt.NDArray[Any]) -> Array:
        """Append one tensor at the next aligned offset."""
        start = self.begin()
        self.append(array)
        return Array(array.shape, array.dtype.name, self.end(start))
