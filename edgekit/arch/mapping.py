"""A checkpoint's tensors under llama.cpp's names, row order and types.

`map_checkpoint` matches every tensor of a checkpoint with a row of `edgekit.arch.table`, through
gguf's TensorNameMap, or stops. It reads no weights except to see whether a stored output head is
the embedding; `SourceTensor.rows` reads them later, some rows at a time.
"""

import re
from collections import abc
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from gguf import MODEL_TENSOR, TENSOR_NAMES, TensorNameMap, get_tensor_name_map

from edgekit.arch.config import Hyper, find_arch, read_hyper
from edgekit.arch.metadata import general_metadata, hyper_metadata
from edgekit.arch.rope import llama3_factors, longrope_factors
from edgekit.arch.source import ITEM_BYTES, Piece, SourceTensor
from edgekit.arch.table import Arch
from edgekit.checkpoint import Checkpoint
from edgekit.errors import RefusedError, UnsupportedError
from edgekit.exporters.gguf_values import Value

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
# buffers that old checkpoints carry and no graph reads
UNUSED = re.compile(r"\.(rotary_emb\.inv_freq|attention\.masked_bias|attn\.masked_bias)$")
EXPERT = re.compile(r"^(.+\.experts)\.(\d{1,5})\.(\w+)\.weight$")
FUSED = re.compile(r"^(.+\.experts)\.(gate_up_proj|down_proj)(?:\.weight)?$")
SUFFIXES = (".weight", ".bias")
COMPARE_ROWS = 4096  # of the embedding at a time, some MiB


@dataclass(frozen=True, eq=False)
class Mapping:
    """A whole model at tier ``source``.

    Attributes:
        architecture: llama.cpp's name, ``general.architecture``.
        arch: The row it was mapped by.
        hyper: Its checked hyperparameters.
        metadata: Every key but ``tokenizer.*`` and ``general.file_type``.
        tensors: In the order of the GGUF.
        unused: Tensors of the checkpoint that no graph reads.
        notes: What llama.cpp computes otherwise, one line each.
    """

    architecture: str
    arch: Arch
    hyper: Hyper
    metadata: abc.Mapping[str, Value]
    tensors: tuple[SourceTensor, ...]
    unused: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding: tokens that the tokenizer's metadata must list."""
        return self.hyper.sizes["vocab"]


def allows_quantization(name: str, shape: tuple[int, ...]) -> bool:
    """Whether llama-quantize would quantize the tensor.

    The rules of ``tensor_allows_quantization`` in llama.cpp's ``src/llama-quant.cpp`` that can
    apply to the architectures of `edgekit.arch.table`. ggml does not count trailing extents of 1
    (leading ones here).
    """
    n_dims = len(shape)
    while n_dims > 1 and shape[len(shape) - n_dims] == 1:
        n_dims -= 1
    is_kept = "_norm.weight" in name or "ffn_gate_inp.weight" in name
    return n_dims >= 2 and name.endswith("weight") and not is_kept


def map_checkpoint(checkpoint: Checkpoint) -> Mapping:
    """Map a checkpoint onto llama.cpp's tensors and metadata.

    Raises:
        UnsupportedError: The architecture, a tensor, a dtype or a choice in the config is not one
            that edgekit or llama.cpp's graph knows.
        RefusedError: A field of the config is missing or out of range, a tensor is missing or has
            another shape than the config asks for.
    """
    arch = find_arch(checkpoint.config)
    hyper = read_hyper(arch, checkpoint.config, f"{checkpoint.folder}/config.json")
    found, unused = _found(checkpoint, arch, hyper)
    notes = list(hyper.notes)
    _tie(checkpoint, arch, hyper, found, unused, notes)
    tensors = tuple(_tensors(checkpoint, arch, hyper, found))
    general = general_metadata(checkpoint, arch, {t.name: t.shape for t in tensors})
    return Mapping(
        architecture=str(general["general.architecture"].value),
        arch=arch,
        hyper=hyper,
        metadata=general | hyper_metadata(arch, hyper, checkpoint.config, str(checkpoint.folder)),
        tensors=tensors,
        unused=tuple(sorted(unused)),
        notes=(*checkpoint.notes, *notes),
    )


Found = dict[str, dict[int, Piece]]  # GGUF name -> expert (0 without) -> rows


