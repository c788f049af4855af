"""``edgekit export``: add what ONNX Runtime needs to an artifact that was made for llama.cpp."""

import json
import shutil
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.arch import allows_quantization
from edgekit.arch.config import find_arch, read_hyper
from edgekit.arch.decoder import decoder_of
from edgekit.artifact import Artifact, open_artifact
from edgekit.assembly import Assembly
from edgekit.checkpoint import contained, read_json
from edgekit.disk import disk_full_reported, folder_bytes, require_free
from edgekit.errors import RefusedError, UsageError
from edgekit.exporters.gguf import tensor_offsets
from edgekit.exporters.onnx_configs import CONFIG
from edgekit.imatrix import read_imatrix
from edgekit.kernels.ggml import row_bytes
from edgekit.model_card import write_model_card
from edgekit.onnx.export import OnnxModel, export_onnx, require_onnx
from edgekit.onnx_part import FOLDER, OnnxPart
from edgekit.planner import uniform
from edgekit.progress import Progress
from edgekit.provenance import file_hash
from edgekit.publish import move_into_place, write_manifest
from edgekit.stack import SOURCE, Stack
from edgekit.tokenizer_archive import read_tokenizer

Json = dict[str, Any]


def add_onnx(
    folder: Path,
    checkpoint: Path | None,
    progress: Progress,
    *,
    imatrix: Path | None,
    block: int,
    jobs: int,
    force: bool,
) -> Json:
    """Write the artifact's folder ``onnx/`` and tell of it in the manifest.

    Args:
        folder: Of an artifact whose tiers end with ``source``.
        checkpoint: Folder with config.json and the tokenizer's files of the model; None: those that
            the artifact holds.
        progress: Told how far it is.
        imatrix: Importance of columns; None: all alike.
        block: Weights that share a scale.
        jobs: Threads.
        force: Replace an ONNX part that is there.

    Raises:
        UsageError: There is an ONNX part already, or the original weights, the config or the
            tokenizer are not all here.
        RefusedError: The checkpoint's config is not the one that was converted, or the artifact's
            is that of another model.
    """
    require_onnx()
    started = time.monotonic()
    final = folder / FOLDER
    with ExitStack() as stack:
        artifact = stack.enter_context(open_artifact(folder))
        if final.exists() and not force:
            raise UsageError(f"{final} exists; replace it with --force")
        _require_source(artifact)
        highest = uniform(artifact.stacks, lambda tensor: tensor.tiers[-1])
        assembly = stack.enter_context(Assembly(artifact, highest, jobs))
        if checkpoint is None:
            place = Path(stack.enter_context(TemporaryDirectory(prefix="edgekit-tokenizer-")))
            _unpack(artifact, place)
        else:
            place = checkpoint
            _check_same(artifact, place)
        model = _model(artifact, assembly, place, imatrix)
        require_free(folder, round(artifact.manifest.n_parameters * 1.15), f"writing {final}")
        part = _written(model, folder, progress, block, jobs)
        manifest = replace(artifact.manifest, onnx=part)
    write_manifest(folder, manifest)
    write_model_card(folder, manifest)
    seconds = round(time.monotonic() - started, 3)
    depths = {row["depth"]: row["bytes"] for row in part.to_json()["depths"]}
    return {
        "artifact": str(folder),
        "folder": str(final),
        "bytes": folder_bytes(final),
        "depths": depths,
        "seconds": seconds,
    }


def _written(model: OnnxModel, folder: Path, progress: Progress, block: int, jobs: int) -> OnnxPart:
    """Write the ONNX files of the artifact in ``folder``, all or none."""
    final, staged = folder / FOLDER, folder / f".{FOLDER}.partial"
    shutil.rmtree(staged, ignore_errors=True)
    try:
        with disk_full_reported(f"writing {final}", "make room and repeat"):
            part = export_onnx(model, staged, progress, block=block, jobs=jobs)
        move_into_place(staged, final)
    except (KeyError, ValueError, AssertionError) as error:
        raise RefusedError(
            f"{folder}: its tensors are not those of the model that its config describes "
            f"({error!r:.80}); get the artifact again"
        ) from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return part


def _require_source(artifact: Artifact) -> None:
    cut = [stack.name for stack in artifact.stacks if stack.tiers[-1] != SOURCE]
    if cut:
        raise UsageError(
            f"{artifact.folder} does not hold the original weights of {cut[0]}; convert the "
            "checkpoint with --format onnx instead"
        )


def _unpack(artifact: Artifact, place: Path) -> None:
    """Write config and tokenizer files that the artifact holds into ``place``."""
    source = artifact.manifest.source
    if "config" not in source:
        raise UsageError(
            f"{artifact.folder} does not hold the model's config; give --checkpoint FOLDER"
        )
    files = read_tokenizer(artifact.folder, source)
    for name, data in (files | {CONFIG: json.dumps(source["config"]).encode()}).items():
        (place / name).write_bytes(data)


def _model(
    artifact: Artifact, assembly: Assembly, checkpoint: Path, imatrix: Path | None
) -> OnnxModel:
    config = artifact.manifest.source.get("config") or read_json(checkpoint, CONFIG)
    arch, name = find_arch(config), f"the config of {artifact.folder}"
    hyper = read_hyper(arch, config, name)
    statistics = None if imatrix is None else read_imatrix(imatrix)
    decoder = decoder_of(arch, hyper, config, name)
    tensors = Sources(artifact, assembly).tensors
    return OnnxModel(tensors, decoder, config, checkpoint, statistics)


def _check_same(artifact: Artifact, checkpoint: Path) -> None:
    """The config and the tokenizer are those of the conversion."""
    told = {row["name"]: row["sha256"] for row in artifact.manifest.source.get("files", [])}
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model"):
        path = contained(checkpoint, name)
        if name in told and (path is None or file_hash(path) != told[name]):
            raise RefusedError(
                f"{checkpoint}/{name} is not the one that {artifact.folder} was converted from; "
                "give that checkpoint's folder"
            )


class Sources:
    """The tensors of an artifact at tier source, read through one assembly; threads take turns."""

    def __init__(self, artifact: Artifact, assembly: Assembly) -> None:
        """Lay the tensors out."""
        self._assembly, self._lock = assembly, Lock()
        header = assembly.gguf
        offsets = tensor_offsets(header.tensors, header.alignment)
        starts = [header.data_offset + offset for offset in offsets]
        pairs = zip(artifact.stacks, starts, strict=True)
        self.tensors = tuple(ArtifactTensor(self, stack, start) for stack, start in pairs)

    def read(self, offset: int, n_bytes: int) -> bytes:
        """Bytes of the GGUF with the original values."""
        with self._lock:
            return self._assembly.read(offset, n_bytes)


@dataclass(frozen=True, eq=False)
class ArtifactTensor:
    """A tensor of an artifact at tier source."""

    sources: Sources
    stack: Stack
    offset: int

    @property
    def name(self) -> str:
        """llama.cpp's name."""
        return self.stack.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Numpy order, experts first."""
        return self.stack.shape

    @property
    def source_type(self) -> str:
        """ggml type of the original values."""
        return self.stack.source_type

    @property
    def quantizable(self) -> bool:
        """Whether its values may be rounded."""
        return allows_quantization(self.name, self.shape)

    def rows(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Raw rows ``[start, stop)`` over all experts, uint8 ``[n, row bytes]``."""
        width = row_bytes(self.source_type, self.stack.cols)
        raw = self.sources.read(self.offset + start * width, (stop - start) * width)
        return np.frombuffer(raw, np.uint8).reshape(stop - start, width)
