"""Charts as SVG: drawn, readable by a screen reader, and safe whatever the names."""

import re
import xml.etree.ElementTree as ET

import pytest

from lbdt.app import charts


def drawn(series, **settings):
    return ET.fromstring(charts.lines("Title", "x", "y", series, **settings))


def polylines(svg):
    return [
        [tuple(map(float, point.split(","))) for point in line.get("points").split()]
        for line in svg.iter("polyline")
    ]


def test_a_line_goes_from_large_to_small_timesteps():
    (line,) = polylines(drawn({"a": [(999, 0), (500, 5), (1, 10)]}))
    xs, ys = zip(*line, strict=True)
    assert list(xs) == sorted(xs) and list(ys) == sorted(ys, reverse=True)
    (line,) = polylines(drawn({"a": [(1, 0), (2, 5)]}, falling=False))
    assert line[0][0] < line[1][0]


@pytest.mark.parametrize(
    "series",
    [{}, {"a": []}, {"a": [(1, float("nan"))]}, {"a": [(float("inf"), 1)]}],
    ids=["no-series", "no-points", "nan", "infinite"],
)
def test_nothing_to_draw(series):
    svg = drawn(series)
    assert polylines(svg) == [] and "Nothing to show yet" in svg.get("aria-label")


@pytest.mark.parametrize(
    "points", [[(5, 3)], [(1, 0), (2, 0)], [(1, -2), (2, 4)], [(1, 1e-9), (2, 1e9)]], ids=str
)
def test_every_point_lies_in_the_picture(points):
    svg = drawn({"a": points})
    _, _, width, height = map(float, svg.get("viewBox").split())
    assert all(0 <= x <= width and 0 <= y <= height for line in polylines(svg) for x, y in line)


def test_it_is_told_in_words_and_names_are_escaped():
    name = '<script>"&'
    text = charts.lines("T", "x", "y", {name: [(2, 1), (1, 4)]})
    assert "<script>" not in text
    assert ET.fromstring(text).get("aria-label") == f"T. {name}: from 1 to 4, at most 4"


def test_more_lines_than_colours_are_said():
    svg = drawn({str(n): [(1, n), (2, n)] for n in range(11)})
    assert len(polylines(svg)) == 8 and "3 more are not drawn" in svg.get("aria-label")


@pytest.mark.parametrize(
    ("value", "end"), [(6, "6"), (7, "8"), (0.013, "0.02"), (100, "100"), (0, "1")], ids=str
)
def test_the_axis_ends_at_a_number_that_reads_well(value, end):
    text = charts.lines("T", "x", "y", {"a": [(1, 0), (2, value)]})
    assert f">{end}</text>" in re.sub(r"\s+", " ", text)
