"""The steering that is chosen for each class: what it is chosen from, and what is made with it."""

import pytest

from lbdt.evaluation.report.cells import main_row, stronger_steering
from lbdt.evaluation.verdict_columns import figures
from tests import toy
from tests.evaluation import small
from tests.evaluation.test_evaluate import evaluated


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return toy.pipeline(tmp_path_factory.mktemp("toy"))


def test_each_class_is_steered_by_what_was_best_for_it_on_other_seeds(pipe, tmp_path):
    other = {"top_k": 2}

    def given(strength=-1.0, selection=None):
        made = small.steering(strength)
        made.selection = made.selection if selection is None else selection
        return made

    kinds = {"toy": small.kind(steering=given, strengths=(-1.0, -4.0), selections=(other,))}
    found, _, values = evaluated(pipe, tmp_path, kinds=kinds, seeds=(1,), concepts=("Cats", "Trees"))
    plan, chosen = found.plans["toy"], found.by_class("toy")
    tried = plan.sweep_by_class()
    assert [dict(series.settings) for series in tried] == [
        *({"strength": s} for s in (-1.0, -4.0)),
        *({"strength": s, "selection": other} for s in (-1.0, -4.0)),
    ]
    rows = [figures(found.world, plan.sweep_jobs, found.columns(s), None, True).concepts for s in tried]
    for name in ("Cats", "Trees"):
        means = [(row[name]["UA"] + row[name]["IRA"]) / 2 for row in rows]
        first = min(n for n, mean in enumerate(means) if mean == max(means))
        assert means[tried.index(next(s for s in tried if dict(s.settings) == chosen[name]))] == max(means)
        assert abs(chosen[name]["strength"]) <= abs(tried[first].settings["strength"])
    row = main_row(values, "by class")
    assert row["classes"] == chosen and row["pictures"] == main_row(values, "steering")["pictures"]
    (series,) = [s for s in plan.scored(None, chosen) if s.method == "by class"]
    made = series.editors()[0]
    assert made.strength == {name: each["strength"] for name, each in chosen.items()}
    for name, each in chosen.items():
        assert made.selection.get(name) == each.get("selection")
    with pytest.raises(ValueError, match="made otherwise"):
        worse = {name: {**each, "strength": -9.0} for name, each in chosen.items()}
        (series,) = [s for s in plan.scored(None, worse) if s.method == "by class"]
        found.files(series).prepare()


def test_with_one_strength_and_one_selection_there_is_nothing_to_choose_by_class(pipe, tmp_path):
    kinds = {"toy": small.kind(strengths=(-2.0,))}
    found, _, values = evaluated(pipe, tmp_path, kinds=kinds, seeds=(1,), concepts=("Cats",))
    assert found.by_class("toy") is None and main_row(values, "by class") is None


def test_a_selection_that_selects_nothing_is_refused_before_the_first_picture(pipe, tmp_path):
    def given(strength=-1.0, selection=None):
        made = small.steering(strength)
        made.selection = made.selection if selection is None else selection
        made.dictionary.mean[1] = 0.0  # Dogs
        return made

    kinds = {"toy": small.kind(steering=given, strengths=(-1.0, -4.0), selections=({"percentile": 99.0},))}
    with pytest.raises(ValueError, match=r"kind toy: selection .*Dogs"):
        evaluated(pipe, tmp_path / "out", kinds=kinds)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("one", "each", "expected"),
    [
        pytest.param(50.0, 60.0, "by class", id="the-better-one"),
        pytest.param(60.0, 50.0, "steering", id="the-other"),
        pytest.param(50.0, 50.0, "steering", id="a-tie"),
        pytest.param(None, 40.0, "by class", id="one-not-measured"),
        pytest.param(None, None, "steering", id="none-measured"),
    ],
)
def test_claims_are_made_against_the_stronger_steering(one, each, expected):
    rows = [
        {"method": method, "GA": None if mean is None else {"mean": mean}}
        for method, mean in (("steering", one), ("by class", each))
    ]
    assert stronger_steering({"rows": rows}, "GA")["method"] == expected
    assert stronger_steering({"rows": rows[:1]}, "GA")["method"] == "steering"
    assert stronger_steering({"rows": []}, "GA") is None
