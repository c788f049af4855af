"""The page: every number of it is one of the data, nothing else is fetched, a browser shows it."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from profiles import HOSTILE, full_body, with_quality

from edgekit.devices.profile import FIGURES, OPTIONAL
from edgekit.report import page, plots, render
from edgekit.report.numbers import split, value_at, written

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def body(llama_artifact, tmp_path_factory) -> Any:
    return full_body(with_quality(llama_artifact, tmp_path_factory.mktemp("report") / "edge"))


@pytest.fixture(scope="module")
def html(body) -> str:
    return render(body)


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


def test_the_source_of_every_figure_of_a_device_is_on_the_page(seen, body):
    shown = {given["data-at"] for given, _ in seen.numbers}
    for i, row in enumerate(body["devices"]):
        for key in (*FIGURES, *(key for key in OPTIONAL if row["device"][key])):
            assert f"devices/{i}/device/{key}/source" in shown


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
        if isinstance(value, dict):
            assert f"KL {written(value['kl_mean'], 'kl')}" in text, (at, text)
            continue
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
