"""The central promise: a tier is bit for bit what a dedicated quantization gives.

Oracles: `llama_model_quantize(pure)` on our source-tier file, `ggml_quantize_chunk` on rows read
with gguf's reader, and the checkpoint's values as `safetensors` loads them.
"""

import ctypes
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest
import torch
from converted import Converted, plain, tiny, weighted
from safetensors.torch import load_file
from stock import quantize

from edgekit.arch import ARCHS
from edgekit.artifact import open_artifact
from edgekit.convert_options import DEFAULT_TIERS
from edgekit.errors import UsageError
from edgekit.materialize import materialize
from edgekit.plan import plan_tier

SAMPLES = Path(__file__).resolve().parent.parent / "samples"
FTYPES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}  # the others are called alike
DTYPES = ("bfloat16", "float16", "float32")
# every architecture with rows that are multiples of 256 and with rows that are not, even of 32
CASES = [
    (model_type, width, DTYPES[(i + j) % 3], (i + j) % 2 == 0)
    for i, model_type in enumerate(sorted(ARCHS))
    for j, width in enumerate(("wide", "narrow"))
]
LIBRARY = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))
LIBRARY.ggml_quantize_chunk.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3]
LIBRARY.ggml_quantize_chunk.argtypes += [ctypes.c_void_p]
LIBRARY.ggml_quantize_chunk.restype = ctypes.c_size_t

Tensors = dict[str, gguf.ReaderTensor]
F32Array = npt.NDArray[np.float32]


def tensors_of(path: Path) -> Tensors:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def at_tier(artifact: Path, tier: str, folder: Path) -> Path:
    path = folder / f"{tier}.gguf"
    with open_artifact(artifact) as opened:
        materialize(opened, plan_tier(opened, tier).depths, path)
    return path


def assert_same(ours: Tensors, theirs: Tensors, names: Callable[[str], bool] = bool) -> None:
    assert ours.keys() == theirs.keys()
    for name in filter(names, ours):
        a, b = ours[name], theirs[name]
        assert (name, a.tensor_type, [*a.shape]) == (name, b.tensor_type, [*b.shape])
        assert np.array_equal(a.data.view(np.uint8), b.data.view(np.uint8)), (name, a.tensor_type)


def rows_of(tensor: gguf.ReaderTensor) -> F32Array:
    """Float32 rows of a tensor in BF16, F16 or F32, by gguf's own dequantizer."""
    values = gguf.quants.dequantize(np.asarray(tensor.data), tensor.tensor_type)
    return np.ascontiguousarray(values, np.float32).reshape(-1, int(tensor.shape[0]))


