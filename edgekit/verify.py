"""``edgekit verify``: every byte of an artifact against its manifest, for both runtimes."""

from pathlib import Path

from edgekit.artifact import Verification, open_artifact, verify
from edgekit.catalog import read_manifest
from edgekit.onnx_artifact import OnnxArtifact


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
    if manifest.onnx is not None:
        problems = tuple(OnnxArtifact(folder, manifest, manifest.onnx).problems())
        checked = found.checked + len(manifest.onnx.files)
        found = Verification(checked, found.missing, found.problems + problems)
    return found
