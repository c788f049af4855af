"""An artifact to measure with: the one that is given, else the sample tiny-moe, converted."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgekit.artifact import Artifact, open_artifact
from edgekit.convert import convert
from edgekit.convert_options import Options
from edgekit.progress import Silent
from edgekit.samples import FOLDER

TINY_MOE = FOLDER / "tiny-moe"


@contextmanager
def opened(path: Path | None) -> Iterator[Artifact]:
    """Open ``path``, or the sample, which is converted into a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        if path is None:
            path = Path(folder) / TINY_MOE.name
            convert(TINY_MOE, path, Options(measure=False), Silent())
        with open_artifact(path, remember=True) as artifact:
            yield artifact
