"""``edgekit convert``: a checkpoint becomes one artifact that runs at every budget.

Stages, each resumable: read the checkpoint -> statistics -> encode every tensor into the spool ->
write base, levels and manifest -> measure -> one rename. Nothing stands under the final name before
all of it is whole.
"""

import hashlib
import os
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from edgekit import __version__
from edgekit.arch import Mapping, SourceTensor, map_checkpoint
from edgekit.artifact import open_artifact
from edgekit.checkpoint import Checkpoint
from edgekit.codecs.chunks import CHUNK_WEIGHTS
from edgekit.codecs.nested import CHILDREN
from edgekit.convert_report import Report, report_of, tier_bytes
from edgekit.disk import disk_full_reported, require_free
from edgekit.encode import Job, chain_of, encode_tensor
from edgekit.errors import UnknownNameError, UsageError
from edgekit.exporters.gguf_values import Value
from edgekit.exporters.tokenizer import tokenizer_metadata
from edgekit.exporters.tokenizer_files import suspicious_constructs
from edgekit.imatrix import Imatrix, read_imatrix, write_imatrix
from edgekit.kernels.ggml import TYPES, row_bytes
from edgekit.manifest import FileRecord, Json, Manifest
from edgekit.measure import measure
from edgekit.model_card import write_model_card
from edgekit.planner import resident_bytes
from edgekit.progress import Progress
from edgekit.publish import Encoded, move_into_place, publish, write_manifest
from edgekit.spool import Spool
from edgekit.stack import SOURCE, Level, Part, Stack

DEFAULT_TIERS = ("Q2_K", "Q3_K", "Q4_K", "Q6_K", "Q8_0", SOURCE)
SHARE_OF_SOURCE = (
    1.02  # an artifact takes about 0.95 of a BF16 checkpoint; widened tensors take more
)
IMATRIX_NAME = "imatrix.gguf"


@dataclass(frozen=True)
class Options:
    """What a conversion is asked for.

    Attributes:
        tiers: Lowest first; ``source`` last when the original values are kept.
        codec: Key of `CODECS`.
        calibration: Text to calibrate on; ``None`` takes the text that edgekit ships.
        imatrix: A statistics file of llama-imatrix or edgekit to use instead of calibrating.
        statistics: False converts without any statistics.
        save_imatrix: Where to also write the statistics, for llama-quantize.
        measure: Measure quality at a dozen budgets at the end.
        jobs: Worker threads.
        resume: Go on where the same conversion was stopped.
        force: Replace an existing artifact.
    """

    tiers: tuple[str, ...] = DEFAULT_TIERS
    codec: str = "nested"
    calibration: Path | None = None
    imatrix: Path | None = None
    statistics: bool = True
    save_imatrix: Path | None = None
    measure: bool = True
    jobs: int = os.cpu_count() or 1
    resume: bool = False
    force: bool = False


def convert(
    folder: Path, output: Path, options: Options, progress: Progress, command: Sequence[str] = ()
) -> Report:
    """Convert the checkpoint in ``folder`` into the artifact ``output``.

    Raises:
        UsageError: Options contradict each other, or ``output`` exists and force is off.
        DiskFullError: There is not enough room.
        RefusedError: The checkpoint is unsafe, corrupt or of an unknown kind.
    """
    started = time.monotonic()
    check_tiers(options.tiers)
    checkpoint = Checkpoint.open(folder)
    spool = Spool(output.with_name(f".{output.name}.partial"))
    if output.exists() and options.resume and not spool.folder.exists():
        progress.note(f"{output} is complete; nothing to resume")
        return report_of(output, started)
    _require_free_name(output, options)
    conversion = _Conversion(checkpoint, output, spool, options, progress)
    with disk_full_reported(f"converting to {output}", "make room and repeat with --resume"):
        conversion.run(command)
    return report_of(output, started)


def check_tiers(tiers: Sequence[str]) -> None:
    """Check that ``tiers`` are a chain that a codec can build.

    Raises:
        UsageError: A tier is unknown, stands twice, is out of order, or cannot follow another.
    """
    for tier in tiers:
        if tier != SOURCE and tier not in TYPES:
            raise UnknownNameError("tier", tier, [*TYPES, SOURCE])
    if not tiers or len(set(tiers)) != len(tiers) or SOURCE in tiers[:-1]:
        raise UsageError(f"tiers {','.join(tiers)}: name each tier once, lowest first, source last")
    for tier in tiers[1:]:
        if tier != SOURCE and tier not in CHILDREN:
            raise UsageError(
                f"tier {tier} can only come first in a chain; tiers above another: "
                f"{', '.join(CHILDREN)}"
            )
    bits = [row_bytes(tier, 256) for tier in tiers if tier != SOURCE]
    if bits != sorted(bits):
        raise UsageError(f"tiers {','.join(tiers)}: order them from few bits to many")


def _require_free_name(output: Path, options: Options) -> None:
    if output.is_symlink() or (output.exists() and not options.force):
        raise UsageError(f"{output} exists; choose another -o, or replace it with --force")


