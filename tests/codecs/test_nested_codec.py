"""Codec nested: exact for every pair of types, the same compiled or not, safe on any input."""

import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest

from edgekit.codecs.nested import CHILDREN, decode_chunk, encode_chunk
from edgekit.errors import RefusedError, UnknownNameError
from edgekit.kernels import ggml, native, nested, nested_ref, packing_ref

COLS = 512
CHAIN = ("Q2_K", "Q3_K", "Q4_K", "Q6_K", "Q8_0", "BF16")
PAIRS = [*pairwise(CHAIN), ("Q4_K", "Q5_K"), ("Q5_K", "Q6_K"), ("Q5_0", "Q8_0")]


def hard_rows() -> np.ndarray:
    """Rows that make blocks of every kind: usual, heavy tails, constant, zero, tiny, huge."""
    rng = np.random.default_rng(3)
    usual = rng.standard_normal((3, COLS)) * 0.02
    rows = [
        *usual,
        rng.standard_t(2, COLS),
        np.full(COLS, 0.3),
        np.zeros(COLS),
        rng.standard_normal(COLS) * 1e-7,
        rng.standard_normal(COLS) * 3000,
        np.where(np.arange(COLS) % 64 < 32, usual[0], 0),
    ]
    return np.array(rows, np.float32)


@pytest.fixture(scope="module")
def made():
    """Type name -> the hard rows in that type, by ggml, without and (IQ) with an imatrix."""
    imatrix = np.random.default_rng(4).random(COLS).astype(np.float32) + 0.01

    class Made(dict):
        def __missing__(self, name):
            weights = imatrix if name.startswith(("IQ", "Q3")) else None
            self[name] = ggml.quantize(name, hard_rows(), weights).reshape(-1)
            return self[name]

    return Made()


@pytest.fixture(params=["compiled", "without AVX-512", "reference"])
def code(request, monkeypatch):
    if request.param == "without AVX-512":
        monkeypatch.setenv("EDGEKIT_NO_AVX512", "1")
    if request.param == "reference":
        monkeypatch.setenv("EDGEKIT_NO_NATIVE", "1")
        assert native.native() is None
    elif native.native() is None:
        pytest.fail("the kernels are not compiled; install a C compiler and reinstall edgekit")
    return request.param


@pytest.mark.parametrize(
    "parent",
    [  # ggml takes seconds to begin with IQ1_S
        pytest.param(name, marks=pytest.mark.slow) if name == "IQ1_S" else name
        for name in sorted(ggml.TYPES)
    ],
)
def test_every_child_comes_back_exactly_from_every_parent(parent, made, code):
    for child in CHILDREN:
        payload = encode_chunk(parent, child, made[parent], made[child])
        again = decode_chunk(parent, child, made[parent], payload, hard_rows().size)
        assert np.array_equal(again, made[child]), child


@pytest.mark.parametrize("parent", ["Q2_K", "Q4_K", "Q6_K", "Q8_0", "Q5_0", "IQ4_NL", "F16"])
def test_compiled_and_reference_make_the_same_payload(parent, made, monkeypatch):
    rng = np.random.default_rng(5)
    for child in CHILDREN:
        noise = [rng.integers(0, 256, made[t].nbytes, np.uint8) for t in (parent, child)]
        for parent_bytes, child_bytes in ((made[parent], made[child]), noise):
            payloads = []
            for no_native, no_avx512 in (("0", "0"), ("0", "1"), ("1", "0")):
                monkeypatch.setenv("EDGEKIT_NO_NATIVE", no_native)
                monkeypatch.setenv("EDGEKIT_NO_AVX512", no_avx512)
                payloads.append(encode_chunk(parent, child, parent_bytes, child_bytes))
            assert payloads[0] == payloads[1] == payloads[2], child


