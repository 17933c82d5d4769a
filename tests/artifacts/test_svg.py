"""Charts, read back by an XML parser: marks stand where plain arithmetic puts them."""

import math
import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_cli.artifacts.svg import HEIGHT, WIDTH, line_chart, tick_text, ticks


def shapes(svg: str, kind: str, css: str = "") -> list[ElementTree.Element]:
    root = ElementTree.fromstring(svg)
    return [node for node in root.iter(kind) if node.get("class", "") == css]


def positions(svg: str) -> list[list[tuple[float, float]]]:
    return [
        [(float(x), float(y)) for x, y in re.findall(r"([\d.]+) ([\d.]+)", node.get("d", ""))]
        for node in shapes(svg, "path", "line")
    ]


def test_points_are_placed_in_proportion() -> None:
    (line,) = positions(line_chart([(0, 0), (5, 1), (10, 4)], x_label="step", y_label="loss"))
    (x0, y0), (x1, y1), (x2, y2) = line
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y0 - y2 == pytest.approx(4 * (y0 - y1), abs=0.5)
    assert y2 < y0, "more is further up"


def test_ticks_stand_at_their_values() -> None:
    svg = line_chart([(0, 0.0), (100, 1.0)], x_label="step", y_label="loss")
    (line,) = positions(svg)
    texts = {node.text: float(node.get("y", "")) for node in shapes(svg, "text")[:6]}
    assert list(texts) == ["0", "0.2", "0.4", "0.6", "0.8", "1"]
    assert texts["0"] - 4 == pytest.approx(line[0][1], abs=0.1)
    assert texts["1"] - 4 == pytest.approx(line[1][1], abs=0.1)


def test_gaps_where_a_value_is_not_finite() -> None:
    points = [(0, 1.0), (1, 2.0), (2, math.nan), (3, math.inf), (4, 1.0), (5, 1.5)]
    assert [len(line) for line in positions(line_chart(points, x_label="x", y_label="y"))] == [2, 2]


@pytest.mark.parametrize("points", [[], [(1, math.nan)]])
def test_no_values(points: list[tuple[float, float]]) -> None:
    text = line_chart(points, x_label="x", y_label="<y>")
    assert text == '<p class="empty">&lt;y&gt;: no values</p>'


def test_labels_are_escaped() -> None:
    svg = line_chart([(1, 2)], x_label='a"<b>', y_label='"><script>')
    root = ElementTree.fromstring(svg)
    assert root.get("aria-label") == '"><script>'
    assert "script" not in {node.tag for node in root.iter()}


number = st.floats(min_value=-1e9, max_value=1e9, allow_subnormal=False)


@given(st.lists(st.tuples(number, number), min_size=1, max_size=20))
def test_everything_stays_inside(points: list[tuple[float, float]]) -> None:
    svg = line_chart(points, x_label="x", y_label="y", markers=True)
    dots = shapes(svg, "circle", "dot")
    assert len(dots) == len(points)
    for dot in dots:
        assert 0 <= float(dot.get("cx", "")) <= WIDTH
        assert 0 <= float(dot.get("cy", "")) <= HEIGHT


@given(number, st.floats(min_value=1e-6, max_value=1e9))
def test_ticks_are_few_even_and_span_the_values(low: float, size: float) -> None:
    high = low + size
    if high - low < 1e-9 * max(abs(low), 1):
        return
    marks = ticks(low, high)
    steps = [b - a for a, b in pairwise(marks)]
    slack = 1e-6 * size + 1e-9 * abs(low)
    assert 2 <= len(marks) <= 8
    assert marks[0] <= low + slack
    assert marks[-1] >= high - slack
    assert max(steps) - min(steps) <= slack + 1e-9 * max(map(abs, marks))


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (1200.0, "1200"), (0.25, "0.25"), (5e-5, "5e-05"), (-2, "-2")]
)
def test_tick_text(value: float, text: str) -> None:
    assert tick_text(value) == text
