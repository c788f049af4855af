"""Codecs turn a weight into a stack of levels and back."""

from collections.abc import Collection
from typing import Protocol

from edgekit.codecs import nested
from edgekit.kernels.ggml import ByteArray


class Codec(Protocol):
    """What a codec's module offers; see `edgekit.codecs.nested` for the exact terms."""

    @property
    def CHILDREN(self) -> Collection[str]:
        """Types that a level can lead to."""

    def encode_chunk(
        self, parent_type: str, child_type: str, parent: ByteArray, child: ByteArray
    ) -> bytes:
        """Encode a chunk of weights in ``child_type``, given them in ``parent_type``."""

    def decode_chunk(
        self,
        parent_type: str,
        child_type: str,
        parent: ByteArray,
        payload: bytes | bytearray | memoryview,
        n_weights: int,
    ) -> ByteArray:
        """Give back the child's blocks."""


CODECS: dict[str, Codec] = {"nested": nested}
