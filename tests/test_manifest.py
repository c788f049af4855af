"""The manifest: its schema, its round trip, and what is refused of it."""

import hashlib
import json
from collections.abc import Callable, Iterator
from copy import deepcopy
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from edgekit.errors import RefusedError, UnsupportedError
from edgekit.manifest import dumps
from edgekit.manifest_reader import loads

Json = dict[str, Any]
SCHEMA = json.loads(files("edgekit").joinpath("manifest.schema.json").read_text("utf-8"))


@pytest.fixture(params=["llama", "moe"])
def text(request: pytest.FixtureRequest) -> bytes:
    folder: Path = request.getfixturevalue(f"{request.param}_artifact")
    return (folder / "edgekit.json").read_bytes()


def signed(body: Json) -> bytes:
    """The manifest with the hash it should have, as docs/artifact.md defines it."""
    rest = {key: value for key, value in body.items() if key != "sha256"}
    canonical = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return json.dumps(rest | {"sha256": hashlib.sha256(canonical.encode()).hexdigest()}).encode()


def test_the_schema_is_one_and_a_real_manifest_fits_it(text: bytes) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(json.loads(text), SCHEMA, cls=jsonschema.Draft202012Validator)


def test_a_measured_manifest_fits_the_schema_too(llama_artifact: Path) -> None:
    body = json.loads((llama_artifact / "edgekit.json").read_bytes())
    row = {"weights_bytes": 10, "bits_per_weight": 2.5, "n_tokens": 4096, "kl_mean": 0.1}
    row |= {"kl_p99": 1.5, "top1_agreement": 0.9, "ppl": 5.0, "ref_ppl": 4.5}
    body["quality"] = [row]
    jsonschema.validate(body, SCHEMA, cls=jsonschema.Draft202012Validator)
    assert list(loads(signed(body)).quality) == [row]


def undescribed(schema: Any, path: str = "") -> Iterator[str]:
    """Places of a schema that describe a value without saying what it is."""
    if not isinstance(schema, dict):
        return
    if "description" not in schema:
        yield path
    for name, inner in {**schema.get("properties", {}), **schema.get("$defs", {})}.items():
        yield from undescribed(inner, f"{path}/{name}")
    for key in ("items", "additionalProperties"):
        yield from undescribed(schema.get(key), f"{path}/{key}")
    for i, inner in enumerate(schema.get("prefixItems", [])):
        yield from undescribed(inner, f"{path}/{i}")


def test_the_schema_describes_every_field() -> None:
    assert list(undescribed(SCHEMA)) == []


@pytest.mark.parametrize("key", sorted(SCHEMA["required"]))
def test_schema_and_reader_both_need_every_field(llama_artifact: Path, key: str) -> None:
    body = json.loads((llama_artifact / "edgekit.json").read_bytes())
    assert key in body
    del body[key]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(body, SCHEMA)
    if key not in ("sha256", "n_parameters"):  # the second follows from the shapes
        with pytest.raises(RefusedError):
            loads(signed(body))


def test_reading_and_writing_again_gives_the_same_bytes(text: bytes) -> None:
    manifest = loads(text)
    assert dumps(manifest).encode() == text
    assert dumps(loads(dumps(manifest).encode())) == dumps(manifest)


def test_the_hash_is_the_documented_one(text: bytes) -> None:
    body = json.loads(text)
    assert json.loads(signed(body)) == body


def test_names_beyond_ascii_are_hashed_and_written_alike(text: bytes) -> None:
    body = json.loads(text)
    body["source"]["name"] = "Zoë ✓"
    manifest = loads(signed(body))
    assert json.loads(dumps(manifest)) == json.loads(signed(body))


def put(*path: Any, value: Any) -> Callable[[Json], None]:
    """A change: the value at ``path`` becomes ``value``."""

    def change(body: Json) -> None:
        *way, last = path
        for key in way:
            body = body[key]
        body[last] = value

    return change


def first_above(body: Json) -> int:
    """Index of the first level that is not level 0."""
    return next(i for i, row in enumerate(body["levels"]) if row["parent"] is not None)


def at_first_above(key: str, value: Any) -> Callable[[Json], None]:
    def change(body: Json) -> None:
        body["levels"][first_above(body)][key] = value

    return change


def swap_orders(body: Json) -> None:
    """A child before its parent: the first level of a tensor that has two goes last."""
    for order in body["load_order"].values():
        order.append(order.pop(0))


def orphan(body: Json) -> None:
    """A level loses its parent's level."""
    row = body["levels"][first_above(body)]
    row["parent"] = "Q5_1" if row["parent"] != "Q5_1" else "Q8_0"


def level_twice(body: Json) -> None:
    body["levels"].append(deepcopy(body["levels"][first_above(body)]))
    for order in body["load_order"].values():
        order.append(len(body["levels"]) - 1)


def drop_expert(body: Json) -> None:
    row = next(row for row in body["levels"] if "experts" in row)
    del row["experts"][-1]
    row["bytes"] = row["experts"][-1][0] + row["experts"][-1][1] - row["offset"]


def beyond_the_file(body: Json) -> None:
    row = body["levels"][first_above(body)]
    move = body["levels_file"]["bytes"]
    row["offset"] += move
    for expert in row.get("experts", []):
        expert[0] += move


