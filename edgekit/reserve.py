"""Ask llama.cpp what it would reserve for a model, without reading a weight.

A model opened with ``no_alloc`` and a context on it make llama.cpp plan every buffer and log the
sizes. The log is no API: it is read strictly, and tests pin its lines. An assertion of ggml ends
the process, so `measure_memory` asks in a child process.
"""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from gguf import MODEL_ARCH_NAMES

from edgekit.arch import ARCHS
from edgekit.artifact import Artifact, open_artifact
from edgekit.assembly import Assembly
from edgekit.errors import EdgekitError
from edgekit.footprint import BATCHES, CELLS, Shape, kv_bytes, kv_choices, shape_of
from edgekit.llama import Context, Model, capture_log, open_model
from edgekit.manifest import Json
from edgekit.planner import uniform
from edgekit.progress import Progress

MIB = 1 << 20
LONGEST = 1 << 17  # tokens; beyond, the line through the last two points goes on
TIMEOUT_SECONDS = 120
_KV = re.compile(r"llama_kv_cache: size = +([\d.]+) MiB")
_COMPUTE = re.compile(r"(?:compute|output) buffer size = +([\d.]+) MiB")
ROUNDING = 0.005 * MIB  # of a line of the log


@dataclass(frozen=True)
class Reserved:
    """What a context takes: its KV caches, and the buffers for computing and for logits; bytes."""

    kv_bytes: int
    compute_bytes: int


def reserved(model: Model, context: int, kv_type: str, batch: int) -> Reserved:
    """Make a context on a model that was opened with ``no_alloc`` and read what it takes.

    Raises:
        EdgekitError: The log does not tell.
    """
    with (
        capture_log() as lines,
        Context(model, context, n_batch=batch, kv_type=kv_type, n_threads=1),
    ):
        return Reserved(_sum(_KV, lines, "KV cache"), _sum(_COMPUTE, lines, "compute buffers"))


def _sum(pattern: re.Pattern[str], lines: Sequence[str], what: str) -> int:
    found = [float(match[1]) for line in lines if (match := pattern.search(line))]
    if not found:
        raise EdgekitError(
            f"llama.cpp's log does not tell the size of its {what}; "
            f"llama-cpp-python {version('llama_cpp_python')} writes it in another form"
        )
    return round(sum(found) * MIB + len(found) * ROUNDING)


def measure_memory(folder: Path, progress: Progress) -> Json:
    """What the artifact in ``folder`` takes besides weights and process: the manifest's ``memory``.

    Nothing is measured where the child process fails: a note says so, and plans take bounds.
    """
    command = [sys.executable, "-m", "edgekit.reserve", str(folder)]
    try:
        done = subprocess.run(
            command, capture_output=True, check=True, text=True, timeout=TIMEOUT_SECONDS
        )
        told: Json = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        progress.note(f"llama.cpp's buffers were not measured ({error}); plans take upper bounds")
        return {}
    for note in told.pop("notes"):
        progress.note(note)
    return told


def tell(folder: Path) -> Json:
    """Open the artifact as the loader does, but for its weights, and ask."""
    with open_artifact(folder) as artifact, _without_weights(artifact) as model:
        manifest = artifact.manifest
        windowed = windowed_layers(manifest.architecture, manifest.model)
        shape = shape_of(manifest.architecture, manifest.model, measured={"windowed": windowed})
        rows = [_row(model, shape, kv, batch) for kv in kv_choices(shape) for batch in BATCHES]
    return {
        "llama_cpp_python": version("llama_cpp_python"),
        "windowed": windowed,
        "compute": [row for row, _ in rows],
        "notes": sorted({note for _, notes in rows for note in notes}),
    }


def windowed_layers(architecture: str, model: Json) -> list[bool]:
    """Which layers attend in a window: the model's own pattern, or that of llama.cpp's graph.

    Empty where the model has no windows.
    """
    if not model.get(f"{architecture}.attention.sliding_window"):
        return []
    pattern = model.get(f"{architecture}.attention.sliding_window_pattern")
    if isinstance(pattern, list):
        return [bool(item) for item in pattern]
    rows = (arch for arch in ARCHS.values() if MODEL_ARCH_NAMES[arch.gguf] == architecture)
    arch = next((row for row in rows if row.window_every), None)
    layers = int(model[f"{architecture}.block_count"])
    return [arch.is_windowed(i) for i in range(layers)] if arch else []


def _without_weights(artifact: Artifact) -> Model:
    depths = uniform(artifact.stacks, lambda stack: stack.tiers[0])
    with Assembly(artifact, depths) as assembly:
        return open_model(assembly, header=assembly.gguf, no_alloc=True)


def _row(model: Model, shape: Shape, kv_type: str, batch: int) -> tuple[Json, list[str]]:
    """Compute buffers of one KV type and batch over contexts, and where the formula is off."""
    contexts = [CELLS << i for i in range(20) if CELLS << i <= max(2 * CELLS, _longest(shape))]
    sizes = [reserved(model, context, kv_type, min(batch, context)) for context in contexts]
    notes = [
        f"llama.cpp keeps {size.kv_bytes} bytes for a {kv_type} cache of {context} tokens, the "
        f"formula says {kv_bytes(shape, context, kv_type, batch)}; please report this"
        for context, size in zip(contexts, sizes, strict=True)
        if abs(size.kv_bytes - kv_bytes(shape, context, kv_type, batch)) > 4 * ROUNDING
    ]
    row: Json = {"kv_type": kv_type, "batch": batch, "contexts": contexts}
    return row | {"bytes": [size.compute_bytes for size in sizes]}, notes


def _longest(shape: Shape) -> int:
    return min(LONGEST, 2 * shape.context)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(tell(Path(sys.argv[1]))))
