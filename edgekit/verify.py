"""``edgekit verify``: every byte of an artifact against its manifest, for both runtimes."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from edgekit.artifact import Verification, open_artifact, verify
from edgekit.catalog import read_manifest
from edgekit.errors import RefusedError, UsageError
from edgekit.manifest import Manifest
from edgekit.onnx.artifact import OnnxArtifact
from edgekit.onnx_part import FOLDER
from edgekit.tokenizer_archive import read_tokenizer


def verify_path(folder: Path) -> Verification:
    """Check the artifact in ``folder``.

    Raises:
        UsageError: It is no artifact.
        RefusedError: The manifest, or the header of the base, is corrupt.
    """
    manifest = read_manifest(folder)
    found = Verification(0, 0, ())
    if manifest.has_gguf:
        with open_artifact(folder) as opened:
            found = verify(opened)
        found = replace(found, problems=(*found.problems, *_tokenizer_problems(manifest, folder)))
    if manifest.onnx is None:
        return found
    n_files = len(manifest.onnx.files)
    if manifest.has_gguf and not (folder / FOLDER).exists():  # not pulled
        return Verification(found.checked, found.missing + n_files, found.problems)
    onnx = OnnxArtifact(folder, manifest, manifest.onnx)
    problems, n_missing = tuple(onnx.problems()), len(onnx.missing)
    return Verification(
        found.checked + n_files - n_missing, found.missing + n_missing, found.problems + problems
    )


def _tokenizer_problems(manifest: Manifest, folder: Path) -> Iterator[str]:
    """What is wrong with the tokenizer files; an artifact without them runs as well."""
    try:
        read_tokenizer(folder, manifest.source)
    except UsageError:
        return
    except RefusedError as error:
        yield str(error)
