"""A matplotlib figure as SVG that is part of a page: its colours, its type, text under the pointer.

What matplotlib writes is trusted: it draws what `edgekit.report.plots` asks for. Marks with a
``gid`` that begins with ``at:`` become focusable and carry the text that `describe` gives them.
"""

import io
import re
from collections.abc import Callable, Mapping
from xml.etree import ElementTree

from matplotlib.figure import Figure

from edgekit.report.numbers import Path, split

SVG, XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"
MARK = "at:"
DRAWING = {"style", "d", "transform", "x", "y", "width", "height", "viewBox"}
ElementTree.register_namespace("", SVG[1:-1])
ElementTree.register_namespace("xlink", XLINK[1:-1])
_REFERENCE = re.compile(r"#([\w-]+)")


def inline(
    figure: Figure, label: str, colours: Mapping[str, str], describe: Callable[[Path], str]
) -> str:
    """The figure as an ``<svg>`` element.

    Args:
        figure: Drawn.
        label: What it shows, for those who cannot see it; also makes its ids unique.
        colours: Colours of the figure, and what stands for them in the page.
        describe: The text of a mark, by the path of its numbers.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    root = ElementTree.fromstring(buffer.getvalue())
    for key in ("width", "height"):
        root.attrib.pop(key, None)
    root.set("role", "img")
    root.set("aria-label", label)
    for parent in root.iter():
        for child in list(parent):
            if child.tag.endswith("metadata") or child.tag == f"{SVG}style":
                parent.remove(child)
    _describe_marks(root, describe)
    _keep_ids_in_use(root, re.sub(r"\W+", "-", label.lower()))
    _restyle(root, colours)
    return ElementTree.tostring(root, encoding="unicode")


def _restyle(root: ElementTree.Element, colours: Mapping[str, str]) -> None:
    """Shorten coordinates, and leave type and colours to the page; words stay as they are."""
    for element in root.iter():
        for key in element.attrib.keys() & DRAWING:
            value = re.sub(r"(\d+\.\d{2})\d+", r"\1", element.attrib[key])  # a hundredth of a point
            value = re.sub(r"font: ([\d.]+)px [^\";]+", r"font-size: \1px", value)
            for colour, name in colours.items():
                value = value.replace(colour, name)
            element.set(key, value)


def _describe_marks(root: ElementTree.Element, describe: Callable[[Path], str]) -> None:
    for mark in root.iter():
        gid = mark.get("id", "")
        if gid.startswith(MARK):
            told = describe(split(gid.removeprefix(MARK)))
            mark.set("data-at", gid.removeprefix(MARK))
            mark.set("class", "mark")
            mark.set("tabindex", "0")
            title = ElementTree.Element(f"{SVG}title")
            title.text = told
            mark.insert(0, title)


def _keep_ids_in_use(root: ElementTree.Element, prefix: str) -> None:
    """Two figures of one page must not share an id; most are not needed at all."""
    used = {
        name
        for element in root.iter()
        for value in element.attrib.values()
        for name in _REFERENCE.findall(value)
        if "#" in value
    }
    for element in root.iter():
        name = element.attrib.pop("id", None)
        if name in used:
            element.set("id", f"{prefix}-{name}")
        for key, value in element.attrib.items():
            if value.startswith("#") and value[1:] in used:
                element.set(key, f"#{prefix}-{value[1:]}")
            elif value.startswith("url(#") and value[5:-1] in used:
                element.set(key, f"url(#{prefix}-{value[5:-1]})")
