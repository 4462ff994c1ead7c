"""The page and the figures as texts: complete, closed in themselves, the same numbers as --json."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report.samples import four_experts, planned
from synthetic import synthetic_calibration

from rq_gguf.report.colours import palette
from rq_gguf.report.data import Report, to_json
from rq_gguf.report.figures import NARROW, WIDE, drawn
from rq_gguf.report.gather import gather, subject_of_plan
from rq_gguf.report.page import page
from rq_gguf.report.png import available, write_png
from rq_gguf.report.shapes import Axis, Cells, Dots, Line, Text, log_ticks, ticks
from rq_gguf.report.svg import standalone
from rq_gguf.report.words import verdict

ALL = ["load", "lis", "importance", "map", "bytes", "frontier", "coverage"]
VOID = {"meta", "link", "path", "polyline"}


@pytest.fixture(scope="module")
def report() -> Report:
    c = synthetic_calibration(5, 16, types=("q2_k", "q4_k", "q6_k", "q8_0"))
    return gather(subject_of_plan("c.gguf", c, planned(c, "5.5bpw", 2, c.types)), vram=700_000)


class Reader(HTMLParser):
    """Checks that tags nest; collects ids and texts of scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.script: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.ids += [v for k, v in attrs if k == "id" and v]
        self.links += [v for k, v in attrs if k in ("src", "href") and v]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.script.append(data)


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    return reader


def test_page_is_whole_and_needs_no_network(report: Report) -> None:
    text = page(report)
    reader = read(text)
    assert [i for i in reader.ids if i in ALL] == ALL
    assert reader.links == ["data:,"] and "http" not in text and "url(" not in text and "@import" not in text
    assert json.loads(reader.script[0]) == json.loads(json.dumps(to_json(report)))


def test_every_colour_is_defined_light_and_dark(report: Report) -> None:
    text = page(report)
    used = set(re.findall(r"var\(--(\w+)\)", text))
    n = len(report.types)
    assert used <= palette(n, dark=False).keys() and palette(n, dark=False).keys() == palette(n, dark=True).keys()
    assert all(re.fullmatch("#[0-9a-f]{6}", c) for dark in (False, True) for c in palette(n, dark=dark).values())
    types = [palette(9, dark=dark)[f"type{i}"] for dark in (False, True) for i in range(9)]
    assert len(set(types)) == 18


def test_names_are_escaped(report: Report) -> None:
    evil = '</script><script>alert("&")</script><!--'
    text = page(replace(report, model=evil, name=evil, notes=(evil,)))
    reader = read(text)
    assert text.count("<script") == 2 and json.loads(reader.script[0])["model"] == evil


def test_a_report_of_little_shows_what_it_has() -> None:
    c = replace(synthetic_calibration(2, 8), load_known=False)
    r = gather(subject_of_plan("c.gguf", c, planned(c, replicas=0)))
    assert list(drawn(r)) == ["map", "bytes", "frontier"]
    read(page(r))
    assert list(drawn(replace(r, chosen=None))) == ["map", "bytes"]


@pytest.mark.parametrize("width", [WIDE, NARROW])
@pytest.mark.parametrize("name", ALL)
def test_figures_stay_inside(report: Report, name: str, width: float) -> None:
    d = drawn(report)[name](report, width)
    assert d.width == width and 60 < d.height < 900
    for shape in d.shapes:
        match shape:
            case Cells():
                points = [p for x, y, w, h in shape.boxes for p in ((x, y), (x + w, y + h))]
            case Line():
                points = list(shape.points)
            case Dots():
                points = list(shape.centres)
            case Text():
                length = 6 * len(shape.words) * {"start": 0, "middle": 0.5, "end": 1}[shape.anchor]
                points = [(shape.x, shape.y) if shape.turned else (shape.x - length, shape.y), (shape.x, shape.y)]
        assert all(-1 <= x <= d.width + 1 and -1 <= y <= d.height + 1 for x, y in points), shape


@pytest.mark.parametrize("name", ALL)
def test_standalone_svg(report: Report, name: str) -> None:
    text = standalone(drawn(report)[name](report, WIDE), palette(len(report.types), dark=False))
    root = ElementTree.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg" and float(root.attrib["width"]) == WIDE
    assert "var(" not in text