NAMES = ("../up", "a/b", "a\\b", "/root", "C:x", ".hidden", "..", "", "a\0b", "a\nb", "x" * 300)
HOSTILE: dict[str, Callable[[Json], None]] = {
    **{f"name {n[:8]!a}": put("name", value=n) for n in NAMES},
    **{f"base {n[:8]!a}": put("base", "file", value=n) for n in NAMES},
    **{f"levels {n[:8]!a}": put("levels_file", "file", value=n) for n in NAMES},
    **{f"header_bytes {v}": put("base", "header_bytes", value=v) for v in (-1, "1", 1.5, 1 << 70)},
    **{f"shape {v}": put("tensors", 0, "shape", value=v) for v in ([], [0], [-1, 2], [1] * 4, "x")},
    **{f"chunk {v}": put("chunk_weights", value=v) for v in (0, -1, None, True, 1 << 70)},
    **{f"loss {v}": at_first_above("loss", v) for v in (-1, "0", None, float("nan"), 1e308 * 10)},
    **{f"offset {v}": at_first_above("offset", v) for v in (-1, 1 << 70, 0.5, None)},
    **{f"bytes {v}": at_first_above("bytes", v) for v in (0, -1, 1 << 60)},
    **{f"sha256 {str(v)[:4]}": put("base", "sha256", value=v) for v in ("", "g" * 64, 1, "a" * 63)},
    **{f"format {v}": put("format", value=v) for v in ("gguf", 1, None)},
    **{f"version {v}": put("format_version", value=v) for v in (2, 0, "1", 1.5, True, None)},
    **{f"tiers {v}": put("tiers", value=v) for v in ([], ["Q9_K"], ["Q2_K", "Q2_K"], [1], "Q2_K")},
    "codec": put("codec", value="pickle"),
    "level codec": at_first_above("codec", "pickle"),
    "tier unknown": at_first_above("tier", "Q9_K"),
    "tier of another width": put("levels", 0, "tier", value="IQ1_S"),
    "tensor unknown": at_first_above("tensor", "nobody"),
    "type unknown": put("tensors", 0, "source_type", value="F99"),
    "no tensors": put("tensors", value=[]),
    "tensor a number": put("tensors", 0, value=7),
    "tensor twice": lambda body: body["tensors"].append(deepcopy(body["tensors"][0])),
    "no levels": put("levels", value=[]),
    "level twice": level_twice,
    "orphan": orphan,
    "circle": at_first_above("parent", "source"),
    "two roots": at_first_above("parent", None),
    "order short": lambda body: body["load_order"]["stored"].pop(),
    "order twice": lambda body: body["load_order"]["resident"].append(
        body["load_order"]["resident"][0]
    ),
    "order of level 0": put("load_order", "stored", 0, value=0),
    "order beyond": put("load_order", "stored", 0, value=10**6),
    "order negative": put("load_order", "stored", 0, value=-1),
    "order no number": put("load_order", "stored", 0, value="1"),
    "child first": swap_orders,
    "beyond the file": beyond_the_file,
    "base shorter": put("base", "bytes", value=64),
    "quality no number": put("quality", value=[{"weights_bytes": "x"}]),
    "quality short": put("quality", value=[{}]),
}


@pytest.mark.parametrize("lie", HOSTILE)
def test_a_hostile_change_with_the_right_hash_is_refused(text: bytes, lie: str) -> None:
    body = json.loads(text)
    HOSTILE[lie](body)
    with pytest.raises(RefusedError) as error:
        loads(signed(body))
    assert error.value.exit_code == 5
    assert "\n" not in str(error.value)


def test_experts_that_do_not_fill_their_level_are_refused(moe_artifact: Path) -> None:
    body = json.loads((moe_artifact / "edgekit.json").read_bytes())
    drop_expert(body)
    with pytest.raises(RefusedError, match="7 parts for 8 experts"):
        loads(signed(body))


@pytest.mark.parametrize(
    "broken",
    [b"", b"[]", b"null", b"{", b"\xff\xfe\x00", b"[" * 100_000, b'{"a":1,"a":2}', b"\x00" * 64],
)
def test_what_is_no_manifest_is_refused(broken: bytes) -> None:
    with pytest.raises(RefusedError):
        loads(broken)


def test_a_key_that_stands_twice_is_refused(llama_artifact: Path) -> None:
    text = (llama_artifact / "edgekit.json").read_bytes()
    doubled = text.replace(b'"format": "edgekit"', b'"format": "x", "format": "edgekit"')
    assert doubled != text
    with pytest.raises(RefusedError, match="twice"):
        loads(doubled)


def test_another_version_says_which_edgekit_reads_it(llama_artifact: Path) -> None:
    body = json.loads((llama_artifact / "edgekit.json").read_bytes())
    body["format_version"] = 2
    with pytest.raises(UnsupportedError, match="format version 2, this edgekit reads 1"):
        loads(signed(body))


def test_a_manifest_that_was_edited_is_refused(llama_artifact: Path) -> None:
    text = (llama_artifact / "edgekit.json").read_bytes()
    edited = text.replace(b'"name": "checkpoint"', b'"name": "checkpoinT"')
    assert edited != text
    with pytest.raises(RefusedError, match="does not match its own sha256"):
        loads(edited)
