"""Published figures: they agree with themselves but for the two misprints."""

from pathlib import Path

import pytest

import lbdt
from lbdt.evaluation import published
from lbdt.evaluation.metrics.accuracy import global_average

METHOD = (Path(lbdt.__file__).parent / "METHOD.md").read_text()


def named(row):
    return f"{row.pipeline}-{row.method}"


@pytest.mark.parametrize("row", published.ERASURE, ids=named)
def test_the_recomputed_global_average_is_the_printed_one(row):
    assert abs(global_average(row.UA, row.IRA, row.CRA, row.AR) - row.printed_global_average) <= 0.01


@pytest.mark.parametrize("row", published.ERASURE, ids=named)
def test_the_average_is_the_printed_one_but_where_that_is_a_misprint(row):
    printed = abs(row.average - row.printed_average) <= 0.01
    assert printed != ("average" in row.misprints)


def test_the_two_misprints_are_told_with_what_is_printed():
    found = {named(row): dict(row.misprints) for row in published.ERASURE if row.misprints}
    assert found == {"saemnesia-per": {"average": 93.45}, "sdxl-per": {"IRA": 35.41}}
    corrected = {named(row): (row.average, row.IRA) for row in published.ERASURE if row.misprints}
    assert corrected["saemnesia-per"][0] == pytest.approx(281.26 / 3)
    assert corrected["sdxl-per"] == (pytest.approx((94.31 + 53.41) / 2), 53.41)
    text = " ".join(published.NOTES)
    assert all(figure in text for figure in ("93.45", "93.75", "35.41", "53.41"))


@pytest.mark.parametrize(
    ("figures", "expected"),
    [
        pytest.param((100, 100, 100, 0), 100.0, id="nothing-wrong"),
        pytest.param((0, 0, 0, 100), 0.0, id="everything-wrong"),
        pytest.param((80, 60, 100, 20), 80.0, id="artifacts-count-from-the-other-end"),
        pytest.param((90, 60, None, 0), 250 / 3, id="without-styles-three-terms"),
    ],
)
def test_global_average(figures, expected):
    assert global_average(*figures) == pytest.approx(expected)


@pytest.mark.parametrize("row", published.ATTACK, ids=named)
def test_the_attack_takes_what_is_printed(row):
    assert row.drop == pytest.approx(row.printed_drop)


@pytest.mark.parametrize("row", published.METHODS, ids=lambda row: f"{row.method}-{row.task}")
def test_the_average_of_a_method_is_the_printed_one(row):
    if row.printed_average is None:
        assert row.task == "styles"
    else:
        assert abs(row.average - row.printed_average) <= 0.01


@pytest.mark.parametrize("row", published.ERASURE, ids=named)
def test_the_method_has_the_same_figures_of_erasure(row):
    cra = "-" if row.CRA is None else f"{row.CRA:.2f}"
    figures = [f"{row.UA:.2f}", f"{row.IRA:.2f}", cra, f"{row.AR:.1f}", f"{row.printed_global_average:.2f}"]
    assert f"| {' | '.join([row.pipeline, row.method, *figures])} |" in METHOD


@pytest.mark.parametrize("row", published.ATTACK, ids=named)
def test_the_method_has_the_same_figures_of_the_attack(row):
    figures = [f"{figure:.1f}" for figure in (row.before, row.after, row.printed_drop)]
    assert f"| {' | '.join([row.pipeline, row.method, *figures])} |" in METHOD
