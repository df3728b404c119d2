"""The figures: which are drawn, what is in them, and that they are the same for the same values."""

import builtins
import copy
import re
import sys
from xml.etree import ElementTree

import matplotlib
import pytest
from matplotlib.collections import LineCollection
from matplotlib.text import Text

from lbdt.evaluation.report import curves, distributions, plots, theme
from lbdt.evaluation.report.write import write
from tests.evaluation import sample_values as sample

ALL = ["sweep", "tradeoff", "concepts-ua", "concepts-ar", "ratio", "activations", "together"]


@pytest.fixture(scope="module")
def kinds():
    return {name: sample.values()["kinds"][name] for name in ("saeuron", "sdxl")}


@pytest.fixture(scope="module")
def drawn(kinds):
    return plots.figures({"kinds": kinds})


def lines(axes, label):
    return [tuple(map(list, line.get_data())) for line in axes.get_lines() if line.get_label() == label]


def extents(axes):
    """Of the texts alone, without the lines that lead to them."""
    axes.figure.draw_without_rendering()
    return [Text.get_window_extent(text) for text in axes.texts if text.get_text()]


def panels(figure):
    return figure.axes


def test_every_figure_is_drawn_the_same_twice_whatever_the_users_settings(kinds, drawn):
    assert list(drawn) == ALL
    with matplotlib.rc_context({"font.size": 30, "xtick.direction": "in", "svg.fonttype": "none"}):
        again = plots.figures({"kinds": kinds})
        assert matplotlib.rcParams["font.size"] == 30
    assert again == drawn


@pytest.mark.parametrize("name", ALL)
def test_a_figure_is_svg_with_the_themes_colours_and_no_date(drawn, name):
    text = drawn[name].decode()
    ElementTree.fromstring(text)
    assert set(re.findall(r"#[0-9a-f]{6}\b", text)) <= {light for light, _ in theme.COLOURS.values()}
    assert "metadata" not in text and "Matplotlib" not in text


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        pytest.param({}, [], id="nothing"),
        pytest.param({"sweep": None, "ratio": {}, "grid": []}, [], id="null-and-empty"),
        pytest.param({"sweep": [sample.row("steering", 1, 1, 1, 1, 1) | {"IRA": None}]}, ["sweep"], id="no-IRA"),
        pytest.param(
            {"per concept": {"steering": None, "per": {"a": {"UA": 0.0, "AR": None}}}},
            ["concepts-ua"],
            id="UA-of-zero",
        ),
        pytest.param(
            {"activations": [{"method": "base", "settings": {}, "norms": None}]},
            ["activations"],
            id="numbers-only",
        ),
    ],
)  # fmt: skip
def test_only_what_was_measured_is_drawn(kind, expected):
    values = {"kinds": {"k": kind, "other": {}}}
    assert plots.drawable(values) == expected
    assert list(plots.figures(values)) == expected


def test_the_sweep_runs_from_weak_to_strong_with_per_behind(kinds):
    kind = copy.deepcopy(kinds["saeuron"])
    kind["sweep"].reverse()
    axes = panels(curves.sweep({"saeuron": kind}))[0]
    assert [text.get_text().replace("\u2212", "-") for text in axes.get_xticklabels()] == [
        "-1", "-2", "-5", "-10", "-20", "PER"
    ]  # fmt: skip
    expected = [row["UA"]["mean"] for row in kinds["saeuron"]["sweep"]]
    assert lines(axes, "steering") == [([0, 1, 2, 3, 4], expected[:5])]
    assert lines(axes, "PER") == [([5], expected[5:])]
    assert lines(axes, "chosen strength") == [([2], [expected[2]])]


def test_error_bars_are_the_intervals_and_absent_with_one_seed(kinds):
    bars = [c for c in panels(curves.sweep(kinds))[0].collections if isinstance(c, LineCollection)]
    row = kinds["saeuron"]["sweep"][0]["UA"]
    assert [list(y) for y in bars[0].get_segments()[0]] == [
        [0, pytest.approx(row["low"])],
        [0, pytest.approx(row["high"])],
    ]
    one = {"k": {"sweep": [sample.row("steering", 1, 1, 1, 1, 1, half=None, strength=-1.0)]}}
    assert not panels(curves.sweep(one))[0].collections


def test_the_trade_off_labels_every_strength_without_overlap(kinds):
    figure = curves.tradeoff(kinds)
    for axes in panels(figure):
        texts = [text for text in axes.texts if text.get_text()]
        names = {t.get_text().replace("\u2212", "-") for t in texts}
        assert names == {"-1", "-2", "-5", "-10", "-20", "PER"}
        boxes = extents(axes)
        assert not any(a.overlaps(b) for n, a in enumerate(boxes) for b in boxes[:n])
        assert all(axes.bbox.x0 <= b.x0 and b.x1 <= axes.bbox.x1 for b in boxes)


