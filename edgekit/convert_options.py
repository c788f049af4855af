"""What a conversion is asked for, checked before any work begins."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgekit.codecs import CODECS
from edgekit.errors import UnknownNameError, UsageError
from edgekit.kernels.ggml import TYPES
from edgekit.kernels.slices import BLOCKS
from edgekit.stack import SOURCE

FORMATS = ("gguf", "onnx")
DEFAULT_TIERS = CODECS["nested"].tiers


@dataclass(frozen=True)
class Options:
    """What a conversion is asked for.

    Attributes:
        tiers: Lowest first; ``source`` last when the original values are kept.
        codec: Key of `CODECS`.
        formats: For which runtimes: of `FORMATS`.
        block_size: ONNX: weights that share a scale.
        error_feedback: ONNX: key of `CARRIED`, the error that is carried on from column to column;
            ``None`` rounds each weight by itself.
        prune: Share of all parameters to remove first; 0 converts the checkpoint as it is.
        calibration: Text to calibrate on; ``None`` takes the text that edgekit ships.
        imatrix: A statistics file of llama-imatrix or edgekit to use instead of calibrating.
        statistics: False converts without any statistics.
        save_imatrix: Where to also write the statistics, for llama-quantize.
        measure: Measure quality at a dozen budgets at the end.
        column_group: Of the codec `bitstack`: columns that have rank-1 factors of their own; 0:
            factors of a higher rank over all columns.
        load_order: Key of `LOAD_ORDERS`.
        engine: Key of `ENGINES`: what runs the jobs.
        address: Of a Ray cluster; ``None`` starts one on this machine.
        jobs: Tensors that are encoded at once.
        resume: Go on where the same conversion was stopped.
        force: Replace an existing artifact.
    """

    tiers: tuple[str, ...] = DEFAULT_TIERS
    codec: str = "nested"
    formats: tuple[str, ...] = ("gguf",)
    block_size: int = 64
    error_feedback: str | None = None
    prune: float = 0.0
    calibration: Path | None = None
    imatrix: Path | None = None
    statistics: bool = True
    save_imatrix: Path | None = None
    measure: bool = True
    column_group: int = 0
    load_order: str = "kl"
    engine: str = "local"
    address: str | None = None
    jobs: int = os.cpu_count() or 1
    resume: bool = False
    force: bool = False


def check_options(options: Options) -> None:
    """Check what can be told before the checkpoint is opened.

    Raises:
        UsageError: The tiers are no chain, or the first needs statistics that are switched off.
    """
    codec = CODECS[options.codec]
    codec.check_tiers(options.tiers)
    if options.column_group and options.codec != "bitstack":
        raise UsageError(f"--column-group is for --codec bitstack, not for {options.codec}")
    check_formats(options.formats, options.block_size)
    if options.error_feedback and "onnx" not in options.formats:
        raise UsageError(
            f"--error-feedback is for ONNX codes, not for {','.join(options.formats)}; add "
            "--format onnx"
        )
    if options.error_feedback and not options.statistics:
        raise UsageError(
            "--error-feedback needs a text to calibrate on; leave --no-calibration out"
        )
    if options.save_imatrix and not options.statistics:
        raise UsageError("--no-calibration leaves nothing for --save-imatrix; leave one out")
    if options.address and options.engine == "local":
        raise UsageError("--address is of a Ray cluster; add --engine ray")
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
