"""What a conversion is asked for, checked before any work begins."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgekit.codecs.nested import CHILDREN
from edgekit.errors import UnknownNameError, UsageError
from edgekit.kernels.ggml import TYPES, row_bytes
from edgekit.kernels.slices import BLOCKS
from edgekit.stack import SOURCE

FORMATS = ("gguf", "onnx")
DEFAULT_TIERS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0", SOURCE)


@dataclass(frozen=True)
class Options:
    """What a conversion is asked for.

    Attributes:
        tiers: Lowest first; ``source`` last when the original values are kept.
        codec: Key of `CODECS`.
        formats: For which runtimes: of `FORMATS`.
        block_size: ONNX: weights that share a scale.
        prune: Share of all parameters to remove first; 0 converts the checkpoint as it is.
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
    formats: tuple[str, ...] = ("gguf",)
    block_size: int = 64
    prune: float = 0.0
    calibration: Path | None = None
    imatrix: Path | None = None
    statistics: bool = True
    save_imatrix: Path | None = None
    measure: bool = True
    jobs: int = os.cpu_count() or 1
    resume: bool = False
    force: bool = False


def check_options(options: Options) -> None:
    """Check what can be told before the checkpoint is opened.

    Raises:
        UsageError: The tiers are no chain, or the first needs statistics that are switched off.
    """
    check_tiers(options.tiers)
    check_formats(options.formats, options.block_size)
    if "gguf" not in options.formats:
        return
    lowest = options.tiers[0]
    if not options.statistics and lowest != SOURCE and TYPES[lowest].needs_imatrix:
        raise UsageError(
            f"tier {lowest} cannot be quantized without an importance matrix; leave "
            "--no-calibration out, or give --imatrix FILE"
        )


def check_formats(formats: Sequence[str], block_size: int) -> None:
    """Check that there are such formats and blocks.

    Raises:
        UsageError: One is unknown or stands twice.
    """
    for name in formats:
        if name not in FORMATS:
            raise UnknownNameError("format", name, FORMATS)
    if not formats or len(set(formats)) != len(formats):
        raise UsageError(f"formats {','.join(formats)}: name each once: {','.join(FORMATS)}")
    if block_size not in BLOCKS:
        raise UsageError(f"blocks of {block_size}: choose {', '.join(map(str, BLOCKS))}")


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
