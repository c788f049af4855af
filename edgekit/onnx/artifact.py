"""The ONNX part of an artifact, opened for reading: nothing leaves here before it was checked."""

import hashlib
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import fields
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.arch.config import find_arch, read_hyper
from edgekit.arch.decoder import decoder_of
from edgekit.catalog import read_manifest
from edgekit.checkpoint import contained, read_json
from edgekit.errors import RefusedError, UsageError
from edgekit.exporters.onnx_configs import CONFIG
from edgekit.exporters.onnx_decoder import Decoder, Place
from edgekit.exporters.onnx_store import DEPTHS, data_name
from edgekit.manifest import Manifest
from edgekit.onnx_part import FOLDER, Facts, OnnxPart, graph_name
from edgekit.receipts import Receipt
from edgekit.stack import FileRecord, Part

HASH_BYTES = 1 << 22


def open_onnx(folder: Path, depth: int = DEPTHS[-1], *, remember: bool = False) -> "OnnxArtifact":
    """Open the ONNX part of the artifact in ``folder`` and check what ``depth`` needs.

    Args:
        folder: Of the artifact.
        depth: Files of depths above it are not looked at.
        remember: Do not hash again what was found sound before, and keep what is found sound now.

    Raises:
        UsageError: There is no artifact, or it has no ONNX part.
        RefusedError: A file is missing, cut, corrupt, or leads elsewhere.
    """
    manifest, part = described(folder)
    artifact = OnnxArtifact(folder, manifest, part)
    artifact.check(depth, remember=remember)
    return artifact


def described(folder: Path) -> tuple[Manifest, OnnxPart]:
    """What the manifest in ``folder`` tells; the files need not be there.

    Raises:
        UsageError: There is no artifact, or nothing for ONNX Runtime in it.
    """
    manifest = read_manifest(folder)
    if manifest.onnx is None:
        raise UsageError(
            f"{folder} has nothing for ONNX Runtime; add it with: edgekit export {folder} "
            "--format onnx"
        )
    return manifest, manifest.onnx


class OnnxArtifact:
    """Files for ONNX Runtime in an artifact.

    Attributes:
        folder: The artifact's; ``files``: where the ONNX files are.
        manifest, part: What is told of them.
    """

    def __init__(self, folder: Path, manifest: Manifest, part: OnnxPart) -> None:
        """Take a manifest that has been checked."""
        self.folder, self.files = folder, folder / FOLDER
        self.manifest, self.part = manifest, part
        if not self.files.exists():
            raise RefusedError(
                f"{self.files} is not here; copy it from where the artifact came, or run llama.cpp"
            )
        root = self.files.resolve()
        if not root.is_dir() or not root.is_relative_to(folder.resolve()):
            raise RefusedError(f"{self.files} is no folder of the artifact; get the artifact again")

    @property
    def depths(self) -> tuple[int, ...]:
        """Those whose data files are here; the lowest is always needed."""
        here = takewhile(lambda depth: (self.files / data_name(depth)).exists(), DEPTHS)
        return tuple(here) or DEPTHS[:1]

    def check(self, depth: int, *, remember: bool = False) -> None:
        """Check size, hash and content of every file that ``depth`` needs.

        Raises:
            RefusedError: One is missing, cut, corrupt, or leads elsewhere.
        """
        later = {name(d) for d in DEPTHS if d > depth for name in (data_name, graph_name)}
        needed = [record for record in self.part.files if record.name not in later]
        for record in needed:
            self._check_file(record, remember)
        self._check_graphs(needed)

    @property
    def missing(self) -> tuple[FileRecord, ...]:
        """Files of deeper depths that are not here; the depths below run without them."""
        deeper = {name(d) for d in DEPTHS[1:] for name in (data_name, graph_name)}
        absent = (r for r in self.part.files if not (self.files / r.name).exists())
        return tuple(record for record in absent if record.name in deeper)

    def problems(self) -> Iterator[str]:
        """What is wrong with any file that is here, or should be, one line each."""
        here = [record for record in self.part.files if record not in self.missing]
        for record in here:
            try:
                self._check_file(record, remember=False)
            except RefusedError as error:
                yield str(error)
        try:
            self._check_graphs(here)
        except RefusedError as error:
            yield str(error)

    def _check_file(self, record: FileRecord, remember: bool) -> None:
        path = self.path(record.name)
        n_bytes = path.stat().st_size
        if n_bytes != record.n_bytes:
            raise RefusedError(
                f"{path} has {n_bytes} bytes, the manifest says {record.n_bytes}; get it again"
            )
        receipt = Receipt(path, record.sha256) if remember and n_bytes else None
        whole = Part(0, n_bytes, record.sha256)
        if receipt is not None and receipt.covers(whole):
            return
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(HASH_BYTES):
                digest.update(block)
        if digest.hexdigest() != record.sha256:
            raise RefusedError(
                f"{path} is corrupt: its sha256 differs from the manifest's; get the artifact again"
            )
        if receipt is not None:
            receipt.keep([whole])

    def _check_graphs(self, records: Sequence[FileRecord]) -> None:
        """Graphs read the data files only. Where the package onnx is missing, hashes must do."""
        try:
            from edgekit.exporters.onnx_files import check_graph
        except ImportError:
            return
        sizes = {r.name: r.n_bytes for r in self.part.files if r.name.endswith(".bin")}
        for record in records:
            if record.name.endswith(".onnx") and (self.files / record.name).exists():
                check_graph(self.path(record.name).read_bytes(), record.name, sizes)

    def path(self, name: str) -> Path:
        """A file of the part, which lies within its folder.

        Raises:
            RefusedError: It is missing, or leads elsewhere.
        """
        path = contained(self.files, name)
        if path is None:
            raise RefusedError(f"{self.files} lacks {name}; get the artifact again")
        return path

    def config(self) -> dict[str, Any]:
        """config.json, as the checkpoint had it."""
        body = read_json(self.files, CONFIG)
        return {key: value for key, value in body.items() if key != "transformers.js_config"}

    def decoder(self) -> Decoder:
        """What the graphs compute.

        Raises:
            RefusedError: config.json describes another model than the manifest.
        """
        config = self.config()
        arch, name = find_arch(config), str(self.files / CONFIG)
        decoder = decoder_of(arch, read_hyper(arch, config, name), config, name)
        for field in fields(Facts):
            told = getattr(self.part.facts, field.name)
            if getattr(decoder, field.name, told) != told:
                raise RefusedError(
                    f"{name} describes another model than edgekit.json, whose {field.name} is "
                    f"{told}; get the artifact again"
                )
        return decoder

    def read(self, place: Place) -> npt.NDArray[np.uint8]:
        """Bytes of a data file, mapped."""
        path = self.path(place.file)
        page = place.offset - place.offset % mmap.ALLOCATIONGRANULARITY
        end = place.offset + place.n_bytes
        with path.open("rb") as file:
            try:
                view = mmap.mmap(file.fileno(), end - page, access=mmap.ACCESS_READ, offset=page)
            except (OSError, ValueError) as error:
                raise RefusedError(f"{path} changed since it was opened: {error}") from error
        return np.frombuffer(view, np.uint8, place.n_bytes, place.offset - page)
