"""``edgekit convert``: a checkpoint becomes one artifact that runs at every budget.

Stages, each resumable: read the checkpoint -> statistics -> encode every tensor into the spool ->
write base, levels and manifest -> measure -> one rename. Nothing stands under the final name before
all of it is whole.
"""

import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

from edgekit import __version__
from edgekit.arch import Mapping, SourceTensor, map_checkpoint
from edgekit.artifact import open_artifact
from edgekit.checkpoint import Checkpoint
from edgekit.codecs import CODECS
from edgekit.codecs.chunks import CHUNK_WEIGHTS
from edgekit.convert_options import Options, check_options
from edgekit.convert_report import Report, report_of, require_made_by
from edgekit.disk import disk_full_reported, require_free, require_name, require_new_folder
from edgekit.encode import Encoder, Task
from edgekit.errors import EdgekitError
from edgekit.exporters.gguf import header_bytes
from edgekit.exporters.gguf_values import Value, u32
from edgekit.exporters.tokenizer import tokenizer_metadata
from edgekit.exporters.tokenizer_check import check_tokenizer
from edgekit.exporters.tokenizer_files import suspicious_constructs
from edgekit.imatrix import Imatrix, read_imatrix, write_imatrix
from edgekit.manifest import MANIFEST_NAME, NO_FILE, Json, Manifest
from edgekit.measure import measure
from edgekit.model_card import write_model_card
from edgekit.onnx.export import decoder_in, export_onnx, onnx_model, require_onnx
from edgekit.onnx.feedback import Feedback
from edgekit.onnx_part import FOLDER
from edgekit.progress import Progress
from edgekit.provenance import (
    artifact_name,
    pruning_of,
    source_files,
    statistics_json,
    tool_versions,
)
from edgekit.publish import Encoded, move_into_place, publish, write_manifest
from edgekit.reserve import measure_memory
from edgekit.routing.gguf_keys import expert_metadata
from edgekit.routing.summary import summarize
from edgekit.routing.trace import read_trace, write_trace
from edgekit.sensitivity import NO_FISHER, Fisher, read_fisher, write_fisher
from edgekit.spool import Spool, write_atomically
from edgekit.tokenizer_archive import pack_tokenizer
from edgekit.workers import ENGINES

QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION: of the K- and IQ-blocks' layouts
IMATRIX_NAME, FISHER_NAME = "imatrix.gguf", "fisher.npz"
VOCABULARY_NAME, TRACE_NAME = "vocabulary.gguf", "trace.npz"


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
    check_options(options)
    require_name(output)
    if options.prune:
        return _convert_pruned(folder, output, options, progress, command)
    checkpoint = Checkpoint.open(folder)
    spool = Spool(output.with_name(f".{output.name}.partial"))
    if options.resume and output.exists() and spool.is_published(output.name):
        require_made_by(output, options, {p.name: n for p, n in checkpoint.files.items()})
        spool.remove()
        progress.note(f"{output} is complete; nothing to resume")
        return report_of(output, started)
    require_new_folder(output, options.force, MANIFEST_NAME, folder)
    conversion = _Conversion(checkpoint, output, spool, options, progress)
    with (
        disk_full_reported(f"converting to {output}", "make room and repeat with --resume"),
        spool.told_when_stopped(progress.note),
    ):
        conversion.run(command)
    return report_of(output, started)