@pytest.mark.parametrize("child", CHILDREN)
def test_blocks_of_random_bytes_come_back_exactly(child, code):
    """NaN and infinite scales included: what is predicted does not matter."""
    rng = np.random.default_rng(6)
    kind = ggml.TYPES[child]
    blocks = rng.integers(0, 256, 2048 // kind.block * kind.block_bytes, np.uint8)
    for parent in ("Q4_K", "F32"):
        size = 2048 // ggml.TYPES[parent].block * ggml.TYPES[parent].block_bytes
        base = rng.integers(0, 256, size, np.uint8)
        payload = encode_chunk(parent, child, base, blocks)
        assert np.array_equal(decode_chunk(parent, child, base, payload, 2048), blocks)


def test_residuals_of_the_widest_codes_wrap_around(made, monkeypatch):
    """A code 128 away is as far one way as the other: its flipped residual is the same."""
    n = 1 << 12
    rng = np.random.default_rng(7)
    parent = ggml.quantize("Q4_0", rng.standard_normal((1, n)).astype(np.float32)).reshape(-1)
    child = ggml.quantize("Q8_0", rng.standard_normal((1, n)).astype(np.float32)).reshape(-1)
    payloads = []
    for no_native in ("0", "1"):
        monkeypatch.setenv("EDGEKIT_NO_NATIVE", no_native)
        payload = encode_chunk("Q4_0", "Q8_0", parent, child)
        assert np.array_equal(decode_chunk("Q4_0", "Q8_0", parent, payload, n), child)
        payloads.append(payload)
    level = nested_ref.split("Q4_0", "Q8_0", parent, child)
    assert min(s.min() for s in level.streams if len(s)) == -128
    assert payloads[0] == payloads[1]


@pytest.mark.parametrize(
    ("parent", "child"), [("Q4_0", "Q8_0"), ("Q4_0", "Q5_0"), ("Q8_0", "Q4_1"), ("F16", "Q5_1")]
)
def test_a_unit_that_is_not_whole_comes_after_whole_ones(parent, child, code):
    weights = np.random.default_rng(5).standard_normal((1, 37 * 256 + 96)).astype(np.float32)
    low, high = (ggml.quantize(kind, weights).reshape(-1) for kind in (parent, child))
    payload = encode_chunk(parent, child, low, high)
    assert np.array_equal(decode_chunk(parent, child, low, payload, weights.size), high)


@pytest.mark.parametrize("cols", [100, 1, 33])
def test_rows_of_any_width_go_from_f16_to_their_source(cols, code):
    rows = np.random.default_rng(8).standard_normal((5, cols)).astype(np.float32)
    parent = ggml.quantize("F16", rows).reshape(-1)
    for child in ("F32", "BF16"):
        blocks = ggml.quantize(child, rows).reshape(-1)
        payload = encode_chunk("F16", child, parent, blocks)
        assert np.array_equal(decode_chunk("F16", child, parent, payload, rows.size), blocks)


@pytest.mark.parametrize("far", [0, 127, 128, -128, -129, 300])
def test_weights_far_from_their_parent_come_back_exactly(far, monkeypatch):
    """Residuals to BF16 are bytes where all fit: one that does not, in a stream of small ones."""
    n = 40 * 256 + 96  # enough for a patch of its stream; and a unit that is not whole
    weights = np.random.default_rng(10).standard_normal((1, n)).astype(np.float32)
    parent = ggml.quantize("Q8_0", weights).reshape(-1)
    child = ggml.quantize("BF16", weights).reshape(-1).view(np.int16).copy()
    largest = int(np.abs(weights).argmax())
    child[largest] += far  # units in the last place
    child = child.view(np.uint8)
    assert all(s.width < 16 for s in nested.encode("Q8_0", "BF16", parent, child).streams[:7])
    payloads = []
    for no_native, no_avx512 in (("0", "0"), ("0", "1"), ("1", "0")):
        monkeypatch.setenv("EDGEKIT_NO_NATIVE", no_native)
        monkeypatch.setenv("EDGEKIT_NO_AVX512", no_avx512)
        payloads.append(encode_chunk("Q8_0", "BF16", parent, child))
        assert np.array_equal(decode_chunk("Q8_0", "BF16", parent, payloads[0], n), child)
    assert payloads[0] == payloads[1] == payloads[2]


def test_an_empty_chunk_is_an_empty_chunk(code):
    nothing = np.zeros(0, np.uint8)
    for child in CHILDREN:
        payload = encode_chunk("Q8_0", child, nothing, nothing)
        assert decode_chunk("Q8_0", child, nothing, payload, 0).size == 0


@pytest.mark.parametrize(("kind", "most"), [("gaussian", 0.90), ("heavy", 0.95)])
def test_the_default_chain_is_smaller_than_bf16(kind, most):
    n = 1 << 18
    rng = np.random.default_rng(9)
    draw = rng.standard_normal(n) if kind == "gaussian" else rng.standard_t(4, n)
    rows = (draw * 0.02).astype(np.float32).reshape(-1, 2048)
    tiers = {"BF16": ggml.quantize("BF16", rows).reshape(-1)}
    rows = ggml.dequantize("BF16", tiers["BF16"]).reshape(rows.shape)
    tiers |= {name: ggml.quantize(name, rows).reshape(-1) for name in CHAIN[:-1]}
    levels = [
        len(encode_chunk(parent, child, tiers[parent], tiers[child]))
        for parent, child in pairwise(CHAIN)
    ]
    assert tiers["Q2_K"].nbytes + sum(levels) <= most * tiers["BF16"].nbytes


# A block of Q8_0, scale 2**-9 and codes 3 * i - 40, on one of Q4_0 with scale 2**-5 and nibbles
# (7 * i) % 16: asymmetric, with residuals of every size.
GOLDEN_PARENT = "0028" + "".join(f"{7 * i % 16 | 7 * (i + 16) % 16 << 4:02x}" for i in range(16))
GOLDEN_CHILD = "0018" + "".join(f"{(3 * i - 40) % 256:02x}" for i in range(32))


def test_the_format_does_not_drift(code):
    """The residuals, checked by hand: child code minus 16 times the parent's code, no fraction."""
    parent, child = (
        np.frombuffer(bytes.fromhex(x), np.uint8) for x in (GOLDEN_PARENT, GOLDEN_CHILD)
    )
    level = nested.encode("Q4_0", "Q8_0", parent, child)
    nibbles = [*(7 * i % 16 for i in range(16)), *(7 * (i + 16) % 16 for i in range(16))]
    by_hand = [3 * i - 40 - 16 * (q - 8) for i, q in enumerate(nibbles)]
    wrapped = [(r + 128) % 256 - 128 for r in by_hand]
    assert packing_ref.unpack(level.streams[0]).tolist() == wrapped
    assert not any(s.n_residuals for s in level.streams[1:])
    assert level.limits.tolist() == [0x41800000] * 3  # 16.0: the parent's step in child steps
    assert level.rest.tolist() == [0x00, 0x18]


GOLDEN_PAYLOAD = (
    "0100008041000080410000804108200000000000000029000000020000000000000000000000000200000000"
    "0000000000000000020000000000000000000000000200000000000000000000000002000000000000000000"
    "0000000200000000000000000000000002000000000000000000000000000000000b00000028b52ffd202001"
    "0100d86bfe9124b74add70039629bc4fe275089b2ec154e77a0da033c659ec7f12a528b52ffd200211000000"
    "18"
)


def test_a_payload_of_format_1_stays_readable(code):
    parent = np.frombuffer(bytes.fromhex(GOLDEN_PARENT), np.uint8)
    payload = bytes.fromhex(GOLDEN_PAYLOAD)
    assert decode_chunk("Q4_0", "Q8_0", parent, payload, 32).tobytes().hex() == GOLDEN_CHILD


@pytest.mark.parametrize(("parent", "child"), PAIRS)
def test_a_truncated_payload_is_refused(parent, child, made, code):
    payload = encode_chunk(parent, child, made[parent], made[child])
    step = 37 if code == "reference" else 1
    for length in range(0, len(payload), max(step, len(payload) // 400)):
        with pytest.raises(RefusedError):
            decode_chunk(parent, child, made[parent], payload[:length], hard_rows().size)


FUZZ = """
import sys
import numpy as np
from edgekit.codecs.nested import decode_chunk, encode_chunk
from edgekit.errors import RefusedError
from edgekit.kernels import ggml

rng = np.random.default_rng(int(sys.argv[1]))
rows = rng.standard_normal((4, 512)).astype(np.float32)
decoded = 0
for parent, child in (a.split("-") for a in sys.argv[2:]):
    base, blocks = (ggml.quantize(t, rows).reshape(-1) for t in (parent, child))
    good = encode_chunk(parent, child, base, blocks)
    header = 13 + 13 * 9 + 8
    for _ in range(300):
        payload = bytearray(good)
        end = header if rng.random() < 0.7 else len(payload)
        for at in rng.integers(0, end, 1 + rng.integers(3)):
            payload[at] ^= 1 << rng.integers(8)
        try:
            again = decode_chunk(parent, child, base, payload, rows.size)
        except RefusedError:
            continue
        assert again.nbytes == blocks.nbytes
        decoded += 1
print("alive", decoded)
"""


def test_flipped_bits_are_refused_or_decode_to_the_right_length_and_never_crash():
    pairs = [f"{parent}-{child}" for parent, child in [*PAIRS, ("Q8_0", "F32"), ("F16", "BF16")]]
    done = subprocess.run(
        [sys.executable, "-c", FUZZ, "11", *pairs], capture_output=True, text=True, check=False
    )
    assert done.stdout.startswith("alive"), done.stderr


def test_a_payload_on_another_parent_is_refused_or_has_the_right_length(made, code):
    payload = encode_chunk("Q4_K", "Q6_K", made["Q4_K"], made["Q6_K"])
    other = np.random.default_rng(12).integers(0, 256, made["Q4_K"].nbytes, np.uint8)
    with pytest.raises(RefusedError, match=r"stream \d of a level"):
        decode_chunk("Q4_K", "Q6_K", other, payload, hard_rows().size)


def test_a_parent_of_another_size_is_refused(made):
    with pytest.raises(RefusedError, match="the Q4_K parent of a level has 144 bytes, 4608"):
        encode_chunk("Q4_K", "Q6_K", made["Q4_K"][:144], made["Q6_K"])


def test_a_type_that_cannot_be_a_child_is_named(made):
    with pytest.raises(UnknownNameError, match="unknown child type 'IQ4_NL'"):
        encode_chunk("Q4_K", "IQ4_NL", made["Q4_K"], made["IQ4_NL"])
