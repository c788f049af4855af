"""What an artifact offers, told by its manifest alone: enough to plan with, without a weight."""

from dataclasses import replace
from pathlib import Path

from edgekit.errors import RefusedError, UsageError
from edgekit.manifest import MANIFEST_NAME, Manifest, Order
from edgekit.manifest_reader import loads
from edgekit.stack import Stack

MAX_MANIFEST_BYTES = 1 << 30


def open_catalog(folder: Path) -> "Catalog":
    """Read the manifest in ``folder`` only: what a plan needs, without a weight on disk.

    Where the base is on disk, levels that are not count as missing; where it is not, nothing was
    downloaded yet, and all levels count.

    Raises:
        UsageError: The folder holds no artifact.
        RefusedError: The manifest is corrupt.
    """
    manifest = require_gguf(folder, read_manifest(folder))
    base, levels = (folder / record.name for record in (manifest.base, manifest.levels))
    if not base.is_file() and not levels.is_file():
        return Catalog(folder, manifest, manifest.levels.n_bytes)
    return Catalog(folder, manifest, levels.stat().st_size if levels.is_file() else 0)


def require_gguf(folder: Path, manifest: Manifest) -> Manifest:
    """The manifest of an artifact that llama.cpp can run.

    Raises:
        UsageError: It was converted for ONNX Runtime only.
    """
    if not manifest.has_gguf:
        raise UsageError(
            f"{folder} has nothing for llama.cpp; use --runtime onnx, or convert with "
            "--format gguf,onnx"
        )
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest in ``folder``; errors as `open_catalog`."""
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise UsageError(
            f"{folder} holds no {MANIFEST_NAME}; make an artifact with: edgekit convert"
        )
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise RefusedError(f"{path} has {path.stat().st_size} bytes, more than any manifest")
    return loads(path.read_bytes())


class Catalog:
    """What an artifact offers, by its manifest.

    Attributes:
        folder: Where it lies.
        manifest: What ``edgekit.json`` says.
        stacks: The tensors with the levels that are whole within ``levels_bytes``.
        levels_bytes: Bytes of ``.levels`` that are here, perhaps fewer than were written.
    """

    def __init__(self, folder: Path, manifest: Manifest, levels_bytes: int) -> None:
        """Take a manifest that has been checked."""
        self.folder, self.manifest, self.levels_bytes = folder, manifest, levels_bytes
        self.stacks = tuple(_whole(stack, levels_bytes) for stack in manifest.stacks)
        self._by_name = {stack.name: stack for stack in self.stacks}

    @property
    def chunk(self) -> int:
        """Weights of a layer's matrices that are decoded at once, at most."""
        most = self.manifest.chunk_weights
        layers = (s for s in self.stacks if s.name.startswith("blk."))
        sizes = (min(s.n_weights // s.n_experts, max(s.cols, most)) for s in layers)
        return max(sizes, default=most)

    def stack(self, name: str) -> Stack:
        """The stack of tensor ``name``, with the levels that are here."""
        return self._by_name[name]

    def order(self, which: Order) -> Order:
        """A load order of the manifest without the levels that are not here."""
        here = {(level.tensor, level.tier) for stack in self.stacks for level in stack.levels}
        return tuple(key for key in which if key in here)


def _whole(stack: Stack, levels_bytes: int) -> Stack:
    depth = 1
    while depth < len(stack.levels) and stack.levels[depth].end <= levels_bytes:
        depth += 1
    return replace(stack, levels=stack.levels[:depth])


def runtime_of(folder: Path) -> str:
    """The runtime that an artifact was made for: ``llama`` where it has a GGUF."""
    return "llama" if read_manifest(folder).has_gguf else "onnx"
