"""Charts: round ticks, and lines where the numbers are."""

import json
import math
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vishwamai_mp.observability.chart import HEIGHT, WIDTH, Line, labels, line_chart, nice_ticks, short
from vishwamai_mp.observability.report_style import STYLE
from vishwamai_mp.observability.run_folder import Curve


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
def test_ticks_are_round_and_within(low, width):
    high = low + width
    if width < abs(low) * 1e-9:
        return
    ticks = nice_ticks(low, high)
    step = 10 ** math.floor(math.log10(width / 5))
    assert 2 <= len(ticks) <= 11
    assert all(low - width * 1e-6 <= tick <= high + width * 1e-6 for tick in ticks)
    assert all(abs(tick / step - round(tick / step)) < 1e-3 for tick in ticks)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        *[(0, "0"), (0.25, "0.25"), (3e-4, "3e-4"), (1234, "1234"), (5000, "5000"), (12_000, "12k"), (3.5e6, "3.5M")],
        *[(-2e9, "-2G"), (4e12, "4T"), (-0.5, "-0.5")],
    ],
)
def test_short_numbers(number, text):
    assert short(number) == text


def test_labels_differ():
    assert labels([12345.0, 12346.0]) == ["12.345k", "12.346k"]
    assert labels([5000.0, 10000.0]) == ["5000", "10k"]
    assert labels([]) == []


def parts(chart: str) -> tuple[ElementTree.Element, list[dict]]:
    svg = re.search(r"<svg.*</svg>", chart, re.DOTALL)
    data = re.search(r'<script type="application/json">(.*?)</script>', chart, re.DOTALL)
    assert svg
    assert data
    return ElementTree.fromstring(svg[0]), json.loads(data[1])


def places(path: ElementTree.Element) -> list[list[float]]:
    return [list(map(float, pair)) for pair in re.findall(r"[ML]([\d.]+) ([\d.]+)", path.attrib["d"])]


def a_line(values: list[float], tokens_per_step: int = 100) -> Line:
    steps = np.arange(1, len(values) + 1) * 10
    return Line("<a>", 0, Curve(steps, np.array(values)), Curve(steps, steps * float(tokens_per_step)))


def drawn(svg: ElementTree.Element, kind: str = "") -> list[ElementTree.Element]:
    """The curves, of a kind of axes."""
    return [item for item in svg.iter("path") if "data-line" in item.attrib and kind in item.attrib["class"]]


def test_points_lie_where_the_ticks_say():
    svg, _ = parts(line_chart("A & B", [a_line([2.0, 8.0, 4.0])]))
    (path,) = drawn(svg, "y-linear")
    texts = [text for group in svg.iter("g") if "y-linear" in group.attrib["class"] for text in group.iter("text")]
    ticks = {text.text: float(text.attrib["y"]) - 4 for text in texts}
    spots = places(path)
    assert spots[1][1] == pytest.approx(ticks["8"], abs=0.11)
    assert spots[2][1] == pytest.approx(ticks["4"], abs=0.11)
    assert all(0 < x < WIDTH and 0 < y < HEIGHT for x, y in spots)
    (log,) = drawn(svg, "y-log")
    low, high, middle = (y for _, y in places(log))
    assert middle == pytest.approx((low + high) / 2, abs=0.11)  # 4 is the geometric mean of 2 and 8


def test_equal_pictures_over_steps_and_tokens_stand_once():
    svg, _ = parts(line_chart("A", [a_line([1.0, 2.0])]))
    assert [path.attrib["class"] for path in drawn(svg)] == [
        "line x-steps x-tokens y-linear",
        "line x-steps x-tokens y-log",
    ]
    svg, _ = parts(line_chart("A", [a_line([1.0, 2.0]), a_line([1.0, 2.0, 1.0], tokens_per_step=7)]))
    assert len(drawn(svg)) > 4


def dots(svg: ElementTree.Element) -> list[ElementTree.Element]:
    return [item for item in svg.iter("path") if item.attrib.get("class", "").startswith("dots ")]


def test_a_point_alone_is_a_dot_in_the_middle():
    svg, data = parts(line_chart("A", [a_line([2.5])]))
    (dot,) = dots(svg)
    ((x, y),) = places(dot)
    assert dot.attrib["d"] == f"M{x:g} {y:g}h0"
    assert 150 < x < WIDTH - 150
    assert 50 < y < HEIGHT - 50
    assert re.search(r"\.dots \{[^}]*stroke-width: 5; stroke-linecap: round", STYLE)
    assert data[0]["values"] == [2.5]


def test_few_points_are_dots_and_many_are_not():
    svg, _ = parts(line_chart("A", [a_line([1.0, math.nan, 2.0, 3.0])]))
    assert [places(dot) for dot in dots(svg)] == [places(path) for path in drawn(svg)]
    svg, _ = parts(line_chart("A", [a_line([float(value) for value in range(1, 40)])]))
    assert not dots(svg)


def test_a_gap_where_a_number_is_not_finite_and_values_on_hover():
    svg, data = parts(line_chart("A", [a_line([1.0, math.nan, 2.0, 3.0])]))
    path = drawn(svg)[0]
    assert path.attrib["d"].count("M") == 2
    assert data == [
        {"label": "<a>", "colour": 0, "steps": [10, 30, 40], "tokens": [1000, 3000, 4000], "values": [1.0, 2.0, 3.0]}
    ]
    assert len(places(path)) == 3


@pytest.mark.parametrize("values", [[0.0], [5.0, 5.0], [-1.0, 1.0], [1e-30, 2e-30], [1e300, -1e300], [0.0, 1e-12]])
def test_ranges_of_every_kind(values):
    svg, _ = parts(line_chart("A", [a_line(values)]))
    for path in svg.iter("path"):
        assert "nan" not in path.attrib["d"]
        assert "inf" not in path.attrib["d"]
    has_log = any("y-log" in item.attrib.get("class", "") for item in svg.iter())
    assert has_log == (min(values) > 0 and len(set(values)) > 1)