def _found(checkpoint: Checkpoint, arch: Arch, hyper: Hyper) -> tuple[Found, list[str]]:
    """Every tensor of the checkpoint under its GGUF name, and those that nothing reads."""
    names = get_tensor_name_map(arch.gguf, hyper.n_layers)
    found: Found = {}
    unused: list[str] = []
    unknown: list[str] = []
    for tensor in checkpoint.tensors:
        if UNUSED.search(tensor):
            unused.append(tensor)
            continue
        places = list(_places(checkpoint, names, tensor))
        if not places:
            unknown.append(tensor)
        for name, expert, piece in places:
            if expert in found.setdefault(name, {}):
                raise RefusedError(
                    f"{checkpoint.folder}: {tensor!r} and {found[name][expert].tensor!r} are both "
                    f"'{name}'; keep one of them"
                )
            found[name][expert] = piece
    allowed = set(_expected(arch, hyper, all_roles=True))
    unknown += [p.tensor for name in found if name not in allowed for p in found[name].values()]
    if HEAD in unknown and hyper.is_tied and EMBEDDING in checkpoint.tensors:
        unknown.remove(HEAD)  # Gemma-2: the graph has no place for it; _tie compares it
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise UnsupportedError(
            f"{checkpoint.folder}: llama.cpp's {arch.model_type} graph has no place for "
            f"{', '.join(map(repr, sorted(unknown)[:3]))}{more}"
        )
    return {name: found[name] for name in found if name in allowed}, unused


def _places(
    checkpoint: Checkpoint, names: TensorNameMap, tensor: str
) -> Iterator[tuple[str, int, Piece]]:
    """GGUF name, expert and rows for a checkpoint's tensor; several for fused experts."""
    ref = checkpoint.tensors[tensor]
    if match := FUSED.match(tensor):
        stem, role = match.groups()
        roles = ("gate_proj", "up_proj") if role == "gate_up_proj" else ("down_proj",)
        if len(ref.shape) != 3 or ref.shape[1] % len(roles):
            raise RefusedError(f"{tensor!r} has the shape {list(ref.shape)}; experts need three")
        n = ref.shape[1] // len(roles)
        for part, role in enumerate(roles):
            name = names.get_name(f"{stem}.{role}.weight", SUFFIXES)
            for expert in range(ref.shape[0] if name else 0):
                yield str(name), expert, Piece(tensor, expert * ref.shape[1] + part * n, n)
        return
    expert, plain = 0, tensor
    if match := EXPERT.match(tensor):
        expert, plain = int(match[2]), f"{match[1]}.{match[3]}.weight"
    name = names.get_name(plain, SUFFIXES)
    if name is not None:
        yield name, expert, Piece(tensor, 0, ref.n_rows)


def _expected(arch: Arch, hyper: Hyper, all_roles: bool) -> dict[str, tuple[str, tuple[int, ...]]]:
    """GGUF name -> role and shape, in the order of the GGUF; ``all_roles``: optional ones too."""
    roles = {
        role.rstrip("?"): tuple(hyper.sizes[word] for word in extents.split())
        for role, extents in arch.tensors.items()
        if all_roles or not role.endswith("?")
    }
    blocks = [role for role in roles if "{bid}" in _gguf_name(role)]
    order = [(role, 0) for role in roles if role == "TOKEN_EMBD.weight"]
    order += [(role, layer) for layer in range(hyper.n_layers) for role in blocks]
    order += [(role, 0) for role in roles if role not in blocks and role != "TOKEN_EMBD.weight"]
    return {_gguf_name(role).format(bid=layer): (role, roles[role]) for role, layer in order}


def _gguf_name(role: str) -> str:
    word, suffix = role.split(".")
    return f"{TENSOR_NAMES[MODEL_TENSOR[word]]}.{suffix}"


def _tie(
    checkpoint: Checkpoint,
    arch: Arch,
    hyper: Hyper,
    found: Found,
    unused: list[str],
    notes: list[str],
) -> None:
    """Settle whether the output head is the embedding, as transformers does when it loads.

    A stored head that equals the embedding is unused; one that differs counts although the config
    ties it. Graphs that cannot fall back to the embedding get it a second time.
    """
    if not hyper.is_tied:
        return
    if HEAD in checkpoint.tensors and EMBEDDING in checkpoint.tensors:
        if _same(checkpoint, HEAD, EMBEDDING):
            found.pop("output.weight", None)
            unused.append(HEAD)
        elif "output.weight" in found:
            notes.append("config.json ties the output head, but the stored one differs: it is used")
            return
        else:
            raise UnsupportedError(
                f"{checkpoint.folder}: '{HEAD}' differs from the embedding; llama.cpp's "
                f"{arch.model_type} graph has no place for it"
            )
    if not arch.can_tie and "token_embd.weight" in found:
        found["output.weight"] = found["token_embd.weight"]


