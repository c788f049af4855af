"""Manifests and levels of an attacker who can compute a hash."""

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from damage import damaged, files_of

from edgekit.artifact import open_artifact
from edgekit.assembly import Assembly
from edgekit.cli import main
from edgekit.errors import RefusedError
from edgekit.plan import plan_tier, shape_of


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(sound, tmp_path / "artifact"))


def forge(folder: Path, change: Callable[[Any], object]) -> None:
    """Change the manifest and make its own hash fit, as anyone can who reads the format."""
    path = folder / "edgekit.json"
    body = json.loads(path.read_bytes())
    change(body)
    rest = {key: value for key, value in body.items() if key != "sha256"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    path.write_text(json.dumps(rest | {"sha256": hashlib.sha256(text.encode()).hexdigest()}))


def first_above(body: Any) -> Any:
    """A level above 0."""
    return next(row for row in body["levels"] if row["parent"])


def setting(*path: Any, to: Any) -> Callable[[Any], object]:
    """Set the field at ``path``."""

    def change(body: Any) -> None:
        for key in path[:-1]:
            body = body[key]
        body[path[-1]] = to

    return change


def level(**fields: Any) -> Callable[[Any], object]:
    """Set fields of the first level above 0."""
    return lambda body: first_above(body).update(fields)


def lowest(**fields: Any) -> Callable[[Any], object]:
    """Set fields of a level 0."""
    return lambda body: body["levels"][0].update(fields)


def quality(**fields: Any) -> Callable[[Any], object]:
    row = {"weights_bytes": 1, "bits_per_weight": 1.0, "n_tokens": 1}
    row |= {"kl_mean": 0.1, "kl_p99": 0.1, "top1_agreement": 1.0, "ppl": 2.0, "ref_ppl": 2.0}
    return setting("quality", to=[row | fields])


def memory(**fields: Any) -> Callable[[Any], object]:
    row = {"kv_type": "f16", "batch": 512, "contexts": [256, 512], "bytes": [1, 2]}
    return setting("memory", to={"compute": [row | fields]})


PRUNED = {"ratio_asked": 0.2, "ratio": 0.2, "metric": "condition", "kl_mean": 0.1}
LIES: dict[str, Callable[[Any], object]] = {
    "an absolute path": setting("base", "file", to="/etc/passwd"),
    "a path out of the folder": setting("levels_file", "file", to="../checkpoint/config.json"),
    "a Windows path": setting("base", "file", to="..\\secret"),
    "a drive": setting("base", "file", to="C:secret"),
    "a NUL in a name": setting("base", "file", to="a\0b"),
    "no name": setting("base", "file", to=""),
    "a name no file system takes": setting("base", "file", to="\ud800"),
    "a very long name": setting("levels_file", "file", to="a" * 5000),
    "half a character as name": setting("name", to="\udfff"),
    "a base that is the manifest": setting("base", "file", to="edgekit.json"),
    "a base of 2**61 bytes": setting("base", "bytes", to=1 << 61),
    "a base of -1 bytes": setting("base", "bytes", to=-1),
    "bytes as text": setting("base", "bytes", to="1"),
    "bytes as truth": setting("base", "bytes", to=True),
    "a header of 2**61 bytes": setting("base", "header_bytes", to=1 << 61),
    "a header of no bytes": setting("base", "header_bytes", to=0),
    "a short header": setting("base", "header_bytes", to=100),
    "a hash that is none": setting("base", "sha256", to="x" * 64),
    "no tensors": setting("tensors", to=[]),
    "no levels": setting("levels", to=[]),
    "levels that are numbers": setting("levels", to=[1, 2]),
    "a shape of 2**39 squared": setting("tensors", 0, "shape", to=[1 << 39, 1 << 39]),
    "a shape of 2**200": setting("tensors", 0, "shape", to=[1 << 200, 4]),
    "a shape with 0": setting("tensors", 0, "shape", to=[0, 256]),
    "a shape with a truth": setting("tensors", 0, "shape", to=[True, 256]),
    "no shape": setting("tensors", 0, "shape", to=[]),
    "a billion experts": setting("tensors", 0, "shape", to=[1 << 30, 1, 256]),
    "another tensor": setting("tensors", 0, "name", to="other"),
    "a tensor twice": lambda body: body["tensors"].append(body["tensors"][0]),
    "a source type that is none": setting("tensors", 0, "source_type", to="F13"),
    "a tier that is none": level(tier="Q9_K"),
    "a tier that cannot follow": level(tier="IQ2_XXS"),
    "a tier that is a list": level(tier=["Q3_K"]),
    "a parent that is none": level(parent="Q9_K"),
    "its own parent": lambda body: first_above(body).update(parent=first_above(body)["tier"]),
    "the parent of another": level(parent="Q8_0"),
    "two levels 0": level(parent=None),
    "a codec that is none": level(codec="pickle"),
    "a level coded as plain blocks": level(codec="ggml"),
    "a base that is coded": lowest(codec="nested"),
    "a level beyond its file": level(offset=1 << 40),
    "a level of 2**61 bytes": level(bytes=1 << 61),
    "a level of no bytes": level(bytes=0),
    "a negative offset": level(offset=-64),
    "a level 0 that is short": lambda body: lowest(bytes=body["levels"][0]["bytes"] - 84)(body),
    "a level 0 elsewhere": lambda body: lowest(offset=body["levels"][0]["offset"] + 32)(body),
    "an infinite loss": level(loss=float("inf")),
    "a loss that is no number": level(loss=float("nan")),
    "a loss of 10**400": level(loss=10**400),
    "a negative loss": level(loss=-1.0),
    "experts of a dense tensor": level(experts=[[0, 1, "0" * 64], [1, 1, "0" * 64]]),
    "experts that are words": level(experts=["a"]),
    "an order with a level twice": lambda body: body["load_order"]["stored"].append(
        body["load_order"]["stored"][0]
    ),
    "an order without a level": lambda body: body["load_order"]["resident"].pop(),
    "an order backwards": lambda body: body["load_order"]["stored"].reverse(),
    "an order of words": setting("load_order", "resident", to=["a"]),
    "an order of 2**70": setting("load_order", "resident", to=[1 << 70]),
    "chunks of no weights": setting("chunk_weights", to=0),
    "chunks of 2**61 weights": setting("chunk_weights", to=1 << 61),
    "tiers that are none": setting("tiers", to=["Q9_K"]),
    "no tiers": setting("tiers", to=[]),
    "a tier twice": setting("tiers", to=["Q2_K", "Q2_K"]),
    "another codec": setting("codec", to="pickle"),
    "2**60 blocks": setting("model", "llama.block_count", to=1 << 60),
    "a context of 2**60": setting("model", "llama.context_length", to=1 << 60),
    "no heads": setting("model", "llama.attention.head_count", to=0),
    "heads as text": setting("model", "llama.attention.head_count_kv", to="4"),
    "heads as a list of words": setting("model", "llama.attention.head_count_kv", to=["4"]),
    "a width as text": setting("model", "llama.feed_forward_length", to="many"),
    "no widths": setting("model", "llama.feed_forward_length", to=[]),
    "no vocabulary": lambda body: body["model"].pop("vocab_size"),
    "a vocabulary as text": setting("model", "vocab_size", to="many"),
    "no model": setting("model", to={}),
    "another architecture": setting("architecture", to="nonsense"),
    "quality without bytes": lambda body: body.update(quality=[{"kl_mean": 0.1}]),
    "quality in words": quality(weights_bytes="many"),
    "a pruning that is a list": setting("source", "pruned", to=[]),
    "a pruning of nothing said": setting("source", "pruned", to={"ratio": 0.2}),
    "a pruning by words": setting("source", "pruned", to=PRUNED | {"ratio": "0.2"}),
    "a pruning of all and more": setting("source", "pruned", to=PRUNED | {"ratio": 1.5}),
    "a pruning of infinite loss": setting("source", "pruned", to=PRUNED | {"kl_mean": 10**400}),
    "a pruning that says more": setting("source", "pruned", to=PRUNED | {"more": 1}),
    "a divergence in words": quality(kl_mean="small"),
    "an infinite divergence": quality(kl_mean=float("inf")),
    "quality of 10**400 bytes": quality(weights_bytes=10**400),
    "quality that is a list": setting("quality", to=[[1]]),
    "statistics that are a list": setting("statistics", to=[]),
    "memory that is a list": setting("memory", to=[]),
    "memory in words": setting("memory", "compute", to="much"),
    "buffers of one size": memory(contexts=[256], bytes=[1]),
    "buffers of falling contexts": memory(contexts=[512, 256], bytes=[1, 2]),
    "buffers of no bytes": memory(contexts=[256, 512], bytes=[0, 1]),
    "buffers in words": memory(contexts=[256, 512], bytes=["a", "b"]),
    "buffers of 2**70 bytes": memory(contexts=[256, 512], bytes=[1, 1 << 70]),
    "buffers for a KV type of none": memory(kv_type=None),
    "another version": setting("format_version", to=2),
    "a version as truth": setting("format_version", to=True),
}


# a plan reads the manifest alone and cannot know what the base holds
ABOUT_THE_BASE = {
    "a base that is the manifest",
    "a base of 2**61 bytes",
    "a short header",
    "a level 0 elsewhere",
}


@pytest.mark.parametrize("lie", LIES)
def test_a_forged_manifest_is_refused_by_every_command(folder, tmp_path, lie):
    forge(folder, LIES[lie])
    (tmp_path / "text").write_text("a b c " * 200)
    plan = [] if lie in ABOUT_THE_BASE else [["plan", folder, "--budget", "1GiB"]]
    for command in (
        *plan,
        ["verify", folder],
        ["inspect", folder],
        ["materialize", folder, "--target-size", "1GiB", "-o", tmp_path / "out.gguf"],
        ["run", folder, "-p", "a", "-n", "1", "--budget", "1GiB"],
    ):
        result = CliRunner().invoke(main, [str(word) for word in command])
        told = (command[0], result.stderr, result.exception)
        assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (5, "", 1), told
        assert "Traceback" not in result.stderr
        assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize("tier", ["Q3_K", "Q4_K", "Q6_K", "Q8_0", "source"])
def test_a_hostile_level_with_the_right_hash_is_refused_or_gives_bytes_of_the_right_size(
    folder, tier
):
    rng, path = random.Random(tier), files_of(folder)["levels"]
    data = path.read_bytes()
    rows = json.loads((folder / "edgekit.json").read_bytes())["levels"]
    index = next(i for i, row in enumerate(rows) if row["tier"] == tier and row["parent"])
    start, n_bytes, refused = rows[index]["offset"], rows[index]["bytes"], 0
    for _ in range(60):
        payload = damaged(rng, data[start : start + n_bytes], may_cut=False)
        payload = payload[:n_bytes].ljust(n_bytes, b"\0")
        path.write_bytes(data[:start] + payload + data[start + n_bytes :])
        forge(folder, setting("levels", index, "sha256", to=hashlib.sha256(payload).hexdigest()))
        with open_artifact(folder) as artifact:
            depths = plan_tier(artifact, tier).depths
            try:
                assembly = Assembly(artifact, depths)
                assert len(assembly.read(0, assembly.size)) == assembly.size
            except RefusedError:
                refused += 1
    assert refused


def test_chunks_cut_otherwise_than_they_were_written_are_refused(folder, tmp_path):
    forge(folder, setting("chunk_weights", to=4096))
    result = CliRunner().invoke(
        main, ["materialize", str(folder), "--tier", "Q4_K", "-o", str(tmp_path / "out.gguf")]
    )
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (5, "", 1)
    assert not (tmp_path / "out.gguf").exists()


FACTS = {
    "a.block_count": 2,
    "a.embedding_length": 256,
    "a.attention.head_count": 4,
    "a.context_length": 512,
    "vocab_size": 320,
}


@pytest.mark.parametrize(
    "lie",
    [
        {"a.block_count": 1 << 40},
        {"a.block_count": None},
        {"a.block_count": True},
        {"a.attention.head_count": 0},
        {"a.attention.head_count": "4"},
        {"a.attention.head_count_kv": ["4", "4"]},
        {"a.attention.head_count_kv": [4]},
        {"a.attention.head_count_kv": []},
        {"a.attention.key_length": -1},
        {"a.feed_forward_length": "many"},
        {"a.feed_forward_length": [1 << 60, 1]},
        {"a.context_length": 1 << 60},
        {"vocab_size": 0},
        {"vocab_size": "many"},
    ],
    ids=str,
)
def test_facts_of_a_model_that_are_no_counts_are_refused_before_anything_is_allocated(lie):
    shape_of("a", FACTS)
    with pytest.raises(RefusedError):
        shape_of("a", FACTS | lie)
