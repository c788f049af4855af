"""``edgekit convert --dry-run``: what a conversion would write, told without writing it."""

from collections.abc import Sequence
from pathlib import Path

from edgekit.arch import Mapping, SourceTensor, map_checkpoint
from edgekit.checkpoint import Checkpoint
from edgekit.codecs import CODECS, Codec
from edgekit.convert import gguf_metadata
from edgekit.convert_options import Options, check_options
from edgekit.convert_report import Report, tier_bytes
from edgekit.disk import require_new_folder
from edgekit.errors import UsageError
from edgekit.manifest import MANIFEST_NAME
from edgekit.onnx.export import decoder_in
from edgekit.planner import resident_bytes
from edgekit.stack import SOURCE, Level, Part, Stack


def preview(folder: Path, output: Path, options: Options) -> Report:
    """What `convert` would make: memory to the byte, the artifact's size estimated.

    Raises:
        UsageError: Besides what `convert` raises: it is to prune first.
    """
    check_options(options)
    if options.prune:
        raise UsageError(
            "what --prune leaves is measured, not foreseen; see edgekit prune --dry-run, or leave "
            "one of --prune and --dry-run out"
        )
    checkpoint = Checkpoint.open(folder)
    require_new_folder(output, options.force, MANIFEST_NAME, folder)
    mapping = map_checkpoint(checkpoint)
    source = sum(checkpoint.files.values())
    has_onnx = "onnx" in options.formats
    onnx = _onnx_bytes(checkpoint, mapping, options.block_size) if has_onnx else 0
    if "gguf" not in options.formats:
        return Report(str(output), source, 0, 0, onnx, {}, len(mapping.tensors), 0.0)
    gguf_metadata(checkpoint, mapping)
    codec = CODECS[options.codec]
    stacks = [_empty_stack(tensor, codec, options.tiers) for tensor in mapping.tensors]
    base = sum(resident_bytes(stack, stack.tiers[0]) for stack in stacks)
    all_levels = int(codec.size_bound(options.tiers) * source)
    return Report(
        artifact=str(output),
        source_bytes=source,
        base_bytes=base,
        levels_bytes=all_levels - base,
        artifact_bytes=all_levels + onnx,
        tiers=tier_bytes(stacks, options.tiers),
        n_tensors=len(stacks),
        seconds=0.0,
    )


def _onnx_bytes(checkpoint: Checkpoint, mapping: Mapping, block: int) -> int:
    """Of the ONNX part, about: a byte per weight and three float16 scales per block.

    Raises:
        UnsupportedError: ONNX Runtime's operators cannot compute the model.
    """
    decoder_in(checkpoint, mapping)
    n_weights = sum(t.n_weights for t in mapping.tensors if t.quantizable)
    return round(n_weights * (1 + 6 / block))


def _empty_stack(tensor: SourceTensor, codec: Codec, tiers: Sequence[str]) -> Stack:
    """A stack whose levels have no bytes yet."""
    chain = codec.chain_of(tensor, tiers, True)
    parents = (None, *chain)
    levels = (
        Level(tensor.name, t, p, "", (Part(0, 0, ""),), 0.0, _type_of(codec, t, tensor.cols))
        for t, p in zip(chain, parents, strict=False)
    )
    return Stack(tensor.name, tensor.shape, tensor.source_type, tuple(levels))


def _type_of(codec: Codec, tier: str, cols: int) -> str:
    kind = SOURCE if tier == SOURCE else codec.expected_type(tier, cols)
    return "" if kind == tier else kind