def chunk(kind: int, rows: F32Array, weights: F32Array | None) -> bytes:
    """What ``ggml_quantize_chunk`` makes of ``rows``."""
    _, row_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
    block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)][0]
    out = ctypes.create_string_buffer(rows.shape[1] // block * row_bytes * len(rows))
    pointer = None if weights is None else weights.ctypes.data
    n = LIBRARY.ggml_quantize_chunk(kind, rows.ctypes.data, out, 0, *rows.shape, pointer)
    assert n == len(out)
    return out.raw


def assert_chunks(ours: Tensors, source: Tensors, weights: Mapping[str, F32Array] | None) -> None:
    """The first and last rows of every expert are what ggml makes of them."""
    for name, tensor in ours.items():
        if tensor.tensor_type == source[name].tensor_type:
            continue
        rows = rows_of(source[name])
        n_experts = int(tensor.shape[2]) if len(tensor.shape) == 3 else 1
        per_expert = len(rows) // n_experts
        blocks = tensor.data.view(np.uint8).reshape(len(rows), -1)
        for expert in range(n_experts):
            columns = weights[name][expert] if weights and name in weights else None
            for first in {0, max(0, per_expert - 3)}:
                part = slice(expert * per_expert + first, expert * per_expert + first + 3)
                wanted = chunk(int(tensor.tensor_type), rows[part], columns)
                assert blocks[part].tobytes() == wanted, (name, expert)


def assert_bit_exact(made: Converted, folder: Path, tiers: tuple[str, ...]) -> None:
    source_path = at_tier(made.artifact, "source", folder)
    source = tensors_of(source_path)
    for tier in tiers:
        ours = tensors_of(at_tier(made.artifact, tier, folder))
        reference = folder / f"{tier}-stock.gguf"
        quantize(source_path, reference, FTYPES.get(tier, tier), weights=made.weights)
        assert_same(ours, tensors_of(reference))
        assert_chunks(ours, source, made.weights)


def checkpoint_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


def bits(tensor: torch.Tensor) -> F32Array:
    """Values widened to float32: exact from BF16 and F16, so equal bits are equal values."""
    return tensor.to(torch.float32).numpy()


def sorted_rows(matrices: Iterator[F32Array]) -> list[bytes]:
    """All rows of all matrices, whatever their order."""
    return sorted(row.tobytes() for matrix in matrices for row in matrix)


def assert_source_is_the_checkpoint(path: Path, checkpoint: Path, dtype: str) -> None:
    """No row is lost, changed or made up; matrices keep the checkpoint's type but for routers."""
    theirs, ours = checkpoint_tensors(checkpoint), tensors_of(path)
    matrices = [t for t in ours.values() if len(t.shape) > 1]
    rows = sorted_rows(rows_of(t) for t in matrices)
    wanted = (
        bits(t).reshape(-1, t.shape[-1]) for t in theirs.values() if t.ndim > 1 and len(t) > 1
    )
    assert rows == sorted_rows(wanted)
    kinds = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
    for tensor in ours.values():
        widened = len(tensor.shape) == 1 or "ffn_gate_inp" in tensor.name
        assert tensor.tensor_type.name == ("F32" if widened else kinds[dtype]), tensor.name


@pytest.mark.parametrize(("model_type", "width", "dtype", "has_imatrix"), CASES)
def test_every_tier_of_every_architecture_is_what_llama_quantize_writes(
    tmp_path: Path, model_type: str, width: str, dtype: str, has_imatrix: bool
) -> None:
    small = {"num_hidden_layers": 1, "intermediate_size": 256} if width == "wide" else {}
    if small and model_type in ("qwen2_moe", "qwen3_moe"):
        small["num_experts"] = 4
    checkpoint = tiny(tmp_path / "checkpoint", model_type, dtype=dtype, width=width, **small)
    made = (weighted if has_imatrix else plain)(checkpoint, tmp_path / "artifact")
    assert_bit_exact(made, tmp_path, DEFAULT_TIERS[:-1])
    assert_source_is_the_checkpoint(tmp_path / "source.gguf", checkpoint, dtype)


@pytest.fixture(scope="module", params=["tiny-llama", "tiny-moe"])
def sample(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Converted:
    """The sample as an artifact; of random weights where the trained ones are not there."""
    checkpoint = SAMPLES / request.param
    folder = tmp_path_factory.mktemp(request.param)
    if not (checkpoint / "model.safetensors").is_file():
        kind = "llama" if request.param == "tiny-llama" else "qwen3_moe"
        checkpoint = tiny(folder / "checkpoint", kind, dtype="bfloat16", width="wide")
    return weighted(checkpoint, folder / "artifact")


def test_every_tier_of_the_samples_is_what_llama_quantize_writes(
    sample: Converted, tmp_path: Path
) -> None:
    assert_bit_exact(sample, tmp_path, DEFAULT_TIERS[:-1])


def test_source_of_the_samples_is_the_checkpoint_tensor_by_tensor(
    sample: Converted, tmp_path: Path
) -> None:
    """Row order: as it is, but Llama's Q and K with the halves of each head interleaved."""
    path = at_tier(sample.artifact, "source", tmp_path)
    assert_source_is_the_checkpoint(path, sample.checkpoint, "bfloat16")
    ours = tensors_of(path)
    reader = gguf.GGUFReader(path)
    arch = reader.fields["general.architecture"].contents()
    heads = {
        "attn_q.weight": reader.fields[f"{arch}.attention.head_count"].contents(),
        "attn_k.weight": reader.fields[f"{arch}.attention.head_count_kv"].contents(),
    }
    kind = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == arch)
    names = gguf.get_tensor_name_map(kind, 8)
    n_compared = 0
    for name, tensor in checkpoint_tensors(sample.checkpoint).items():
        ours_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if ours_name not in ours:
            continue  # one expert of a tensor that holds them all
        wanted = bits(tensor)
        role = ours_name.split(".", 2)[-1]
        if arch == "llama" and role in heads:
            halves = wanted.reshape(heads[role], 2, -1, wanted.shape[-1])
            wanted = halves.swapaxes(1, 2).reshape(wanted.shape)
        assert np.array_equal(rows_of(ours[ours_name]).reshape(wanted.shape), wanted), name
        n_compared += 1
    assert n_compared >= 2 + 6 * reader.fields[f"{arch}.block_count"].contents()


def test_experts_keep_their_numbers(tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path / "c", "qwen3_moe", dtype="bfloat16")
    made = plain(checkpoint, tmp_path / "a", ("Q8_0", "source"))
    ours = tensors_of(at_tier(made.artifact, "source", tmp_path))
    theirs = checkpoint_tensors(checkpoint)
    for expert in range(8):
        for role, name in (("gate", "gate_proj"), ("up", "up_proj"), ("down", "down_proj")):
            wanted = bits(theirs[f"model.layers.1.mlp.experts.{expert}.{name}.weight"])
            tensor = ours[f"blk.1.ffn_{role}_exps.weight"]
            assert np.array_equal(rows_of(tensor).reshape(8, *wanted.shape)[expert], wanted)


@pytest.mark.parametrize(
    "tiers",
    [
        ("Q4_K", "Q8_0"),
        ("source",),
        ("Q4_0", "Q5_0", "Q5_1", "Q8_0", "source"),
        ("IQ4_XS", "Q5_K", "F16", "source"),
        ("Q2_K", "Q4_K", "Q5_K", "Q6_K", "source"),
    ],
    ids=",".join,
)
def test_other_chains_are_bit_exact_too(tmp_path: Path, tiers: tuple[str, ...]) -> None:
    checkpoint = tiny(tmp_path / "c", dtype="bfloat16", width="wide", num_hidden_layers=1)
    made = weighted(checkpoint, tmp_path / "a", tiers)
    source_path = at_tier(
        plain(checkpoint, tmp_path / "s", ("source",)).artifact, "source", tmp_path
    )
    for tier in tiers:
        if tier in ("source", "F16"):
            continue
        stock = quantize(
            source_path, tmp_path / "stock", FTYPES.get(tier, tier), weights=made.weights
        )
        assert_same(tensors_of(at_tier(made.artifact, tier, tmp_path)), tensors_of(stock))
    if tiers[-1] == "source":
        (tmp_path / "source.gguf").rename(source_path.with_name("wanted.gguf"))
        ours = tensors_of(at_tier(made.artifact, "source", tmp_path))
        assert_same(ours, tensors_of(tmp_path / "wanted.gguf"))


def test_a_chain_may_open_with_a_type_that_needs_an_imatrix(tmp_path: Path) -> None:
    """Tensors that the matrix knows nothing of start one tier higher."""
    checkpoint = tiny(tmp_path / "c", dtype="bfloat16", width="wide", num_hidden_layers=1)
    made = weighted(checkpoint, tmp_path / "a", ("IQ2_XXS", "Q4_K", "source"))
    source = at_tier(made.artifact, "source", tmp_path)
    assert made.weights is not None
    all_weights = made.weights | {
        name: np.ones((1, 256), np.float32) for name in ("token_embd.weight", "output.weight")
    }  # llama-quantize would end the process without
    stock = tensors_of(quantize(source, tmp_path / "stock", "IQ2_XXS", weights=all_weights))
    ours = tensors_of(at_tier(made.artifact, "IQ2_XXS", tmp_path))
    assert_same(ours, stock, made.weights.__contains__)
    assert {ours[n].tensor_type.name for n in ours if n.startswith("blk") and "norm" not in n} == {
        "IQ2_XXS"
    }
    assert ours["token_embd.weight"].tensor_type.name == "Q4_K"
    quarter = tensors_of(quantize(source, tmp_path / "q4", "Q4_K_M", weights=made.weights))
    assert_same(tensors_of(at_tier(made.artifact, "Q4_K", tmp_path)), quarter)


def test_a_type_that_needs_an_imatrix_is_refused_without_one(tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path / "c", dtype="bfloat16", width="wide", num_hidden_layers=1)
    with pytest.raises(UsageError, match=r"IQ2_XXS .*importance matrix.*--imatrix FILE"):
        plain(checkpoint, tmp_path / "a", ("IQ2_XXS", "Q4_K", "source"))
