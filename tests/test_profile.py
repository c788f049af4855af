"""What each budget buys: the data against the planner, the page against it, a real browser."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from edgekit.catalog import open_catalog, read_manifest
from edgekit.cli import main
from edgekit.devices.profile import device_names, find_device
from edgekit.errors import RefusedError
from edgekit.footprint import kv_bytes
from edgekit.manifest import MANIFEST_NAME, dumps
from edgekit.plan import least_bytes, plan_budget, plan_tier, shape_in
from edgekit.profile import profile, read_peers
from edgekit.report import page, plots, render
from edgekit.report.numbers import split, value_at, written
from edgekit.trial import Trial
from edgekit.trials import _seconds, checks, least_disturbed

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
HOSTILE = "<script>alert(1)</script>&\"'"
CURVES = [
    {"policy": "lru", "experts_per_layer": [1, 2, 4], "hit_rate": [0.25, 0.61, 1.0]},
    {"policy": "belady", "experts_per_layer": [1, 2, 4], "hit_rate": [0.3, 0.7, 1.0]},
]
EXPERTS = {"n_experts": 4, "n_used": 1, "hit_curves": CURVES, "verdict": "benefit: a cache of 2"}
MORE = {"histogram": [[1]], "recommended": {"experts_per_layer": 2}}  # what the page does not show
PEERS = (
    {"tool": HOSTILE, "name": "Q4", "weights_bytes": 700_000, "kl_mean": 0.02},
    {"tool": "llama.cpp", "name": "Q4_K_M", "weights_bytes": 800_000, "kl_mean": 0.01},
)


def with_facts(artifact: Path, folder: Path, **facts: Any) -> Path:
    """A folder with the manifest of ``artifact`` and other facts in it."""
    folder.mkdir()
    manifest = replace(read_manifest(artifact), **facts)
    (folder / MANIFEST_NAME).write_text(dumps(manifest))
    return folder


def measured_quality(artifact: Path) -> tuple[dict[str, Any], ...]:
    """Rows as ``convert`` measures them, of made-up quality."""
    catalog = open_catalog(artifact)
    sizes = [row.weights_bytes for row in profile(artifact, []).tiers]
    return tuple(
        {
            "weights_bytes": n,
            "bits_per_weight": round(8 * n / catalog.manifest.n_parameters, 4),
            "n_tokens": 4080,
            "kl_mean": 0.1 / 4**i if i < len(sizes) - 1 else 0.0,
            "kl_error": 0.001,
            "kl_p99": 0.5,
            "top1_agreement": 0.9 + i / 100,
            "ppl": 60.0 - i,
            "ref_ppl": 53.5,
        }
        for i, n in enumerate(sizes)
    )


@pytest.fixture(scope="module")
def artifact(llama_artifact, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("profile") / "edge"
    return with_facts(llama_artifact, folder, quality=measured_quality(llama_artifact))


@pytest.fixture(scope="module")
def body(artifact, tmp_path_factory) -> Any:
    """Everything that a page can have, a device that nothing fits on among it."""
    devices = [find_device(name) for name in device_names()[:3]]
    share = replace(devices[0].app_share, value=0.001)
    devices.append(replace(devices[0], name="A watch", app_share=share))
    catalog = open_catalog(artifact)
    plans = [plan_budget(catalog, least_bytes(catalog, 512) << i, 512) for i in range(3)]
    trials = [trial(plan.budget_bytes or 0, 500.0 - 100 * i) for i, plan in enumerate(plans)]
    found = checks(catalog, plans, trials, devices[0])
    told = {"device": {}, "n_prompt": 256, "n_tokens": 48, "checks": [vars_of(c) for c in found]}
    made = profile(artifact, devices, context=512, peers=PEERS, measured=lambda *_: told)
    return replace(made, experts=EXPERTS).as_json()


def trial(budget: int, rate: float) -> Trial:
    return Trial(budget, budget - 5, budget - 9, 0.5, 2 * rate, rate, budget // 2, 0.1, 0.2)


def vars_of(check: Any) -> dict[str, Any]:
    return {**vars(check), "trial": vars(check.trial)}


@pytest.fixture(scope="module")
def html(body) -> str:
    return render(body)


# The data


def test_budgets_are_plans_from_the_smallest_to_everything(artifact):
    catalog, found = open_catalog(artifact), profile(artifact, [], context=512)
    assert found.budgets[0].budget_bytes == found.least_bytes
    assert found.budgets[-1].weights_bytes == plan_tier(catalog, "source").depths.weights_bytes
    for row in found.budgets:
        plan = plan_budget(catalog, row.budget_bytes, 512)
        assert row.total_bytes == plan.total_bytes <= row.budget_bytes
        assert sum(row.by_tier.values()) == row.weights_bytes == plan.depths.weights_bytes
        assert row.expected_kl == plan.expected_kl
    weights = [row.weights_bytes for row in found.budgets]
    assert weights == sorted(set(weights)) and len(weights) > 8


def test_one_byte_below_the_smallest_budget_fits_nothing(artifact):
    least = profile(artifact, [], context=512).least_bytes
    result = CliRunner().invoke(
        main, ["plan", str(artifact), "--budget", str(least - 1), "--context", "512"]
    )
    assert result.exit_code == 3


def test_a_tier_is_what_a_dedicated_file_holds(artifact):
    catalog, found = open_catalog(artifact), profile(artifact, [])
    for row in found.tiers:
        assert row.weights_bytes == plan_tier(catalog, row.tier).depths.weights_bytes
    assert found.artifact.separate_bytes == sum(row.weights_bytes for row in found.tiers)


def test_the_staircase_has_a_step_for_every_level(artifact):
    manifest, found = read_manifest(artifact), profile(artifact, [])
    assert len(found.stairs) == 1 + len(manifest.resident_order)
    assert found.stairs[0].weights_bytes == found.tiers[0].weights_bytes
    assert found.stairs[-1].weights_bytes == found.tiers[-1].weights_bytes
    kls = [stair.expected_kl for stair in found.stairs]
    assert kls == sorted(kls, reverse=True) and kls[0] == manifest.quality[0]["kl_mean"]


def test_bits_weighted_by_size_are_those_of_the_plan(artifact):
    catalog, found = open_catalog(artifact), profile(artifact, [])
    sizes = {s.name.removesuffix(".weight"): s.n_weights for s in catalog.stacks}
    names = [[f"blk.{c}.{r}" if c != "once" else r for c in found.columns] for r in found.roles]
    for bit_map in found.maps:
        total = sum(
            bits * sizes[name]
            for row, of_row in zip(bit_map.bits, names, strict=True)
            for bits, name in zip(row, of_row, strict=True)
            if bits is not None
        )
        norms = sum(32 * s.n_weights for s in catalog.stacks if len(s.shape) == 1)
        n_bits = bit_map.bits_per_weight * catalog.manifest.n_parameters
        assert total + norms == pytest.approx(n_bits)


def test_the_cache_grows_as_the_formula_says(artifact):
    shape, found = shape_in(open_catalog(artifact)), profile(artifact, [])
    assert found.cache[-1].context == shape.context
    for row in found.cache:
        assert row.by_type["f16"] == kv_bytes(shape, row.context, "f16")


def test_a_device_gets_the_plan_of_its_budget_or_is_told_why_not(body):
    *fitting, watch = body["devices"]
    for row in fitting:
        assert row["plan"]["total_bytes"] <= row["budget_bytes"]
        assert row["predicted"]["decode_tokens_per_s"] > 0
    assert watch["plan"] is watch["predicted"] is None
    assert "the lowest depth needs" in watch["needs"]


def test_without_measurements_there_is_no_quality(llama_artifact):
    found = profile(llama_artifact, [])
    assert (found.quality, found.stairs, found.reference_ppl) == ((), (), None)
    text = render(found.as_json())
    assert 'id="quality"' not in text and 'id="memory"' in text


def test_peers_are_rows_of_others(tmp_path):
    path = tmp_path / "compare.json"
    rows = [
        {"tool": "x", "name": "b", "weights_bytes": 9, "kl_mean": 0.5, "load_seconds": 1},
        {"tool": "x", "name": "a", "weights_bytes": 3, "kl_mean": 1.5},
        {"tool": "y", "name": "failed", "weights_bytes": 3, "kl_mean": None},
    ]
    path.write_text(json.dumps({"models": rows}))
    assert [(row["name"], row["kl_mean"]) for row in read_peers(path)] == [("a", 1.5), ("b", 0.5)]
    for text in ("[]", "{", '{"models": [{"kl_mean": 1}]}', '{"models": [1]}', '{"models": 3}'):
        path.write_text(text)
        with pytest.raises(RefusedError, match="holds no list of models"):
            read_peers(path)


@pytest.mark.parametrize(
    "told",
    [
        EXPERTS | {"hit_curves": [{"policy": "lru"}]},
        EXPERTS | {"hit_curves": [CURVES[0] | {"hit_rate": [1.0]}]},
        EXPERTS | {"hit_curves": 3},
        {"hit_curves": CURVES},
    ],
)
def test_experts_told_in_another_form_are_refused(llama_artifact, tmp_path, told):
    folder = with_facts(llama_artifact, tmp_path / "edge", experts=told)
    with pytest.raises(RefusedError, match="experts"):
        profile(folder, [])


def test_experts_are_drawn_where_the_manifest_tells_of_them(llama_artifact, tmp_path):
    folder = with_facts(llama_artifact, tmp_path / "edge", experts=EXPERTS | MORE)
    assert profile(folder, []).experts == EXPERTS
    assert profile(llama_artifact, []).experts == {}


def test_a_prediction_takes_one_factor_from_the_other_budgets_and_nothing_from_its_own(artifact):
    catalog, device = open_catalog(artifact), find_device("pixel-8")
    rows = profile(artifact, [], context=512).budgets[::4]
    plans = [plan_budget(catalog, row.budget_bytes, 512) for row in rows]
    seconds = [_seconds(catalog, plan, device) for plan in plans]
    trials = [
        replace(
            trial(plan.budget_bytes or 0, 1.0),
            decode_tokens_per_s=1 / (1.5 * token),
            prompt_tokens_per_s=1 / (0.8 * prompt),
        )
        for plan, (token, prompt) in zip(plans, seconds, strict=True)
    ]
    rates = [t.decode_tokens_per_s for t in trials]
    trials[1] = replace(trials[1], decode_tokens_per_s=7.0)  # disturbed
    found = checks(catalog, plans, trials, device)
    assert [c.decode_tokens_per_s for c in found] == pytest.approx(rates)
    assert [c.prompt_tokens_per_s for c in found] == pytest.approx(
        [t.prompt_tokens_per_s for t in trials]
    )
    alone = checks(catalog, plans[:1], trials[:1], device)  # nothing to take a factor from
    assert alone[0].decode_tokens_per_s == pytest.approx(1 / seconds[0][0])


def test_of_two_rounds_the_less_disturbed_counts():
    slow, fast = trial(1000, 50.0), replace(trial(1000, 60.0), load_seconds=0.4, peak_bytes=900)
    best = least_disturbed([slow, fast])
    assert (best.decode_tokens_per_s, best.load_seconds) == (60.0, 0.4)
    assert (best.peak_bytes, best.budget_bytes) == (991, 1000)


# The page


EMPTY = ("meta", "link", "path", "use", "rect")  # elements without content


class Text(HTMLParser):
    """What a reader sees: numbers of the data apart from other words; pictures left out."""

    def __init__(self) -> None:
        super().__init__()
        self.inside: list[str] = []
        self.words: list[str] = []
        self.numbers: list[tuple[dict[str, str | None], str]] = []
        self.marks: list[tuple[str, str]] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        given = dict(attrs)
        self.links += [given[key] for key in ("src", "href", "xlink:href") if given.get(key)]
        if tag in EMPTY:
            return
        self.inside.append(tag)
        if tag == "data":
            self.numbers.append((given, ""))
        if given.get("class") == "mark":
            self.marks.append((given["data-at"], ""))

    def handle_endtag(self, tag: str) -> None:
        if tag in EMPTY:
            return
        while self.inside and self.inside.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "data" in self.inside:
            given, text = self.numbers.pop()
            self.numbers.append((given, text + data))
        elif "title" in self.inside and "svg" in self.inside:
            at, text = self.marks.pop()
            self.marks.append((at, text + data))
        elif not {"svg", "style", "script"} & set(self.inside):
            self.words.append(data)


@pytest.fixture(scope="module")
def seen(html) -> Text:
    text = Text()
    text.feed(html)
    return text


def test_every_number_of_the_page_is_a_value_of_the_json_in_its_unit(seen, body):
    assert len(seen.numbers) > 300
    for given, text in seen.numbers:
        value = value_at(body, split(given["data-at"]))
        assert given["value"] == (value if isinstance(value, str) else json.dumps(value))
        assert text == written(value, given["data-unit"])


def test_no_other_digit_is_on_the_page_but_in_names(seen, body):
    names = sorted({tier for row in body["budgets"] for tier in row["by_tier"]}, key=len)
    names += list(body["cache"][0]["by_type"])
    for words in seen.words:
        for name in reversed(names):
            words = words.replace(name, "")
        assert not re.search(r"\d", words), words


def test_every_mark_says_its_number(seen, body):
    kinds = {split(at)[0] for at, _ in seen.marks}
    assert kinds == {
        "quality", "peers", "budgets", "maps", "cache", "devices", "measured", "experts"
    }  # fmt: skip
    for at, text in seen.marks:
        value = value_at(body, split(at))
        if not isinstance(value, dict):
            units = [
                written(value, unit)
                for unit in ("size", "bits", "rate", "share")
                if unit != "share" or value <= 1
            ]
            assert any(number in text for number in units), (at, text)


def test_the_data_is_in_the_page_as_json(html, body):
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)
    assert found and json.loads(found[1]) == body


def test_nothing_is_fetched_and_nothing_of_the_artifact_becomes_markup(seen, html):
    assert [link for link in seen.links if not link.startswith(("#", "data:"))] == []
    assert "default-src 'none'" in html
    assert "<script>alert" not in html and HOSTILE in "".join(text for _, text in seen.numbers)


def test_ids_of_pictures_do_not_collide(html):
    ids = re.findall(r'\sid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    references = set(re.findall(r"(?:url\(#|href=\"#)([\w-]+)", html))
    assert references - set(ids) == set()


def test_colours_are_all_variables_of_the_style_sheet(html):
    svgs = "".join(re.findall(r"<svg.*?</svg>", html, re.S))
    assert set(re.findall(r"#[0-9a-f]{6}\b", svgs)) == set()
    used = set(re.findall(r"var\(--(\w+)\)", svgs))
    for scheme in (html, html[html.index("prefers-color-scheme: dark") :]):
        assert used <= set(re.findall(r"--(\w+):", scheme))


def test_the_same_data_gives_the_same_page(html, body):
    assert render(body) == html


def test_plots_hold_the_data(body):
    """As matplotlib has it: points, bars and cells are where the numbers say."""
    axes = plots.quality(body).axes[0]
    points = {line.get_gid(): line.get_xydata()[0].tolist() for line in axes.lines}
    for i, row in enumerate(body["quality"][:-1]):  # a divergence of 0 is on no logarithmic axis
        assert points[f"at:quality/{i}"] == [row["weights_bytes"] / 2**20, row["kl_mean"]]
    heights = [0.0] * len(body["budgets"])
    for bar in plots.memory(body).axes[0].patches:
        _, i, *part = split(bar.get_gid().removeprefix("at:"))
        assert bar.get_y() == pytest.approx(heights[i])
        assert bar.get_height() == value_at(body["budgets"][i], part) / 2**20
        heights[i] += bar.get_height()
    assert heights == pytest.approx([row["total_bytes"] / 2**20 for row in body["budgets"]])
    for box in plots.bits(body, 1).axes[0].patches:
        _, _, _, r, c = split(box.get_gid().removeprefix("at:"))
        assert (int(box.get_x()), int(box.get_y())) == (c, r)
        assert box.get_facecolor()[:3] == pytest.approx(
            [
                int(plots.STEPS[plots.step_of(body["maps"][1]["bits"][r][c])][k : k + 2], 16) / 255
                for k in (1, 3, 5)
            ]
        )


def test_each_section_has_a_text(body):
    template = (Path(page.__file__).parent / "page.html").read_text()
    for section in page.sections(body):
        assert f'"{section.id}": "' in template


# The command


def cli(*args: Any) -> Any:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def test_the_command_writes_the_page_and_prints_the_data(artifact, tmp_path):
    output = tmp_path / "report.html"
    result = cli("profile", artifact, "-o", output, "--device", "pixel-8", "--json")
    printed = json.loads(result.stdout)
    assert [row["device"]["id"] for row in printed["devices"]] == ["pixel-8"]
    assert output.read_text() == render(printed)
    again = cli("profile", artifact, "-o", output)
    assert again.exit_code == 2 and "--force" in again.stderr
    every = json.loads(cli("profile", artifact, "--json").stdout)
    assert [row["device"]["id"] for row in every["devices"]] == list(device_names())


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("profile", "{a}"), 2, "give -o FILE"),
        (("profile", "{a}", "-o", "no/r.html"), 2, "a folder that exists"),
        (("profile", "{a}", "--json", "--device", "pixel"), 2, "did you mean 'pixel-"),
        (("profile", "{t}", "--json"), 2, "edgekit convert"),
        (("profile", "{a}", "--json", "--context", "99999999"), 2, "out of range"),
    ],
)
def test_errors_are_one_line(artifact, tmp_path, words, code, told):
    result = cli(*(word.format(a=artifact, t=tmp_path) for word in words))
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (code, "", 1)
    assert told in result.stderr


def test_without_matplotlib_the_page_says_what_to_install(artifact, tmp_path):
    code = "import sys; sys.modules['matplotlib'] = None; from edgekit.cli import main; main()"
    words = [sys.executable, "-c", code, "profile", artifact, "-o", tmp_path / "r.html"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.endswith("needs matplotlib; pip install edgekit[report], or take --json\n")
    assert not (tmp_path / "r.html").exists()
    assert subprocess.run([*words[:5], "--json"], capture_output=True).returncode == 0


# The browser

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-extensions", "--enable-logging=stderr", "--virtual-time-budget=2000", "--dump-dom",
    "--host-resolver-rules=MAP * ~NOTFOUND",
)  # fmt: skip
ASK = """<script>
const all = [...document.querySelectorAll(".mark")];
all[0].dispatchEvent(new Event("focus"));
const width = document.documentElement;
document.body.dataset.found = JSON.stringify([width.scrollWidth, width.clientWidth, all.length,
  document.getElementById("tip").textContent, document.querySelectorAll("svg title").length,
  performance.getEntriesByType("resource").map((entry) => entry.name)]);
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_it_without_an_error_or_a_request(html, tmp_path, width):
    path = tmp_path / "report.html"
    path.write_text(html.replace("</body>", ASK + "</body>"))
    words = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}"]
    words += [f"--window-size={width},900", path.as_uri()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    found = re.search(r'data-found="([^"]*)"', done.stdout)
    assert found, done.stdout[-500:]
    scroll, client, marks, tip, titles, fetched = json.loads(found[1].replace("&quot;", '"'))
    assert scroll <= client  # nothing is wider than the window but what scrolls by itself
    assert marks > 50 and titles == 0 and "measured: weights" in tip
    assert fetched == []  # and what the policy of the page forbids is an error of the console
