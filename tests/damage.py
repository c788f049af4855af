"""An artifact's files, the bytes it gives, and ways to damage it."""

import random
from pathlib import Path

from edgekit.artifact import Artifact, open_artifact
from edgekit.assembly import Assembly
from edgekit.planner import Depths, uniform


def files_of(folder: Path) -> dict[str, Path]:
    """By kind: base, levels, manifest."""
    (base,) = folder.glob("*.gguf")
    (levels,) = folder.glob("*.levels")
    return {"base": base, "levels": levels, "manifest": folder / "edgekit.json"}


def top(artifact: Artifact) -> Depths:
    """Every tensor at its highest tier."""
    return uniform(artifact.stacks, lambda stack: stack.tiers[-1])


def assembled(folder: Path, depths: Depths | None = None) -> bytes:
    """The GGUF that llama.cpp would be given."""
    with open_artifact(folder) as artifact:
        assembly = Assembly(artifact, depths or top(artifact))
        return assembly.read(0, assembly.size)


def damaged(rng: random.Random, data: bytes, may_cut: bool) -> bytes:
    """One corruption: a bit, some bytes over others, bytes out, bytes in, or the end cut off."""
    at, n = rng.randrange(len(data)), rng.choice((1, 1, 2, 7, 64, 600))
    match rng.choice(("flip", "overwrite", "zero", "delete", "insert", *["cut"] * may_cut)):
        case "flip":
            return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        case "overwrite":
            return data[:at] + rng.randbytes(min(n, len(data) - at)) + data[at + n :]
        case "zero":
            return data[:at] + bytes(min(n, len(data) - at)) + data[at + n :]
        case "delete":
            return data[:at] + data[at + n :]
        case "insert":
            return data[:at] + rng.randbytes(n) + data[at:]
        case _:
            return data[:at]


def mixed(artifact: Artifact, seed: int = 0) -> Depths:
    """A tier at random for every tensor."""
    rng = random.Random(seed)
    return uniform(artifact.stacks, lambda stack: rng.choice(stack.tiers))


def damaged_copy(artifact: Path, parent: Path) -> Path:
    """The artifact with one bit of a level's payload flipped."""
    folder = parent / "damaged"
    folder.mkdir()
    for path in artifact.iterdir():
        data = bytearray(path.read_bytes())
        if path.suffix == ".levels":
            data[len(data) // 2] ^= 1
        (folder / path.name).write_bytes(data)
    return folder
