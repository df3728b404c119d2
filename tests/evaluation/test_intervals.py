"""Means over seeds with their intervals, against scipy and a table of Student's t."""

import math

import pytest
from scipy import stats

from lbdt.evaluation.metrics.accuracy import estimate


@pytest.mark.parametrize(
    "values", [[90.0, 92.5, 95.0], [1.0, 2.0], [3.0, 1.0, 4.0, 1.0, 5.0], [0.0, 0.0, 100.0]], ids=len
)
def test_the_interval_is_scipys(values):
    got = estimate(values)
    low, high = stats.t.interval(
        0.95, len(values) - 1, loc=sum(values) / len(values), scale=stats.sem(values)
    )
    assert (got["low"], got["high"]) == pytest.approx((low, high))
    assert got["mean"] == pytest.approx(sum(values) / len(values)) and got["seeds"] == len(values)


def test_by_hand():
    # Student's t of 2 degrees of freedom, 97.5 %: 4.302653; standard deviation of 1, 2, 3: 1.
    got = estimate([1.0, 2.0, 3.0])
    assert got["high"] - got["mean"] == pytest.approx(4.302653 / math.sqrt(3))
    assert got["mean"] - got["low"] == pytest.approx(got["high"] - got["mean"])


def test_equal_seeds_have_no_width():
    assert estimate([50.0, 50.0, 50.0]) == {"mean": 50, "low": 50, "high": 50, "seeds": 3}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], None),
        ([None, None], None),
        ([7.0], {"mean": 7, "low": None, "high": None, "seeds": 1}),
        ([None, 7.0], {"mean": 7, "low": None, "high": None, "seeds": 1}),
        ([0.0], {"mean": 0, "low": None, "high": None, "seeds": 1}),
    ],
    ids=["no-seed", "nothing-measured", "one-seed", "one-measured", "zero-is-a-value"],
)
def test_few_seeds(values, expected):
    assert estimate(values) == expected


def test_a_seed_without_a_value_is_left_out():
    assert estimate([1.0, None, 3.0]) == estimate([1.0, 3.0])
