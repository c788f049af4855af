"""What error feedback needs of a model: second moments of inputs, as the matrices come in turn."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgekit.arch import Mapping
from edgekit.checkpoint import Checkpoint
from edgekit.errors import EdgekitError
from edgekit.kernels.feedback import CARRIED, inverse_factor

F32Array = npt.NDArray[np.float32]
HINT = "leave --error-feedback out, or close other programs"
N_TOKENS = 1 << 15  # to take moments from, as many as the importance matrix has


class Feedback:
    """Factors for `edgekit.kernels.feedback.encode`; one layer's moments are in memory at a time.

    Attributes:
        carried: Weights of the errors at 8, 4 and 2 bits.
    """

    def __init__(
        self, checkpoint: Checkpoint, mapping: Mapping, text: Path | None, carried: str
    ) -> None:
        """Begin in front of the first layer.

        Args:
            checkpoint: With tokenizer files in its folder.
            mapping: Of it.
            text: To calibrate on; ``None`` takes the text that comes with edgekit.
            carried: Key of `CARRIED`.

        Raises:
            EdgekitError: torch or transformers is missing.
            UsageError: The text is too short.
            DoesNotFitError: The largest layer and its moments do not fit into free memory.
        """
        try:
            from edgekit.pruning.moments import layer_moments, require_memory
            from edgekit.pruning.texts import batches, tokens
        except ImportError as error:
            raise EdgekitError(
                f"error feedback needs {error.name}; pip install edgekit[convert], or leave "
                "--error-feedback out"
            ) from error
        self.carried = CARRIED[carried]
        ids, _, _ = tokens(checkpoint, mapping, text, N_TOKENS)
        require_memory(mapping, ids, HINT)
        self._layers = layer_moments(checkpoint, mapping, batches(ids, mapping))
        self._index, self._moments = -1, dict[str, list[npt.NDArray[np.float32]]]()

    def factors(self, name: str) -> tuple[F32Array, ...]:
        """Of a tensor's inputs, one per expert; none for the embedding and the head.

        Tensors of a layer come before those of the next.
        """
        if not name.startswith("blk."):
            return ()
        index = int(name.split(".")[1])
        while self._index < index:
            self._moments = {}  # before the next are taken
            self._index, found = next(self._layers)
            self._moments = {k: [m.numpy() for m in moments] for k, moments in found.items()}
        assert self._index == index, "tensors come layer by layer"
        return tuple(map(inverse_factor, self._moments.get(name, ())))
