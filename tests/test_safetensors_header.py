"""Headers of safetensors made to harm, cut and mutated."""

import itertools
import json
import os
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from edgekit.errors import RefusedError
from edgekit.safetensors_header import MAX_HEADER_BYTES, read_header


def file_with(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8), **more: Any) -> Any:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


SOUND = {"x": entry()}
BAD_HEADERS = {
    "longer than the file": (SOUND, 8, 2**20, "must fit the file"),
    "2**63 long": (SOUND, 8, 2**63, "must fit the file"),
    "all ones": (SOUND, 8, 2**64 - 1, "must fit the file"),
    "one byte": (SOUND, 8, 1, "must fit the file"),
    "no object": (b"[1, 2]  ", 0, None, "no JSON object"),
    "not UTF-8": (b'{"\xff\xff": 1}', 0, None, "not sound JSON"),
    "not JSON": (b"{nonsense  ", 0, None, "not sound JSON"),
    "nested": (b'{"a":' + b"[" * 99_999, 0, None, "not sound JSON"),
    "duplicate name": (
        b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        b'"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        8,
        None,
        "the key 'x' is there twice",
    ),
    "duplicate field": (
        b'{"x":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        8,
        None,
        "the key 'dtype' is there twice",
    ),
    "metadata no table": ({"__metadata__": 1, **SOUND}, 8, None, "__metadata__"),
    "metadata of numbers": ({"__metadata__": {"a": 1}, **SOUND}, 8, None, "__metadata__"),
    "entry no table": ({"x": [1]}, 8, None, "must have exactly"),
    "missing field": ({"x": {"dtype": "F32", "shape": [2]}}, 8, None, "must have exactly"),
    "extra field": ({"x": entry(strides=[1])}, 8, None, "must have exactly"),
    "unknown dtype": ({"x": entry("Q4_K")}, 8, None, "has the dtype 'Q4_K'"),
    "dtype no text": ({"x": entry(["F32"])}, 8, None, "has the dtype"),
    "negative extent": ({"x": entry(shape=(-2,))}, 8, None, "has the shape"),
    "extent a float": ({"x": entry(shape=(2.0,))}, 8, None, "has the shape"),
    "extent a bool": ({"x": entry(shape=(True, 2))}, 8, None, "has the shape"),
    "extent 2**64": ({"x": entry(shape=(2**64,))}, 8, None, "has the shape"),
    "product 2**64": ({"x": entry(shape=(2**32, 2**32))}, 8, None, "needs 73786976294838206464"),
    "many extents": ({"x": entry(shape=(1,) * 999)}, 8, None, "has the shape"),
    "wrong length": ({"x": entry(offsets=(0, 4))}, 4, None, "has 4 bytes; F32"),
    "one offset": ({"x": entry(offsets=(0,))}, 8, None, "has the data_offsets"),
    "end before begin": ({"x": entry(offsets=(8, 0))}, 8, None, "has -8 bytes"),
    "negative offset": ({"x": entry(offsets=(-8, 0))}, 8, None, "has the data_offsets"),
    "overlap": ({"x": entry(), "y": entry(offsets=(4, 12))}, 12, None, "overlaps"),
    "same place": ({"x": entry(), "y": entry()}, 8, None, "overlaps"),
    "hole": ({"x": entry(), "y": entry(offsets=(12, 20))}, 20, None, "leaves a hole"),
    "hole at the start": ({"x": entry(offsets=(8, 16))}, 16, None, "leaves a hole"),
    "data cut": (SOUND, 7, None, "its tensors end at"),
    "data after": (SOUND, 9, None, "its tensors end at"),
    "empty name": ({"": entry()}, 8, None, "needs a printable name"),
    "control name": ({"a\nb": entry()}, 8, None, "needs a printable name"),
    "surrogate name": (b'{"\\ud800":{"dtype":"F32"}}', 8, None, "needs a printable name"),
    "long name": ({"a" * 999: entry()}, 8, None, "needs a printable name"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_a_crafted_header_is_refused(tmp_path: Path, case: str) -> None:
    header, n_data, length, why = BAD_HEADERS[case]
    path = file_with(tmp_path / "model.safetensors", header, bytes(n_data), length)
    with pytest.raises(RefusedError, match=why) as caught:
        read_header(path)
    assert len(str(caught.value)) < 700
    assert "\n" not in str(caught.value)


def test_a_header_beyond_100_mb_is_refused_unread(tmp_path: Path) -> None:
    path = file_with(tmp_path / "x.safetensors", b"{", length=MAX_HEADER_BYTES + 1)
    os.truncate(path, MAX_HEADER_BYTES + 100)  # sparse: costs no disk
    with pytest.raises(RefusedError, match="must fit the file"):
        read_header(path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of the safetensors library."""
    tensors = {
        "a.weight": torch.arange(15, dtype=torch.bfloat16).reshape(5, 3),
        "b.weight": torch.linspace(-2, 2, 24).reshape(2, 3, 4),
        "c.bias": torch.tensor([1.5, -2.25], dtype=torch.float16),
        "d.ids": torch.tensor([1, 2, 3]),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "model.safetensors"


def test_every_truncation_of_a_sound_file_is_refused(path: Path) -> None:
    data = path.read_bytes()
    assert read_header(path)
    for n in reversed(range(len(data))):
        os.truncate(path, n)
        with pytest.raises(RefusedError):
            read_header(path)


def test_no_mutation_of_a_header_gives_anything_but_refusal_or_sense(path: Path) -> None:
    """3,000 seeded mutations; what is accepted lies inside the file, tensor behind tensor."""
    rng = random.Random(7)
    sound = path.read_bytes()
    n_head = 8 + int.from_bytes(sound[:8], "little")
    accepted = 0
    for _ in range(3000):
        data = bytearray(sound)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(n_head)
            match rng.randrange(4):
                case 0:
                    data[at] ^= 1 << rng.randrange(8)
                case 1:
                    data[at] = rng.choice(b'0123456789"{}[],:-eE.')
                case 2:
                    del data[at : at + rng.randint(1, 5)]
                case 3:
                    data[at:at] = rng.choice([b"9" * 20, b'"x":', b"[[", b"null", b"-1", b"1e999"])
        path.unlink()  # writing over it would wait for the disk
        path.write_bytes(data)
        try:
            refs = list(read_header(path).values())
        except RefusedError:
            continue
        accepted += 1
        assert all(one.stop == two.start for one, two in itertools.pairwise(refs))
        assert refs[-1].stop == len(data)
    assert 0 < accepted < 1500  # letters of a name may change, and some did
