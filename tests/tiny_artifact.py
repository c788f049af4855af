"""A small artifact to run, damage and lie about: a random Llama, converted without statistics."""

from pathlib import Path

from bench.checkpoints import Shape, make_checkpoint

from edgekit.convert import Options, convert
from edgekit.progress import Silent

SHAPE = Shape(
    num_hidden_layers=1,
    hidden_size=256,
    intermediate_size=256,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    vocab_size=512,
)
# 40 M parameters: 80 MiB of weights at the top depth, 14 MiB at the lowest
LARGER = Shape(
    num_hidden_layers=6,
    hidden_size=768,
    intermediate_size=2048,
    num_attention_heads=12,
    num_key_value_heads=4,
    head_dim=64,
    vocab_size=4096,
)
UNMEASURED = Options(statistics=False, measure=False, jobs=2)


def make_artifact(parent: Path, shape: Shape = SHAPE, options: Options = UNMEASURED) -> Path:
    """Make ``parent/checkpoint`` and convert it to ``parent/artifact``, which is returned."""
    checkpoint = make_checkpoint(parent / "checkpoint", shape)
    convert(checkpoint, parent / "artifact", options, Silent(), ["edgekit", "convert"])
    return parent / "artifact"
