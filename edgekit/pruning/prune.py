"""``edgekit prune``: a checkpoint becomes a smaller checkpoint, streamed and resumable.

Stages: read the checkpoint -> which layers go and how the ratio is shared out -> every layer that
stays, one at a time -> what is in no layer -> one rename. Nothing stands under the final name
before all of it is whole.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgekit import __version__
from edgekit.arch import Mapping, map_checkpoint
from edgekit.checkpoint import Checkpoint
from edgekit.devices.heap import keep_large_blocks_apart
from edgekit.disk import disk_full_reported, require_free, require_name, require_new_folder
from edgekit.errors import UnsupportedError, UsageError
from edgekit.kernels.ggml import ggml_type
from edgekit.progress import Progress, Silent
from edgekit.provenance import PRUNING, source_files
from edgekit.pruning.choose import Chooser
from edgekit.pruning.cut import (
    MULTIPLE,
    Cut,
    candidates,
    cut_config,
    kept,
    n_parameters,
    ratio_of,
    whole,
)
from edgekit.pruning.layers import Ids, Layers
from edgekit.pruning.metrics import get_metric
from edgekit.pruning.moments import require_memory
from edgekit.pruning.output import (
    layer_entries,
    outer_entries,
    shard_name,
    write_rest,
    write_shard,
)
from edgekit.pruning.repair import repair
from edgekit.pruning.search import Probe
from edgekit.pruning.stages import Recipe
from edgekit.pruning.taylor import Effects, effects
from edgekit.pruning.texts import batches, tokens
from edgekit.pruning.walk import State, Walk
from edgekit.publish import move_into_place
from edgekit.spool import Spool, write_atomically

Json = dict[str, Any]

HINT = "give fewer --tokens, or close other programs"


@dataclass(frozen=True)
class Options:
    """What a pruning is asked for.

    Attributes:
        ratio: Share of all parameters to remove, 0 up to 1.
        metric: Key of `METRICS`.
        calibration: Text to calibrate on; ``None`` takes the text that edgekit ships.
        tokens: Of it to use.
        tunes: Refit what is left (mask tuning).
        multiple: Widths are cut to multiples of this.
        n_removed: Layers that go; ``None``: measured.
        search: Generations of the evolutionary search over layers.
        seed: Of that search.
        repair_rank: Rank of an adapter that repairs ``repair_tier``; ``None``: no adapter.
        repair_tier: ggml type that the result will be stored in.
        resume: Go on where the same pruning was stopped.
        force: Replace an existing output.
    """

    ratio: float
    metric: str = "condition"
    calibration: Path | None = None
    tokens: int = 1 << 13
    tunes: bool = True
    multiple: int = MULTIPLE
    n_removed: int | None = None
    search: int = 0
    seed: int = 0
    repair_rank: int | None = None
    repair_tier: str = "Q2_K"
    resume: bool = False
    force: bool = False


@dataclass(frozen=True)
class Report:
    """What a pruning made; KL in nats on text that was not calibrated on.

    ``kept`` counts what is left, ``trials`` the loss of each combination that was measured on
    calibration text, ``layer_seconds`` the time of each layer that stays.
    """

    path: str
    ratio_asked: float
    ratio: float
    n_parameters: int
    source_parameters: int
    kept: Json
    removed_layers: list[int]
    metric: str
    kl_mean: float
    ppl: float
    ref_ppl: float
    trials: list[Json]
    layer_seconds: list[float]
    seconds: float


def prune(
    folder: Path,
    output: Path,
    options: Options,
    progress: Progress | None = None,
    command: Sequence[str] = (),
) -> Report:
    """Prune the checkpoint in ``folder`` into the folder ``output``.

    Raises:
        UsageError: The ratio is out of range, a name is unknown, the text is too short, or
            ``output`` exists and force is off.
        UnsupportedError: The widths allow nothing near the ratio.
        DoesNotFitError: Not enough memory for one layer. DiskFullError: not enough room.
    """
    started = time.monotonic()
    require_name(output)
    spool = Spool(output.with_name(f".{output.name}.partial"))
    if options.resume and output.exists() and spool.is_published(output.name):
        _require_made_by(output, folder, options)
        spool.remove()
        return _report_of(output)
    require_new_folder(output, options.force, PRUNING, folder)
    keep_large_blocks_apart()
    checkpoint = Checkpoint.open(folder)
    job = _Pruning(checkpoint, output, spool, options, progress or Silent(), started)
    with (
        disk_full_reported(f"pruning to {output}", "make room and repeat with --resume"),
        spool.told_when_stopped(job.progress.note),
    ):
        job.run([word for word in command if word != "--resume"])
    return _report_of(output)


def prune_and_repair(
    folder: Path, output: Path, options: Options, progress: Progress, command: Sequence[str] = ()
) -> Report:
    """`prune`, and where a rank is asked for an adapter ``repair-TIER-rRANK.gguf`` in ``output``.

    Raises:
        UsageError: The tier is no ggml type, besides what `prune` raises.
    """
    ggml_type(options.repair_tier)
    report = prune(folder, output, options, progress, command)
    if options.repair_rank is not None:
        rank, tier = options.repair_rank, options.repair_tier
        path = output / f"repair-{tier}-r{rank}.gguf"
        repair(output, path, tier, rank, text=options.calibration, progress=progress)
    return report


def preview(folder: Path, output: Path, options: Options) -> list[Json]:
    """The combinations that `prune` would choose from; reads no weights."""
    require_new_folder(output, options.force, PRUNING, folder)
    mapping = map_checkpoint(Checkpoint.open(folder))
    return [
        {"kept": kept(mapping, cut), "ratio": ratio_of(mapping, cut)}
        for cut in _candidates(mapping, options)
    ]


def _candidates(mapping: Mapping, options: Options) -> list[Cut]:
    return candidates(mapping, options.ratio, options.multiple, options.n_removed)


def _require_made_by(output: Path, folder: Path, options: Options) -> None:
    """Check that the finished ``output`` is what is asked for.

    Raises:
        UsageError: It is no pruning of this checkpoint, or was made with other options.
    """
    path = output / PRUNING
    body = json.loads(path.read_text()) if path.is_file() else {"source": {}}
    made = [body["source"].get("name"), *map(body.get, ("ratio_asked", "metric", "tunes"))]
    if made != [folder.resolve().name, options.ratio, options.metric, options.tunes]:
        raise UsageError(
            f"{output} is complete and was made from another checkpoint or with other options; "
            "choose another -o, or replace it with --force"
        )


def _report_of(output: Path) -> Report:
    body = json.loads((output / PRUNING).read_text())
    return Report(**{key: body[key] for key in Report.__dataclass_fields__ if key in body})


class _Pruning:
    """The stages of one pruning; what they share is set once, in ``__init__``."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        output: Path,
        spool: Spool,
        options: Options,
        progress: Progress,
        started: float,
    ) -> None:
        self.checkpoint, self.output, self.spool = checkpoint, output, spool
        self.options, self.progress, self.started = options, progress, started
        self.recipe = Recipe(get_metric(options.metric), options.tunes)
        self.mapping = map_checkpoint(checkpoint)
        self.cuts = _candidates(self.mapping, options)
        self.staged = spool.folder / output.name

    def run(self, command: Sequence[str]) -> None:
        """Do what is not done yet."""
        for note in self.mapping.notes:
            self.progress.note(note)
        text, n_tokens = self.options.calibration, self.options.tokens
        fit, probe, held = tokens(self.checkpoint, self.mapping, text, n_tokens)
        require_memory(self.mapping, fit, HINT)
        n_bytes = sum(self.checkpoint.files.values())
        require_free(self.output.parent, n_bytes, f"pruning {self.checkpoint.folder}")
        dense = Layers(self.mapping, self.checkpoint.config)
        first_command = self.spool.open(self._job(), command, self.options.resume)
        if not self.spool.is_ready:
            self.staged.mkdir(exist_ok=True)
            try:
                self._stage(dense, fit, probe, held, first_command)
            except UnsupportedError:  # nothing to go on with
                self.spool.remove()
                raise
            self.spool.set_ready()
        move_into_place(self.staged, self.output)
        self.spool.remove()

    def _job(self) -> Json:
        """What must be the same for a resumed pruning to end like an undisturbed one."""
        files = [[p.name, n, p.stat().st_mtime_ns] for p, n in self.checkpoint.files.items()]
        choices = asdict(replace(self.options, repair_rank=None, resume=False, force=False))
        return {
            "edgekit": __version__,
            "checkpoint": str(self.checkpoint.folder.resolve()),
            "files": sorted(files),
            "options": {key: str(value) for key, value in choices.items()},
        }

    def _stage(
        self, dense: Layers, fit: Ids, probe: Ids, held: Ids, command: Sequence[str]
    ) -> None:
        """Write the checkpoint, all of it, inside the spool."""
        cut, trials = self._cut(dense, probe)
        walk = self._walk(dense, cut, fit)
        state = walk.start(batches(fit, self.mapping), [held])
        seconds, final = self._layers(walk, state)
        measured = Probe.of(self.checkpoint, dense, held)
        shards = [shard_name(i + 1, len(cut.layers) + 1) for i in range(len(cut.layers) + 1)]
        write_shard(self.staged / shards[-1], outer_entries(self.mapping))
        config = cut_config(dict(self.checkpoint.config), self.mapping, cut)
        body = self._provenance(cut, trials, seconds, measured, final)
        body |= {"edgekit": __version__, "command": list(command)}
        body |= {"source": self._source(), "tokens": int(fit.size), "tunes": self.options.tunes}
        write_rest(self.staged, self.checkpoint, config, body, shards)

    def _walk(self, dense: Layers, cut: Cut, fit: Ids) -> Walk:
        recipe, seen = self.recipe, list[Effects]()
        if cut == whole(self.mapping):
            recipe = replace(recipe, tunes=False)  # nothing to make up for: bit for bit
        elif recipe.metric.needs_effect:
            seen = effects(self.checkpoint, dense, batches(fit, self.mapping))
        return Walk(self.checkpoint, dense, cut, recipe, seen)

    def _cut(self, dense: Layers, ids: Ids) -> tuple[Cut, list[Json]]:
        """The best combination by measured loss; kept in the spool for `resume`."""
        path = self.spool.folder / "cut.json"
        if path.is_file():
            body = json.loads(path.read_text())
            return Cut(**body["cut"] | {"layers": tuple(body["cut"]["layers"])}), body["trials"]
        chooser = Chooser(self.checkpoint, dense, self.options.search, self.options.seed)
        cut, trials = chooser.choose(self.cuts, ids, self.progress)
        body = {"cut": asdict(cut), "trials": trials}
        write_atomically(path, json.dumps(body).encode())
        return cut, trials

    def _layers(self, walk: Walk, state: State) -> tuple[list[float], State]:
        """Prune and write every layer that is not written yet."""
        n = len(walk.cut.layers)
        state, seconds = self._resumed(state)
        self.progress.start("prune", n)
        self.progress.advance(state.position)
        before = time.monotonic()
        for index, layer, after in walk.run(state):
            entries = layer_entries(layer, self.mapping, index, after.position - 1)
            write_shard(self.staged / shard_name(after.position, n + 1), entries)
            seconds.append(round(time.monotonic() - before, 3))
            self._keep(after, seconds)
            self.progress.advance(1)
            del layer, entries  # the next layer needs their room
            before, state = time.monotonic(), after
        return seconds, state

    def _resumed(self, state: State) -> tuple[State, list[float]]:
        done = sorted(self.spool.folder.glob("streams-*.npz"))
        if not done:
            return state, []
        with np.load(done[-1], allow_pickle=False) as arrays:
            seconds = arrays["seconds"].tolist()
            return state.with_arrays(len(seconds), arrays), seconds

    def _keep(self, state: State, seconds: list[float]) -> None:
        """Keep the streams behind the layers that are done, and only those."""
        path = self.spool.folder / f"streams-{state.position:04d}.npz"
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            np.savez(file, **state.arrays() | {"seconds": np.array(seconds)})
        partial.replace(path)
        for old in self.spool.folder.glob("streams-*.npz"):
            if old != path:
                old.unlink()

    def _provenance(
        self, cut: Cut, trials: list[Json], seconds: list[float], measured: Probe, final: State
    ) -> Json:
        every = range(self.mapping.hyper.n_layers)
        report = Report(
            path=str(self.output),
            ratio_asked=self.options.ratio,
            ratio=ratio_of(self.mapping, cut),
            n_parameters=n_parameters(self.mapping, cut),
            source_parameters=n_parameters(self.mapping, whole(self.mapping)),
            kept=kept(self.mapping, cut),
            removed_layers=[i for i in every if i not in cut.layers],
            metric=self.options.metric,
            kl_mean=max(measured.divergence(final.others[0]), 0.0),
            ppl=measured.perplexity(final.others[0]),
            ref_ppl=measured.perplexity(measured.inputs[-1]),
            trials=trials,
            layer_seconds=seconds,
            seconds=round(time.monotonic() - self.started, 3),
        )
        return asdict(report)

    def _source(self) -> Json:
        return {
            "name": self.checkpoint.folder.resolve().name,
            "files": source_files(self.checkpoint),
        }