def test_strengths_at_one_spot_do_not_pile_up():
    rows = [sample.row("steering", 100, 5, 5, 5, 1, strength=-float(s)) for s in range(1, 30)]
    rows[20]["chosen"] = True
    (axes,) = panels(curves.tradeoff({"k": {"sweep": rows}}))
    boxes = extents(axes)
    assert 1 <= len(boxes) < 29
    assert axes.texts[0].get_text() == "\u221221"
    assert not any(a.overlaps(b) for n, a in enumerate(boxes) for b in boxes[:n])


def test_the_ratio_is_in_per_cent_over_falling_timesteps(kinds):
    axes = panels(curves.ratio(kinds))[1]
    steps = kinds["sdxl"]["ratio"]["2"]
    ((times, shares),) = lines(axes, "padding 2")
    assert times == [step["timestep"] for step in steps]
    assert shares == pytest.approx([100 * step["replaced"] for step in steps])
    assert axes.get_xlim()[0] > axes.get_xlim()[1]


def test_together_counts_the_erased_concepts(kinds):
    figure = curves.together({"k": kinds["sdxl"]})
    assert [axes.get_ylabel() for axes in panels(figure)] == ["at once, %", "one after another, %"]
    rows = [r for r in kinds["sdxl"]["together"] if r["order"] == "at once" and r["method"] == "per"]
    assert lines(panels(figure)[0], "PER, RA") == [([1, 2, 4, 7, 10], [row["RA"]["mean"] for row in rows])]


def test_histograms_are_densities(kinds):
    figure = distributions.activations({"k": kinds["saeuron"]})
    patches = [patch for patch in panels(figure)[0].patches if hasattr(patch, "get_data")]
    names = [patch.get_label() for patch in patches]
    assert names == ["base", "steering, weakest", "steering, middle", "steering, strongest", "PER"]
    for patch in patches:
        heights, edges, _ = patch.get_data()
        assert sum(
            h * (b - a) for h, a, b in zip(heights, edges[:-1], edges[1:], strict=True)
        ) == pytest.approx(1)
    assert panels(figure)[1].get_xlabel() == "value of dimension 17"


@pytest.mark.parametrize(
    ("strengths", "expected"),
    [
        pytest.param([], [], id="none"),
        pytest.param([-5.0], [("steering", -5.0)], id="one"),
        pytest.param([-9.0, -1.0], [("steering, weakest", -1.0), ("steering, strongest", -9.0)], id="two"),
        pytest.param(
            [-1.0, -30.0, -5.0, -10.0, -20.0],
            [("steering, weakest", -1.0), ("steering, middle", -10.0), ("steering, strongest", -30.0)],
            id="five",
        ),
    ],
)
def test_which_strengths_have_room(strengths, expected):
    rows = [{"method": "steering", "settings": {"strength": s}} for s in strengths]
    found = distributions.shown(rows)
    assert [(label, row["settings"]["strength"]) for row, (_, _, label) in found] == expected


def test_the_bars_are_those_of_the_concepts(kinds):
    figure = distributions.concepts(kinds, "AR")
    axes = panels(figure)[1]
    per = next(bars for bars in axes.containers if bars.get_label() == "PER")
    expected = [figures["AR"] for figures in kinds["sdxl"]["per concept"]["per"].values()]
    assert [bar.get_width() for bar in per] == expected
    assert panels(figure)[0].get_yticklabels()[4].get_text() == "Cats"


def test_names_with_dollars_are_text():
    kind = {"per concept": {"per": {"$x_1$": {"UA": 50.0}, "_hidden": {"UA": 1.0}}}}
    figure = distributions.concepts({"a $ b": kind}, "UA")
    with theme.style():
        assert theme.svg(distributions.concepts({"a $\\frac$ b": kind}, "UA"))
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["$x_1$", "_hidden"]


def test_without_matplotlib_drawing_names_the_extra_and_the_report_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    small = {"kinds": {"k": {"ratio": sample.kind(0, 4, None)["ratio"]}}}
    with pytest.raises(ImportError, match=r"needs matplotlib: pip install lbdt\[plot\]"):
        plots.figures(small)
    files = write(small, tmp_path)
    assert sorted(files) == ["report", "table", "times", "values"]
    assert files["report"].read_text().count("not drawn: needs matplotlib, pip install lbdt[plot]") == 1


def test_a_broken_matplotlib_is_an_error(tmp_path, monkeypatch):
    real = builtins.__import__

    def broken(name, *rest):
        if name == "matplotlib":
            raise ModuleNotFoundError("No module named 'kiwisolver'", name="kiwisolver")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", broken)
    with pytest.raises(ImportError, match="kiwisolver"):
        write(sample.bare(), tmp_path)