def _same(checkpoint: Checkpoint, one: str, two: str) -> bool:
    a, b = checkpoint.tensors[one], checkpoint.tensors[two]
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    for start in range(0, a.n_rows, COMPARE_ROWS):
        rows = slice(start, start + COMPARE_ROWS)
        left, right = (checkpoint.read(name, rows).view(np.uint8) for name in (one, two))
        if not np.array_equal(left, right):
            return False
    return True


def _tensors(
    checkpoint: Checkpoint, arch: Arch, hyper: Hyper, found: Found
) -> Iterator[SourceTensor]:
    """Every tensor of the GGUF, checked for shape and dtype."""
    required = set(_expected(arch, hyper, all_roles=False))
    if hyper.is_tied and arch.can_tie:
        required.discard("output.weight")
    for name, (role, shape) in _expected(arch, hyper, all_roles=True).items():
        if name in found:
            yield _tensor(checkpoint, arch, hyper, name, role, shape, found[name])
        elif name in required:
            raise RefusedError(
                f"{checkpoint.folder} lacks the tensor for '{name}' {list(shape)}; "
                "the checkpoint is incomplete: download it again"
            )
        if name == "token_embd.weight":
            yield from _constants(checkpoint, arch, hyper)


def _tensor(
    checkpoint: Checkpoint,
    arch: Arch,
    hyper: Hyper,
    name: str,
    role: str,
    shape: tuple[int, ...],
    pieces: dict[int, Piece],
) -> SourceTensor:
    n_experts = shape[0] if len(shape) == 3 else 1
    missing = set(range(n_experts)) ^ set(pieces)
    if missing:
        raise RefusedError(
            f"{checkpoint.folder}: '{name}' has {len(pieces)} experts, config.json asks for "
            f"{n_experts}; expert {min(missing)} is missing or too many"
        )
    for piece in pieces.values():
        _check_shape(checkpoint, name, piece, shape)
    if role == "FFN_GATE_INP_SHEXP.weight":
        shape = shape[1:]  # one row: ggml counts it as 1-D
    dtypes = {checkpoint.tensors[piece.tensor].dtype for piece in pieces.values()}
    is_norm = name.endswith("_norm.weight")
    is_wide = len(shape) == 1 or is_norm or not name.endswith(".weight") or len(dtypes) > 1
    is_wide |= role == "FFN_GATE_INP.weight"
    heads = {"ATTN_Q": hyper.n_heads, "ATTN_K": hyper.n_kv_heads}.get(role.split(".")[0], 0)
    return SourceTensor(
        name=name,
        shape=shape,
        source_type="F32" if is_wide else dtypes.pop(),
        quantizable=allows_quantization(name, shape),
        checkpoint=checkpoint,
        pieces=tuple(piece for _, piece in sorted(pieces.items())),
        heads=heads if arch.is_interleaved else 0,
        shift=arch.norm_shift if is_norm else 0.0,
    )


def _check_shape(checkpoint: Checkpoint, name: str, piece: Piece, shape: tuple[int, ...]) -> None:
    """The checkpoint's tensor is float and has the rows and columns of one expert of ``shape``."""
    ref = checkpoint.tensors[piece.tensor]
    if ref.dtype not in ITEM_BYTES:
        raise UnsupportedError(
            f"{checkpoint.folder}: {piece.tensor!r} is {ref.dtype}; edgekit converts BF16, F16 and "
            "F32: save the checkpoint in one of them"
        )
    is_fused = len(ref.shape) == 3 and len(shape) == 3
    got = (piece.n_rows, ref.cols) if is_fused else ref.shape
    want = shape[-2:]
    if got != want:
        raise RefusedError(
            f"{checkpoint.folder}: {piece.tensor!r} has the shape {list(got)}, config.json asks "
            f"for {list(want)} in '{name}'"
        )


def _constants(checkpoint: Checkpoint, arch: Arch, hyper: Hyper) -> Iterator[SourceTensor]:
    """Tensors that follow from the config: factors of the RoPE frequencies."""
    name, values = f"{checkpoint.folder}/config.json", {}
    if hyper.rope.kind == "llama3":
        values = {"rope_freqs.weight": llama3_factors(hyper.rope, name)}
    if hyper.rope.kind == "longrope":
        factors = longrope_factors(hyper.rope, name)
        values = {f"rope_factors_{key}.weight": array for key, array in factors.items()}
    for tensor, array in values.items():
        yield SourceTensor(tensor, array.shape, "F32", False, checkpoint, constant=array)
