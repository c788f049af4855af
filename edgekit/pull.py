"""``edgekit pull``: of an artifact elsewhere, fetch what a budget needs; more of it later.

That is the manifest, the base, and the beginning of ``.levels`` up to the last level that the plan
for the budget loads: the depth is then the one that the whole artifact would give. Every part is
hashed as it comes, and so is what an earlier try left, before it is built upon.

A new artifact is made in a hidden folder beside its final name, which it gets when it is whole.
``.levels`` grows where it stands: it may end anywhere, so it is a valid artifact all the time.
"""

import json
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from edgekit.catalog import Catalog, read_manifest
from edgekit.checked import Checker, MismatchError
from edgekit.disk import PLAIN, disk_full_reported, held_alone, require_free, require_new_folder
from edgekit.errors import EdgekitError, RefusedError, UsageError
from edgekit.expert_plan import plan_any
from edgekit.manifest import MANIFEST_NAME, Json, Manifest
from edgekit.manifest_reader import loads
from edgekit.plan import Plan, plan_json
from edgekit.planner import Depths
from edgekit.progress import Progress
from edgekit.publish import move_into_place
from edgekit.remote import CutError, Source, open_source, without_secrets
from edgekit.sizes import format_size
from edgekit.spool import write_atomically
from edgekit.stack import Part

ORIGIN_NAME = "origin.json"  # where an artifact was pulled from
MAX_MANIFEST_BYTES = 1 << 28  # of one that is fetched; a model of 100 k levels has some 40 MB
MAX_TRIES = 6  # in a row, without a byte that came
LONGEST_WAIT = 8.0  # seconds between two tries
READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Wish:
    """What is asked for.

    Attributes:
        budget: Bytes of the process that will run it.
        context: Tokens; ``None`` takes the plan's default.
        kv_type: Of the KV cache.
        grow: Fetch more of an artifact that is here.
        force: Replace what stands at the output.
        dry_run: Fetch the manifest only, and write nothing.
    """

    budget: int
    context: int | None = None
    kv_type: str = "f16"
    grow: bool = False
    force: bool = False
    dry_run: bool = False


@dataclass(frozen=True)
class Pulled:
    """What was done; bytes.

    Attributes:
        artifact: The folder.
        url: Where it came from, without secrets.
        manifest_bytes: Needed of the manifest, all of it.
        base_bytes: Needed of the base, all of it.
        levels_bytes: Needed of ``.levels``, from its start.
        passed_over_bytes: Of these, levels that the plan does not load.
        total_bytes: All that is needed.
        transferred_bytes: Of it, those that came now.
        seconds: From the first request on.
        license: What the manifest says of the source's licence.
        plan: What the budget loads, as ``edgekit plan`` tells it.
    """

    artifact: str
    url: str
    manifest_bytes: int
    base_bytes: int
    levels_bytes: int
    passed_over_bytes: int
    total_bytes: int
    transferred_bytes: int
    seconds: float
    license: str | None
    plan: Json


def pull(url: str | None, output: Path, wish: Wish, progress: Progress) -> Pulled:
    """Fetch the artifact at ``url`` into ``output``, as deep as the budget needs.

    Args:
        url: Of its folder; ``None`` takes the one it was pulled from, with ``grow`` only.
        output: A folder that does not exist, or with ``grow`` one that holds the artifact.
        wish: What is asked for.
        progress: Told how far it is.

    Raises:
        UsageError: There is no artifact at the URL, or the output is no place for it.
        DoesNotFitError: Not even the lowest depth fits the budget.
        DiskFullError: There is not enough room.
        RefusedError: What the server sends is corrupt, or not what was asked for.
        EdgekitError: The connection broke again and again; what came stays for the next try.
    """
    started = time.monotonic()
    _check_output(output, wish)
    url = url or _origin(output)
    source = open_source(url, progress)
    text = _manifest_text(source)
    manifest = loads(text)
    if not manifest.has_gguf:
        raise UsageError(
            f"the artifact at {without_secrets(url)} is for ONNX Runtime alone, which has no "
            "levels to choose from; copy its folder"
        )
    _check_names(manifest)
    catalog = Catalog(output, manifest, manifest.levels.n_bytes)
    plan = plan_any(catalog, wish.budget, wish.context, wish.kv_type)
    needed = _needed(output, url, text, catalog, plan)
    progress.note(_in_words(needed))
    if not wish.dry_run:
        job = _Job(source, manifest, text, needed.levels_bytes, progress)
        with disk_full_reported(f"pulling to {output}", "make room and repeat the command"):
            job.grow(output) if wish.grow else job.make(output)
        _remember(output, url)
    seconds = round(time.monotonic() - started, 3)
    return replace(needed, transferred_bytes=source.n_read, seconds=seconds)


