"""The tensors of a conversion as independent jobs: each ends as a data file and a record.

An `Encoder` needs the checkpoint and the spool's folder only, so a job can run in any process that
sees both.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from edgekit.arch import Mapping, SourceTensor, map_checkpoint
from edgekit.checkpoint import Checkpoint
from edgekit.codecs import CODECS
from edgekit.codecs.chunks import CHUNK_WEIGHTS
from edgekit.codecs.job import InOrder, Job
from edgekit.imatrix import Imatrix, read_imatrix
from edgekit.sensitivity import HEAD, NO_FISHER, Fisher, prior_sensitivity, read_fisher
from edgekit.spool import Spool


@dataclass(frozen=True)
class Task:
    """What all jobs of a conversion share, as plain data.

    Attributes:
        checkpoint: Its folder.
        spool: The working folder.
        codec: Key of `CODECS`.
        tiers: Asked for.
        column_group: See `Job`.
        imatrix: File, or ``None`` without statistics.
        fisher: File, or ``None``.
    """

    checkpoint: Path
    spool: Path
    codec: str
    tiers: tuple[str, ...]
    column_group: int
    imatrix: Path | None
    fisher: Path | None


class Encoder:
    """Encodes tensors of one conversion; for several threads at once."""

    def __init__(
        self, task: Task, mapping: Mapping, imatrix: Imatrix | None, fisher: Fisher
    ) -> None:
        """Take what `task` names, opened."""
        self._task, self._mapping = task, mapping
        self._imatrix, self._fisher = imatrix, fisher
        self._spool = Spool(task.spool)
        self._is_tied = all(tensor.name != HEAD for tensor in mapping.tensors)

    def encode(self, index: int, in_order: InOrder) -> None:
        """Write data and record of tensor ``index`` into the spool; ``in_order`` runs its chunks.

        Raises:
            RefusedError: A weight is NaN or infinite.
        """
        tensor = self._mapping.tensors[index]
        with self._spool.writing(index) as file:
            record = CODECS[self._task.codec].encode(tensor, self._job(tensor), file, in_order)
        self._spool.commit(index, record)

    def _job(self, tensor: SourceTensor) -> Job:
        n_experts = tensor.shape[0] if len(tensor.shape) == 3 else 1
        weights = None
        if self._imatrix is not None and tensor.quantizable:
            weights = self._imatrix.weights_for(tensor.name, n_experts, tensor.shape[-1])
        sensitivity = self._fisher.of(tensor.name) or prior_sensitivity(
            tensor.name, tensor.shape, weights, is_tied=self._is_tied
        )
        task = self._task
        return Job(task.tiers, CHUNK_WEIGHTS, weights, sensitivity, task.column_group)


@lru_cache(maxsize=1)
def open_encoder(task: Task) -> Encoder:
    """The encoder of ``task`` in a process that has only its files; kept for the next job."""
    return Encoder(
        task,
        map_checkpoint(Checkpoint.open(task.checkpoint)),
        None if task.imatrix is None else read_imatrix(task.imatrix),
        NO_FISHER if task.fisher is None else read_fisher(task.fisher),
    )