def test_maps_show_every_expert_once() -> None:
    c, plan = four_experts()
    r = gather(subject_of_plan("c.gguf", c, plan))
    load, types = (drawn(r)[name](r, WIDE) for name in ("load", "map"))
    assert load.grid is not None
    x, y, w, h, columns, rows = load.grid
    assert (columns, rows) == (4, 1)
    cells = [box for s in load.shapes if isinstance(s, Cells) for box in s.boxes if box[1] >= y]
    assert sorted(b[0] for b in cells) == pytest.approx([x + i * w for i in range(4)])
    halves = {s.fill: len(s.boxes) for s in types.shapes if isinstance(s, Cells)}
    assert halves == {"type0": 3, "type1": 5}  # gate and up: q8_0 and 3 q4_k; down: 4 q8_0
    copies = [s for s in types.shapes if isinstance(s, Dots) and s.centres[0][1] > y]
    assert len(copies) == 1 and len(copies[0].centres) == 1 and x < copies[0].centres[0][0] < x + w


def test_the_frontier_shows_the_plan_where_it_is(report: Report) -> None:
    d = drawn(report)["frontier"](report, WIDE)
    words = {s.words for s in d.shapes if isinstance(s, Text)}
    assert {"this plan", "q2_k", "q8_0"} <= words
    (mark,) = (s for s in d.shapes if isinstance(s, Dots) and s.kind == "diamond" and s.radius == 7)
    (line,) = (s for s in d.shapes if isinstance(s, Line) and s.stroke == "accent" and len(s.points) > 2)
    below = [p for p in line.points if p[0] <= mark.centres[0][0]]
    assert below[-1][1] > mark.centres[0][1]  # copies cost precision: above the line


def test_types_that_lose_nothing() -> None:
    """What MXFP4 is to a model that came in it."""
    c = synthetic_calibration(2, 8)
    c = replace(c, layers=tuple(replace(x, error=x.error * [1, 0]) for x in c.layers))
    r = gather(subject_of_plan("c.gguf", c, planned(c, "q8_0", 0)))
    assert r.kld == 0 and verdict(r)[1].heading == "One type is exact here"
    d = drawn(r)["frontier"](r, WIDE)
    assert all(0 <= y <= d.height for s in d.shapes if isinstance(s, Dots) for _, y in s.centres)


def test_many_layers_and_experts() -> None:
    c = synthetic_calibration(48, 128)
    r = gather(replace(subject_of_plan("c.gguf", c, planned(c, "q8_0", 0)), calibration=None))
    text = page(r)
    read(text)
    assert len(text) < 2_500_000
    assert drawn(r)["map"](r, NARROW).height < 600


@pytest.mark.skipif(not available(), reason="matplotlib is not installed")
@pytest.mark.parametrize("name", ["map", "frontier"])  # test_report draws all
def test_png(report: Report, name: str, tmp_path: Path) -> None:
    import numpy as np
    from matplotlib.image import imread

    d, colours = drawn(report)[name](report, WIDE), palette(len(report.types), dark=False)
    write_png(d, colours, tmp_path / "figure.partial")
    image = imread(tmp_path / "figure.partial", format="png")
    assert image.shape[1] == 2 * WIDE and abs(image.shape[0] - 2 * d.height) <= 1
    assert np.unique(image.reshape(-1, image.shape[2]), axis=0).shape[0] > 10


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e9), st.integers(4, 9))
def test_ticks(low: float, span: float, most: int) -> None:
    found = ticks(low, low + span, most)
    assert 1 <= len(found) <= most and found == sorted(set(found))
    assert all(low - 1e-6 * span <= v <= low + span * (1 + 1e-6) for v in found)


@given(st.floats(1e-9, 1e3), st.floats(1.01, 1e7), st.integers(4, 9))
def test_log_ticks(low: float, factor: float, most: int) -> None:
    found = log_ticks(low, low * factor, most)
    assert 1 <= len(found) <= most and found == sorted(set(found))
    assert all(low * 0.99 <= v <= low * factor * 1.01 for v in found)


def test_axes() -> None:
    assert Axis(0, 10, 100, 200)(5) == 150
    assert Axis(1, 100, 200, 100, log=True)(10) == pytest.approx(150)
    assert Axis(3, 3, 0, 10)(3) == 5
    assert Axis(1, 100, 200, 100, log=True)(0) == 200