def _manifest_text(source: Source) -> bytes:
    failures = 0
    while True:
        try:
            return source.small(MANIFEST_NAME, MAX_MANIFEST_BYTES)
        except CutError as error:
            failures += 1
            _wait(failures, error)


def levels_prefix(catalog: Catalog, depths: Depths) -> int:
    """How many bytes of ``.levels``, from its start, hold all that ``depths`` load."""
    ends = (
        level.end
        for stack in catalog.stacks
        for level in stack.levels[1 : stack.depth_of(depths.tier(stack.name))]
    )
    return max(ends, default=0)


def _needed(output: Path, url: str, text: bytes, catalog: Catalog, plan: Plan) -> Pulled:
    """What the plan needs; nothing of it came yet."""
    manifest, stop = catalog.manifest, levels_prefix(catalog, plan.depths)
    return Pulled(
        artifact=str(output),
        url=without_secrets(url),
        manifest_bytes=len(text),
        base_bytes=manifest.base.n_bytes,
        levels_bytes=stop,
        passed_over_bytes=passed_over(catalog, plan.depths, stop),
        total_bytes=len(text) + manifest.base.n_bytes + stop,
        transferred_bytes=0,
        seconds=0.0,
        license=_plain(manifest.source.get("license")),
        plan=plan_json(catalog, plan),
    )


def passed_over(catalog: Catalog, depths: Depths, stop: int) -> int:
    """Bytes of levels that are whole before ``stop`` and that ``depths`` do not load."""
    return sum(
        level.n_bytes
        for stack in catalog.stacks
        for level in stack.levels[stack.depth_of(depths.tier(stack.name)) :]
        if level.end <= stop
    )


def _in_words(needed: Pulled) -> str:
    n_others = needed.passed_over_bytes
    others = f" ({format_size(n_others)} of them for other budgets)" if n_others else ""
    return (
        f"the budget needs {format_size(needed.total_bytes)}: "
        f"{format_size(needed.manifest_bytes)} of manifest, {format_size(needed.base_bytes)} of "
        f"base, {format_size(needed.levels_bytes)} of levels{others}"
    )


def _plain(value: object) -> str | None:
    """A name that may be printed, of a manifest that says anything."""
    return value if isinstance(value, str) and value.isprintable() and len(value) < 100 else None


def _check_output(output: Path, wish: Wish) -> None:
    if wish.grow and wish.force:
        raise UsageError("--grow adds to what is here, --force replaces it; give one of them")
    if wish.grow:
        if not (output / MANIFEST_NAME).is_file():
            raise UsageError(f"{output} holds no artifact to grow; pull it without --grow")
    elif output.is_dir() and not output.is_symlink() and not wish.force:
        hint = "fetch more of it with --grow, or replace it with --force"
        raise UsageError(f"{output} exists; choose another -o, {hint}")
    else:
        require_new_folder(output, wish.force, MANIFEST_NAME)


def _check_names(manifest: Manifest) -> None:
    """Names of files are plain already; here, that none takes another's place."""
    names = [manifest.base.name, manifest.levels.name, MANIFEST_NAME, ORIGIN_NAME]
    if len({name.casefold() for name in names}) != len(names):
        raise RefusedError(
            f"{MANIFEST_NAME} names the files {manifest.base.name!a} and {manifest.levels.name!a}, "
            "of which one would replace another; refused"
        )