def _convert_pruned(
    folder: Path, output: Path, options: Options, progress: Progress, command: Sequence[str]
) -> Report:
    """Prune into a hidden folder beside ``output``, convert that, and remove it."""
    from edgekit.pruning.prune import Options as Pruning
    from edgekit.pruning.prune import prune

    place = output.with_name(f".{output.name}.pruned")
    pruned = place / f"{artifact_name(folder)}-pruned"
    if options.resume and output.exists() and not place.exists():
        require_made_by(output, options, None, pruned.name)  # the pruned files are gone
        progress.note(f"{output} is complete; nothing to resume")
        return report_of(output, time.monotonic())
    require_new_folder(output, options.force, MANIFEST_NAME, folder)
    asked = Pruning(options.prune, calibration=options.calibration, resume=options.resume)
    prune(folder, pruned, replace(asked, force=not options.resume), progress, command)
    report = convert(pruned, output, replace(options, prune=0.0), progress, command)
    Spool(place).remove()  # at once: a kill half-way is no conversion to resume
    return report


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
        self.has_gguf, self.has_onnx = ("gguf" in options.formats, "onnx" in options.formats)
        self.metadata = gguf_metadata(checkpoint, self.mapping) if self.has_gguf else {}
        if self.has_onnx:
            require_onnx()
            decoder_in(checkpoint, self.mapping)  # refused before any work begins
        self.source_bytes = sum(checkpoint.files.values())
        self.name = artifact_name(checkpoint.folder)

    def run(self, command: Sequence[str]) -> None:
        """Do what is not done yet."""
        notes = self.mapping.notes if self.has_gguf else self.checkpoint.notes
        for note in (*notes, *_template_notes(self.metadata)):
            self.progress.note(note)
        share = CODECS[self.options.codec].size_bound(self.options.tiers)
        need = int(2 * share * self.source_bytes)  # the spool, and what is made from it
        require_free(self.output.parent, need, f"converting {self.checkpoint.folder}")
        words = [word for word in command if word != "--resume"]  # as if nothing had stopped it
        first_command = self.spool.open(self._job(), words, self.options.resume)
        if self.has_gguf:
            self._check_tokenizer()
        with ThreadPoolExecutor(1) as background:
            hashes = background.submit(source_files, self.checkpoint)
            imatrix = self._statistics()
            if imatrix is not None and self.options.save_imatrix is not None:
                write_imatrix(imatrix, self.options.save_imatrix)
            fisher = self._fisher() if self.has_gguf else NO_FISHER
            experts = self._experts() if self.has_gguf else {}
            tensors = self._encode(imatrix, fisher) if self.has_gguf else []
            facts = self._facts(imatrix, fisher, experts, hashes.result(), first_command)
        self._publish(tensors, facts, imatrix)

    def _job(self) -> Json:
        """What must be the same for a resumed conversion to end like an undisturbed one."""
        files = [[p.name, n, p.stat().st_mtime_ns] for p, n in self.checkpoint.files.items()]
        choices = asdict(
            replace(
                self.options,
                jobs=0,
                resume=False,
                force=False,
                save_imatrix=None,
                engine="",
                address=None,
            )
        )
        return {
            "edgekit": __version__,
            "checkpoint": str(self.checkpoint.folder.resolve()),
            "files": sorted(files),
            "options": {key: _plain(value) for key, value in choices.items()},
        }

    def _check_tokenizer(self) -> None:
        """Tokenize a stress text with llama.cpp and the checkpoint's tokenizer; ids are equal."""
        path = self.spool.folder / VOCABULARY_NAME
        write_atomically(path, header_bytes(self.metadata, []))
        for notice in check_tokenizer(path, self.checkpoint.folder).notices:
            self.progress.note(notice)

    def _statistics(self) -> Imatrix | None:
        if not self.options.statistics:
            return None
        if self.options.imatrix is not None:
            return read_imatrix(self.options.imatrix)
        kept = self.spool.folder / IMATRIX_NAME
        if not kept.is_file():
            from edgekit.calibration import calibrate

            imatrix = calibrate(
                self.checkpoint,
                self.options.calibration,
                mapping=self.mapping,
                progress=self.progress,
            )
            write_imatrix(imatrix, kept)
        return read_imatrix(kept)

    def _fisher(self) -> Fisher:
        """What errors cost; empty without calibration, and where gradients cannot be had."""
        if not self.options.statistics:
            return NO_FISHER
        kept = self.spool.folder / FISHER_NAME
        if not kept.is_file():
            write_fisher(self._collected(), kept)
        return read_fisher(kept)

    def _collected(self) -> Fisher:
        try:
            from edgekit.fisher import collect_fisher

            return collect_fisher(
                self.checkpoint,
                self.options.calibration,
                mapping=self.mapping,
                progress=self.progress,
            )
        except (EdgekitError, ImportError) as error:
            self.progress.note(f"levels are ordered without gradients, by role: {error}")
            return NO_FISHER

    def _experts(self) -> Json:
        """What routers do; empty without experts or statistics, and where it cannot be had."""
        if not self.options.statistics or not self.mapping.hyper.n_experts:
            return {}
        kept = self.spool.folder / TRACE_NAME
        if not kept.is_file():
            from edgekit.tracing import trace_checkpoint

            try:
                trace = trace_checkpoint(
                    self.checkpoint,
                    self.options.calibration,
                    mapping=self.mapping,
                    progress=self.progress,
                )
            except EdgekitError as error:
                self.progress.note(f"the routers were not traced: {error}")
                return {}
            write_trace(trace, kept)
        return summarize(read_trace(kept))

    def _encode(self, imatrix: Imatrix | None, fisher: Fisher) -> list[Encoded]:
        """Run the jobs of the tensors that have no record, the largest ones first."""
        tensors, options = self.mapping.tensors, self.options
        self.progress.start("encode", sum(t.n_weights for t in tensors))
        todo = [i for i in range(len(tensors)) if self.spool.record(i) is None]
        self.progress.advance(sum(t.n_weights for t in tensors) - self._n_weights(todo))
        todo.sort(key=lambda i: -tensors[i].n_weights)
        task = self._task(imatrix, fisher)
        encoder = Encoder(task, self.mapping, imatrix, fisher)
        run = ENGINES[options.engine]
        for index in run(encoder, task, todo, options.jobs, options.address):
            self.progress.advance(tensors[index].n_weights)
        return [self._encoded(i, tensor) for i, tensor in enumerate(tensors)]

    def _n_weights(self, indices: Sequence[int]) -> int:
        return sum(self.mapping.tensors[i].n_weights for i in indices)

    def _encoded(self, index: int, tensor: SourceTensor) -> Encoded:
        record = self.spool.record(index)
        if record is None:
            raise EdgekitError(
                f"{self.spool.folder} has no record of {tensor.name}; a worker does not write to "
                "the same folder: put the output on a path that all of them share"
            )
        return Encoded(index, tensor.shape, tensor.source_type, record)

    def _task(self, imatrix: Imatrix | None, fisher: Fisher) -> Task:
        options, folder = self.options, self.spool.folder.resolve()
        kept = options.imatrix.resolve() if options.imatrix else folder / IMATRIX_NAME
        return Task(
            self.checkpoint.folder.resolve(),
            folder,
            options.codec,
            options.tiers,
            options.column_group,
            None if imatrix is None else kept,
            folder / FISHER_NAME if fisher.rows else None,
        )

    def _facts(
        self,
        imatrix: Imatrix | None,
        fisher: Fisher,
        experts: Json,
        hashes: list[Json],
        command: Sequence[str],
    ) -> Manifest:
        """The manifest without what depends on the files."""
        prefix = f"{self.mapping.architecture}."
        model = {k: v.value for k, v in self.metadata.items() if k.startswith(prefix)}
        return Manifest(
            name=self.name,
            architecture=self.mapping.architecture,
            codec=self.options.codec,
            tiers=self.options.tiers if self.has_gguf else (),
            chunk_weights=CHUNK_WEIGHTS,
            base=NO_FILE,
            header_bytes=0,
            header_sha256="",
            levels=NO_FILE,
            stacks=(),
            stored_order=(),
            resident_order=(),
            model=model | {"vocab_size": self.mapping.vocab_size},
            source=self._source(hashes),
            tool=tool_versions(command),
            statistics=statistics_json(imatrix, fisher),
            experts=experts,
        )

    def _source(self, hashes: list[Json]) -> Json:
        license_, pruned = self.metadata.get("general.license"), pruning_of(self.checkpoint)
        return {
            "name": self.checkpoint.folder.resolve().name,
            "license": license_.value if license_ else None,
            "files": hashes,
            "config": dict(self.checkpoint.config),
            "unused_tensors": list(self.mapping.unused),
            **({"pruned": pruned} if pruned else {}),
        }

    def _publish(self, tensors: list[Encoded], facts: Manifest, imatrix: Imatrix | None) -> None:
        staged = self.spool.folder / self.output.name
        if not self.spool.is_ready:
            self._stage(staged, tensors, facts, imatrix)
            self.spool.set_ready()
        move_into_place(staged, self.output)
        self.spool.remove()

    def _stage(
        self, staged: Path, tensors: list[Encoded], facts: Manifest, imatrix: Imatrix | None
    ) -> None:
        """Write the artifact, all of it, inside the spool."""
        if staged.exists():
            shutil.rmtree(staged)
        staged.mkdir()
        manifest = self._stage_gguf(staged, tensors, facts) if self.has_gguf else facts
        if self.has_onnx:
            model = onnx_model(self.checkpoint, self.mapping, imatrix)
            part = export_onnx(
                replace(model, feedback=self._feedback()),
                staged / FOLDER,
                self.progress,
                block=self.options.block_size,
                jobs=self.options.jobs,
            )
            manifest = replace(manifest, onnx=part)
        write_manifest(staged, manifest)
        write_model_card(staged, manifest)

    def _feedback(self) -> Feedback | None:
        carried, text = self.options.error_feedback, self.options.calibration
        return Feedback(self.checkpoint, self.mapping, text, carried) if carried else None

    def _stage_gguf(self, staged: Path, tensors: list[Encoded], facts: Manifest) -> Manifest:
        self.progress.start("write", 1)
        metadata = self.metadata | expert_metadata(facts.experts)
        order = self.options.load_order
        tokenizer = {"tokenizer": pack_tokenizer(self.checkpoint.folder, staged)}
        facts = replace(facts, source=facts.source | tokenizer)
        manifest = publish(self.spool, staged, tensors, metadata, facts, order)
        write_manifest(staged, manifest)
        manifest = replace(manifest, memory=measure_memory(staged, self.progress))
        write_manifest(staged, manifest)
        self.progress.advance(1)
        if self.options.measure:
            with open_artifact(staged) as artifact:
                quality = measure(artifact, self.progress, self.options.jobs)
            manifest = replace(manifest, quality=quality)
        return manifest


def gguf_metadata(checkpoint: Checkpoint, mapping: Mapping) -> dict[str, Value]:
    """All metadata of the base: the architecture's, and the tokenizer's."""
    tokenizer = tokenizer_metadata(checkpoint.folder, dict(checkpoint.config), mapping.vocab_size)
    version = {"general.quantization_version": u32(QUANTIZATION_VERSION)}
    return dict(mapping.metadata) | version | tokenizer


def _template_notes(metadata: dict[str, Value]) -> list[str]:
    """A line for each chat template that holds what attacks on renderers are made of."""
    templates = [v.value for k, v in metadata.items() if k.startswith("tokenizer.chat_template")]
    found = sorted({c for t in templates if isinstance(t, str) for c in suspicious_constructs(t)})
    if not found:
        return []
    return [
        f"the chat template contains {', '.join(found)}; it is carried verbatim, never run here"
    ]


def _plain(value: object) -> object:
    if isinstance(value, Path):
        stat = value.stat()
        return [str(value.resolve()), stat.st_size, stat.st_mtime_ns]
    return list(value) if isinstance(value, tuple) else value
