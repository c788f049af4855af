"""The type that flows through edgekit: a tensor as a stack of levels.

A *level* holds the bytes that lift a tensor from one tier to the next; level 0 stands alone. The
*depth* of a tensor is how many of its levels are loaded. The bytes themselves stay in their files.
"""

from dataclasses import dataclass, field

from edgekit.errors import UsageError

SOURCE = "source"  # the tier that gives back the original values, whatever their type


@dataclass(frozen=True)
class FileRecord:
    """A file of the artifact: plain name, size in bytes, sha256 of all of it."""

    name: str
    n_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Part:
    """A byte range of a file, ``offset`` from its start, with the hash of its content."""

    offset: int
    n_bytes: int
    sha256: str

    @property
    def end(self) -> int:
        """The first byte after the part."""
        return self.offset + self.n_bytes


@dataclass(frozen=True, slots=True)
class Level:
    """What lifts one tensor from ``parent`` to ``tier``.

    Attributes:
        tensor: GGUF name of the tensor.
        tier: ggml type reached (``Q4_K``), ``source``, or a step of the codec `bitstack` (``B3``).
        parent: Tier this level needs, ``None`` for level 0, which lies in the base GGUF.
        codec: Codec that wrote the parts; ``ggml`` for level 0 (plain blocks).
        parts: One part, or one per expert, in file order.
        loss: Loss of quality left at this tier; 0 at ``source``. Unit: see the manifest's
            ``statistics``.
        type: ggml type that the tensor becomes for llama.cpp at a tier that is none itself, else
            empty.
    """

    tensor: str
    tier: str
    parent: str | None
    codec: str
    parts: tuple[Part, ...]
    loss: float
    type: str = ""

    @property
    def n_bytes(self) -> int:
        """Stored bytes of all parts, without the padding between them."""
        return sum(part.n_bytes for part in self.parts)

    @property
    def end(self) -> int:
        """The first byte after the last part."""
        return self.parts[-1].end


@dataclass(frozen=True, slots=True)
class Stack:
    """A tensor and its levels, lowest first.

    Attributes:
        name: GGUF name.
        shape: Numpy order, ``(rows, cols)``, ``(experts, rows, cols)`` or ``(n,)``.
        source_type: ggml type of the ``source`` tier.
        levels: At least one; each one's parent is the tier of the one before it.
    """

    name: str
    shape: tuple[int, ...]
    source_type: str
    levels: tuple[Level, ...] = field(repr=False)

    @property
    def tiers(self) -> tuple[str, ...]:
        """The tiers this tensor can have, lowest first."""
        return tuple(level.tier for level in self.levels)

    @property
    def cols(self) -> int:
        """Row length in weights."""
        return self.shape[-1]

    @property
    def n_experts(self) -> int:
        """Experts that can be read alone; 1 for a dense tensor."""
        return self.shape[0] if len(self.shape) == 3 else 1

    @property
    def n_rows(self) -> int:
        """Rows of one expert."""
        return self.n_weights // self.cols // self.n_experts

    @property
    def n_weights(self) -> int:
        """Number of elements."""
        n = 1
        for size in self.shape:
            n *= size
        return n

    def type_at(self, tier: str) -> str:
        """The ggml type that the tensor's blocks have at ``tier``."""
        if tier == SOURCE:
            return self.source_type
        return next((lv.type for lv in self.levels if lv.tier == tier and lv.type), tier)

    def depth_of(self, tier: str) -> int:
        """How many levels must be loaded for ``tier``.

        Raises:
            UsageError: The stack has no such tier.
        """
        if tier not in self.tiers:
            raise UsageError(
                f"{self.name} has no tier {tier}; choose one it has: {', '.join(self.tiers)}"
            )
        return self.tiers.index(tier) + 1