def _origin(folder: Path) -> str:
    """The URL that the artifact in ``folder`` was pulled from."""
    try:
        return str(json.loads((folder / ORIGIN_NAME).read_bytes())["url"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{folder} does not tell where it came from; give the URL") from error


def _remember(folder: Path, url: str) -> None:
    """Keep the URL for the next time, unless there are secrets in it."""
    if url == without_secrets(url):
        write_atomically(folder / ORIGIN_NAME, json.dumps({"url": url}).encode() + b"\n")


class _Job:
    """One artifact on its way."""

    def __init__(
        self, source: Source, manifest: Manifest, text: bytes, stop: int, progress: Progress
    ) -> None:
        self._source, self._manifest, self._text = source, manifest, text
        self._stop, self._progress = stop, progress

    def make(self, output: Path) -> None:
        """Fetch into a hidden folder, which then gets its name."""
        staged = output.with_name(f".{output.name}.pull")
        if staged.is_symlink():
            raise RefusedError(f"{staged} is a link; remove it")
        staged.mkdir(parents=True, exist_ok=True)
        with held_alone(staged):
            base, levels = self._files(staged)
            for file in (base, levels):
                file.check()
            self._fetch(staged, (base, levels))
            write_atomically(staged / MANIFEST_NAME, self._text)
            self._sweep(staged)
            move_into_place(staged, output)

    def grow(self, output: Path) -> None:
        """Append to ``.levels`` where it stands."""
        if read_manifest(output) != self._manifest:
            raise RefusedError(
                f"{output} is another artifact than the one at the URL, or another version of it; "
                "pull into a new folder"
            )
        with held_alone(output):
            base, levels = self._files(output)
            if not base.path.is_file() or base.path.stat().st_size != base.checker.stop:
                raise RefusedError(f"{base.path} is not whole; pull again with --force")
            levels.check(is_published=True)
            self._fetch(output, (levels,))

    def _files(self, folder: Path) -> tuple["_File", "_File"]:
        m = self._manifest
        header = Part(0, m.header_bytes, m.header_sha256)
        lowest = [part for stack in m.stacks for part in stack.levels[0].parts]
        above = [p for stack in m.stacks for level in stack.levels[1:] for p in level.parts]
        return (
            _File(folder / m.base.name, [header, *lowest], m.base.n_bytes, m.base.n_bytes),
            _File(folder / m.levels.name, above, self._stop, m.levels.n_bytes),
        )

    def _fetch(self, folder: Path, files: Iterable["_File"]) -> None:
        to_come = sum(file.to_come for file in files)
        require_free(folder, to_come, f"pulling to {folder}")
        self._progress.start("download", to_come)
        for file in files:
            file.fetch(self._source, self._progress)

    def _sweep(self, staged: Path) -> None:
        """Remove what a try with another version of the artifact left."""
        names = {MANIFEST_NAME, self._manifest.base.name, self._manifest.levels.name}
        for path in staged.iterdir():
            if path.name not in names:
                path.unlink()


class _File:
    """A file that is fetched from where its sound beginning ends."""

    def __init__(self, path: Path, parts: list[Part], stop: int, size: int) -> None:
        self.path, self._size = path, size
        try:
            self.checker = Checker(parts, stop)
        except RefusedError as error:
            raise RefusedError(f"{MANIFEST_NAME}: {path.name}: {error}; refused") from error

    @property
    def to_come(self) -> int:
        """Bytes that are not here."""
        return self.checker.stop - self.checker.n_bytes

    def check(self, *, is_published: bool = False) -> None:
        """Hash what is here; cut off what is not sound, unless the file is in use."""
        with self._opened() as file:
            try:
                while block := file.read(min(READ_BYTES, self.to_come)):
                    self.checker.feed(block)
            except MismatchError as error:
                if is_published:
                    raise RefusedError(
                        f"{self.path} is corrupt: {error}; pull again with --force"
                    ) from error
                self._cut(file, error.part.offset)
            if not is_published:
                file.truncate(self.checker.n_bytes)

    def fetch(self, source: Source, progress: Progress) -> None:
        """Append what is missing; try again as long as bytes come."""
        fresh_from, failures = self.checker.n_bytes, 0
        with self._opened() as file:
            while self.to_come:
                before = self.checker.n_bytes
                try:
                    self._append(file, source, progress)
                except CutError as error:
                    failures = failures + 1 if self.checker.n_bytes == before else 1
                    _wait(failures, error)
                except MismatchError as error:
                    self._cut(file, error.part.offset)
                    if error.part.offset >= fresh_from:
                        raise RefusedError(
                            f"{self.path.name} as it comes is corrupt: {error} than the manifest "
                            "says; get the artifact from another server"
                        ) from error
                    fresh_from = error.part.offset  # its beginning was here before: once more
            file.flush()
            os.fsync(file.fileno())

    def _append(self, file: BinaryIO, source: Source, progress: Progress) -> None:
        file.seek(self.checker.n_bytes)
        span = self.checker.n_bytes, self.checker.stop, self._size
        for block in source.blocks(self.path.name, *span):
            file.write(block)
            self.checker.feed(block)
            progress.advance(len(block))

    def _cut(self, file: BinaryIO, offset: int) -> None:
        file.flush()
        file.truncate(offset)
        self.checker.rewind(offset)

    def _opened(self) -> BinaryIO:
        flags = os.O_RDWR | os.O_CREAT | PLAIN
        return os.fdopen(os.open(self.path, flags, 0o644), "r+b")


def _wait(failures: int, error: CutError) -> None:
    """Wait before the next try, or give up."""
    if failures == MAX_TRIES:
        raise EdgekitError(
            f"{error}; tried {failures} times, repeat the command to go on"
        ) from error
    time.sleep(min(LONGEST_WAIT, 0.25 * 2 ** (failures - 1)))
