"""Device profiles: each number with its source, read as untrusted files; plans made for them."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from edgekit.cli import main
from edgekit.devices.profile import (
    FIGURES,
    FOLDER,
    OPTIONAL,
    Figure,
    as_toml,
    device_names,
    find_device,
    read_device,
)
from edgekit.errors import RefusedError, UnknownNameError

WANTED = {
    "pixel-8", "pixel-6a", "galaxy-s24", "iphone-15", "raspberry-pi-5", "jetson-orin-nano",
    "steam-deck", "macbook-air-m2", "laptop-16gb",
}  # fmt: skip
PIXEL = (FOLDER / "pixel-8.toml").read_text()


def test_the_devices_that_people_ask_for_are_there():
    assert set(device_names()) >= WANTED


@pytest.mark.parametrize("name", device_names())
def test_every_number_has_a_source_and_a_published_or_measured_one_an_address(name):
    device = find_device(name)
    for key in FIGURES:
        figure = getattr(device, key)
        assert len(figure.source) > 15, key
        if figure.kind in ("published", "measured"):
            assert re.search(r"https?://\S+\.\S+", figure.source), (key, figure.source)
    assert 0 < device.app_share.value < 1


@pytest.mark.parametrize("name", device_names())
def test_figures_are_those_of_hardware(name):
    """A misplaced digit or a unit mistaken for another does not pass."""
    device = find_device(name)
    assert 4e9 < device.total_memory_bytes.value < 20e9
    assert 10e9 < device.memory_bytes_per_s.value < 150e9
    assert device.decode_bytes_per_s.value < device.memory_bytes_per_s.value
    assert 5e7 < device.storage_bytes_per_s.value < 1e10
    assert 1 <= device.cores.value <= 16
    assert 5e10 < device.prompt_operations_per_s.value < 1e12
    assert 1e-6 < device.layer_seconds.value < 1e-3


@pytest.mark.parametrize("name", device_names())
def test_what_is_estimated_from_other_figures_follows_from_them(name):
    """The factor is the one that the source says."""
    device = find_device(name)
    memory = device.memory_bytes_per_s.value
    assert device.cached_bytes_per_s.value == pytest.approx(memory / 4, rel=0.01)
    if device.decode_bytes_per_s.kind == "estimated":
        assert device.decode_bytes_per_s.value == pytest.approx(0.65 * memory, rel=0.01)
    prompt = device.prompt_operations_per_s
    if prompt.kind == "estimated":
        cycles = 1e9 * float(prompt.source.split(" G cycles/s")[0])
        assert prompt.value == pytest.approx(11.4 * cycles, rel=0.01)
        assert device.attention_per_s.value == pytest.approx(1.5 * cycles, rel=0.04)
        assert cycles < 4e9 * device.cores.value  # of the cores that decode, no others


def test_a_budget_is_the_share_of_an_app():
    assert find_device("pixel-8").budget_bytes == 4 << 30  # half of 8 GiB


def test_a_profile_comes_back_from_its_text(tmp_path):
    by_type = Figure(2e10, "measured", "a probe", {"Q4_K": 3.5e10, "BF16": 1e10})
    device = replace(find_device("pixel-8"), decode_bytes_per_s=by_type, small_bytes=by_type)
    path = tmp_path / "pixel-8.toml"
    path.write_text(as_toml(device))
    assert read_device(path) == device
    assert find_device(str(path)).decode_bytes_per_s.of("Q4_K") == 3.5e10
    assert find_device(str(path)).decode_bytes_per_s.of("Q2_K") == 2e10


def test_small_models_have_rates_of_their_own():
    small = Figure(1e11, "measured", "a probe")
    limit = Figure(1 << 20, "measured", "a probe")
    device = replace(find_device("pixel-8"), small_bytes=limit, small_decode_bytes_per_s=small)
    assert device.decode_rates(1 << 20) is small
    assert device.decode_rates((1 << 20) + 1) is device.decode_bytes_per_s
    assert device.prompt_rates(1) is device.prompt_operations_per_s  # not given for small ones
    batch = Figure(5e9, "measured", "a probe")
    large = replace(device, batch_bytes_per_s=batch)
    assert device.batch_rates(1 << 30) is device.decode_bytes_per_s
    assert large.batch_rates(1 << 30) is batch and large.batch_rates(1) is small
    assert set(OPTIONAL) == {
        "batch_bytes_per_s", "small_bytes", "small_decode_bytes_per_s",
        "small_prompt_operations_per_s", "expert_operations_per_s", "small_expert_operations_per_s",
    }  # fmt: skip
    expert = replace(large, expert_operations_per_s=batch, small_prompt_operations_per_s=limit)
    assert expert.expert_rates(1 << 30) is batch and expert.expert_rates(1) is limit
    assert large.expert_rates(1 << 30) is large.prompt_operations_per_s
    assert replace(expert, small_expert_operations_per_s=small).expert_rates(1) is small


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('name = "Google Pixel 8"', "", "lacks name"),
        ("[cores]", "[corse]", "lacks cores"),
        ("[cores]", "hidden = 1\n[cores]", "has 'hidden', which is unknown"),
        ("value = 0.5", "value = 1.5", "app_share is 1.5"),
        ("value = 0.5", "value = -0.5", "app_share has a value that is no number above 0"),
        ("value = 0.5", "value = nan", "app_share has a value"),
        ("value = 0.5", "value = inf", "app_share has a value"),
        ("value = 0.5", "value = true", "app_share has a value"),
        ("value = 0.5", 'value = "half"', "app_share has a value"),
        ("value = 0.5", "value = 0.5\nby_type = { Q4_K = 0 }", "app_share has a value"),
        ('kind = "estimated"', 'kind = "guessed"', "of kind 'guessed'; choose measured, publ"),
        ('name = "Google Pixel 8"', 'name = " "', "name needs a text"),
        ("[cores]", "[cores", "no TOML"),
    ],
)
def test_a_file_that_is_no_profile_is_refused_in_one_line(tmp_path, old, new, words):
    path = tmp_path / "mine.toml"
    path.write_text(PIXEL.replace(old, new, 1))
    with pytest.raises(RefusedError, match=re.escape(words)) as caught:
        read_device(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_an_unknown_device_is_offered_the_nearest():
    with pytest.raises(UnknownNameError, match="unknown device 'pixel8'; did you mean 'pixel-8'"):
        find_device("pixel8")
    with pytest.raises(UnknownNameError, match="unknown device"):
        find_device("../../etc/passwd")


def cli(*args: str):
    return CliRunner().invoke(main, [str(a) for a in args])


def test_plan_takes_the_budget_of_a_device_and_predicts(llama_artifact):
    result = cli("plan", llama_artifact, "--device", "pixel-6a", "--json")
    body = json.loads(result.stdout)
    assert body["budget_bytes"] == find_device("pixel-6a").budget_bytes
    assert body["device"] == "pixel-6a"
    assert body["predicted"]["decode_tokens_per_s"] > body["predicted"]["late_tokens_per_s"] > 0
    assert result.stderr.count("\n") == 1 and "Google Pixel 6a" in result.stderr
    assert "predicted: " in cli("plan", llama_artifact, "--device", "pixel-6a").stderr


def test_two_budgets_are_one_too_many(llama_artifact):
    result = cli("plan", llama_artifact, "--device", "pixel-8", "--budget", "1GiB")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "Error: --budget and --device both name a budget; give one\n"


def test_devices_lists_them_all():
    listed = json.loads(cli("devices", "--json").stdout)["devices"]
    assert [row["id"] for row in listed] == list(device_names())
    assert listed[0]["budget_bytes"] == find_device(listed[0]["id"]).budget_bytes
    assert all(name in cli("devices").stdout for name in device_names())


@pytest.mark.parametrize(("name", "word"), [("there.toml", "--force"), ("x.txt", ".toml")])
def test_a_probe_says_first_that_its_file_cannot_be(tmp_path, name, word):
    (tmp_path / "there.toml").touch()
    result = cli("devices", "probe", "-o", tmp_path / name)
    assert result.exit_code == 2 and word in result.stderr
    assert Path(tmp_path / "there.toml").read_text() == ""