class _Conversion:
    """The stages of one conversion; what they share is set once, in ``__init__``."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        output: Path,
        spool: Spool,
        options: Options,
        progress: Progress,
    ) -> None:
        self.checkpoint, self.output, self.spool = checkpoint, output, spool
        self.options, self.progress = options, progress
        self.mapping: Mapping = map_checkpoint(checkpoint)
        self.metadata = _metadata(checkpoint, self.mapping)
        self.source_bytes = sum(checkpoint.files.values())
        self.name = artifact_name(checkpoint.folder)

    def run(self, command: Sequence[str]) -> None:
        """Do what is not done yet."""
        for note in (*self.mapping.notes, *_template_notes(self.metadata)):
            self.progress.note(note)
        need = int(
            2 * SHARE_OF_SOURCE * self.source_bytes
        )  # the spool and the artifact made from it
        require_free(self.output.parent, need, f"converting {self.checkpoint.folder}")
        self.spool.open(self._job(), self.options.resume)
        with ThreadPoolExecutor(1) as background:
            hashes = background.submit(_hash_files, self.checkpoint)
            imatrix = self._statistics()
            if imatrix is not None and self.options.save_imatrix is not None:
                write_imatrix(imatrix, self.options.save_imatrix)
            tensors = self._encode(imatrix, background)
            facts = self._facts(imatrix, hashes.result(), command)
        self._publish(tensors, facts)

    def _job(self) -> Json:
        """What must be the same for a resumed conversion to end like an undisturbed one."""
        files = [[p.name, n, p.stat().st_mtime_ns] for p, n in self.checkpoint.files.items()]
        choices = asdict(
            replace(self.options, jobs=0, resume=False, force=False, save_imatrix=None)
        )
        return {
            "edgekit": __version__,
            "checkpoint": str(self.checkpoint.folder.resolve()),
            "files": sorted(files),
            "options": {key: _plain(value) for key, value in choices.items()},
        }

    def _statistics(self) -> Imatrix | None:
        if not self.options.statistics:
            return None
        if self.options.imatrix is not None:
            return read_imatrix(self.options.imatrix)
        kept = self.spool.folder / IMATRIX_NAME
        if not kept.is_file():
            from edgekit.calibration import calibrate

            imatrix = calibrate(self.checkpoint, self.options.calibration, progress=self.progress)
            write_imatrix(imatrix, kept)
        return read_imatrix(kept)

    def _encode(self, imatrix: Imatrix | None, background: ThreadPoolExecutor) -> list[Encoded]:
        done: list[Encoded] = []
        commits: list[Future[None]] = []
        self.progress.start("encode", sum(t.n_weights for t in self.mapping.tensors))
        with ThreadPoolExecutor(self.options.jobs) as pool:
            for index, tensor in enumerate(self.mapping.tensors):
                record = self.spool.record(index)
                if record is None:
                    job = self._job_of(tensor, imatrix)
                    with self.spool.data_path(index).open("wb") as file:
                        record = encode_tensor(tensor, job, file, pool, 2 * self.options.jobs)
                    commits.append(background.submit(self.spool.commit, index, record))
                done.append(Encoded(index, tensor.shape, tensor.source_type, record))
                self.progress.advance(tensor.n_weights)
            for commit in commits:
                commit.result()
        return done

    def _job_of(self, tensor: SourceTensor, imatrix: Imatrix | None) -> Job:
        n_experts = tensor.shape[0] if len(tensor.shape) == 3 else 1
        weights = None
        if imatrix is not None and tensor.quantizable:
            weights = imatrix.weights_for(tensor.name, n_experts, tensor.shape[-1])
        return Job(self.options.tiers, self.options.codec, CHUNK_WEIGHTS, weights)

    def _facts(
        self, imatrix: Imatrix | None, hashes: list[Json], command: Sequence[str]
    ) -> Manifest:
        """The manifest without what depends on the files."""
        nothing = FileRecord("", 0, "")
        prefix = f"{self.mapping.architecture}."
        model = {k: v.value for k, v in self.metadata.items() if k.startswith(prefix)}
        return Manifest(
            name=self.name,
            architecture=self.mapping.architecture,
            codec=self.options.codec,
            tiers=self.options.tiers,
            chunk_weights=CHUNK_WEIGHTS,
            base=nothing,
            header_bytes=0,
            header_sha256="",
            levels=nothing,
            stacks=(),
            stored_order=(),
            resident_order=(),
            model=model | {"vocab_size": self.mapping.vocab_size},
            source=self._source(hashes),
            tool=_tool(command),
            statistics=_statistics_json(imatrix),
        )

    def _source(self, hashes: list[Json]) -> Json:
        license_ = self.metadata.get("general.license")
        return {
            "name": self.checkpoint.folder.resolve().name,
            "license": license_.value if license_ else None,
            "files": hashes,
            "unused_tensors": list(self.mapping.unused),
        }

    def _publish(self, tensors: list[Encoded], facts: Manifest) -> None:
        staged = self.spool.folder / self.output.name
        Spool(staged).remove()
        staged.mkdir()
        self.progress.start("write", 1)
        manifest = publish(self.spool, staged, tensors, self.metadata, facts)
        write_manifest(staged, manifest)
        self.progress.advance(1)
        if self.options.measure:
            with open_artifact(staged) as artifact:
                manifest = replace(manifest, quality=measure(artifact, self.progress))
            write_manifest(staged, manifest)
        write_model_card(staged, manifest)
        move_into_place(staged, self.output)
        self.spool.remove()


def _metadata(checkpoint: Checkpoint, mapping: Mapping) -> dict[str, Value]:
    tokenizer = tokenizer_metadata(checkpoint.folder, dict(checkpoint.config), mapping.vocab_size)
    return dict(mapping.metadata) | tokenizer


def _template_notes(metadata: dict[str, Value]) -> list[str]:
    """A line for each chat template that holds what attacks on renderers are made of."""
    templates = [v.value for k, v in metadata.items() if k.startswith("tokenizer.chat_template")]
    found = sorted({c for t in templates if isinstance(t, str) for c in suspicious_constructs(t)})
    if not found:
        return []
    return [
        f"the chat template contains {', '.join(found)}; it is carried verbatim, never run here"
    ]


def artifact_name(folder: Path) -> str:
    """Base name of the artifact's files: the checkpoint's folder or Hugging Face repository."""
    path = folder.resolve()
    if path.parent.name == "snapshots":
        path = Path(path.parent.parent.name.split("--")[-1])
    name = "".join(c if c.isalnum() or c in "-_." else "-" for c in path.name).strip(".-")
    return name or "model"


def _hash_files(checkpoint: Checkpoint) -> list[Json]:
    """Name, bytes and sha256 of config, tokenizer and weight files."""
    weights = set(checkpoint.files)
    small = {p.resolve() for p in checkpoint.folder.glob("*.json")} - weights
    named = {p: p.name for p in (*small, *weights)}
    rows: list[Json] = []
    for path, name in sorted(named.items(), key=lambda item: item[1]):
        with path.open("rb") as file:
            digest = (
                hashlib.file_digest(file, "sha256")
                if hasattr(hashlib, "file_digest")
                else _digest(file)
            )
        rows.append({"name": name, "bytes": path.stat().st_size, "sha256": digest.hexdigest()})
    return rows


def _digest(file: Any) -> Any:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest


def _tool(command: Sequence[str]) -> Json:
    """Versions and the command, without what may differ between a run and its resumption."""
    packages = ("llama_cpp_python", "gguf", "numpy", "zstandard")
    words = [word for word in command if word not in ("--resume", "--force")]
    return {
        "edgekit": __version__,
        **{name: version(name) for name in packages},
        "command": words,
    }


def _statistics_json(imatrix: Imatrix | None) -> Json:
    loss = "weighted square error over weighted square of the weights"
    if imatrix is None:
        return {"kind": "none", "loss": f"{loss}, all columns alike"}
    return {
        "kind": "imatrix",
        "datasets": list(imatrix.datasets),
        "chunks": imatrix.chunk_count,
        "chunk_tokens": imatrix.chunk_size,
        "loss": f"{loss}, columns weighted by the mean square of their input",
    }


def _plain(value: object) -> object:
    if isinstance(value, Path):
        stat = value.stat()
        return [str(value.resolve()), stat.st_size, stat.st_mtime_ns]
    return list(value) if isinstance(value, tuple) else value


def preview(folder: Path, output: Path, options: Options) -> Report:
    """What `convert` would make: memory to the byte, the artifact's size estimated."""
    check_tiers(options.tiers)
    checkpoint = Checkpoint.open(folder)
    _require_free_name(output, options)
    mapping = map_checkpoint(checkpoint)
    _metadata(checkpoint, mapping)
    stacks = [_empty_stack(tensor, options.tiers) for tensor in mapping.tensors]
    base = sum(resident_bytes(stack, stack.tiers[0]) for stack in stacks)
    source = sum(checkpoint.files.values())
    return Report(
        artifact=str(output),
        source_bytes=source,
        base_bytes=base,
        levels_bytes=int(SHARE_OF_SOURCE * source) - base,
        artifact_bytes=int(SHARE_OF_SOURCE * source),
        tiers=tier_bytes(stacks, options.tiers),
        n_tensors=len(stacks),
        seconds=0.0,
    )


def _empty_stack(tensor: SourceTensor, tiers: Sequence[str]) -> Stack:
    """A stack whose levels have no bytes yet."""
    chain = chain_of(tensor, tiers)
    parents = (None, *chain)
    levels = (
        Level(tensor.name, t, p, "", (Part(0, 0, ""),), 0.0)
        for t, p in zip(chain, parents, strict=False)
    )
    return Stack(tensor.name, tensor.shape, tensor.source_type, tuple(levels))
