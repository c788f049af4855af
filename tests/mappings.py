"""What a checkpoint's mapping must refuse."""

import pytest

from edgekit.arch import map_checkpoint
from edgekit.checkpoint import Checkpoint
from edgekit.errors import RefusedError


def refused(checkpoint: Checkpoint, text: str, kind: type[RefusedError] = RefusedError) -> None:
    with pytest.raises(kind, match=text) as caught:
        map_checkpoint(checkpoint)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
