"""Activation statistics: scores known by construction, and against scipy and numpy."""

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lbdt.evaluation.metrics.activation_shift import (
    REACH,
    SMALLEST_NORM,
    WatchedRows,
    compare_settings,
    edges_of,
    fit,
    histogram,
    log_norms,
)

WHOLE = st.integers(-50, 50).map(float)


def gaussian(rows: int, width: int = 19, seed: int = 0) -> torch.Tensor:
    """19 dimensions: more than a block of them, and no multiple of it."""
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def matrix(rows: tuple[int, int], width: int = 2):
    return st.integers(*rows).flatmap(lambda n: arrays(np.float64, (n, width), elements=WHOLE))


def test_the_base_is_at_no_distance_from_itself_and_two_in_a_thousand_values_are_outside():
    base = torch.arange(1001.0).unsqueeze(1).expand(-1, 20) + torch.arange(20.0)
    got = fit(base).compare(base)
    # The percentiles are the second row and the last but one: one of 1001 lies beyond each.
    assert got.outside_by_dimension.tolist() == pytest.approx([100 * 2 / 1001] * 20)
    assert (got.wasserstein, got.norm_wasserstein, got.patches, got.broken) == (0.0, 0.0, 1001, 0)


def test_a_known_share_is_outside():
    base = torch.arange(1001.0).unsqueeze(1).expand(-1, 2)  # inside: [1, 1000]
    x = torch.tensor([[0.0, 5.0], [1.0, 999.0], [999.0, 1000.0], [2000.0, 500.0]])
    got = fit(base).compare(x)
    assert got.outside_by_dimension.tolist() == [50.0, 25.0]
    assert got.outside == 37.5


def test_a_shift_of_every_value_is_the_distance_in_standard_deviations():
    base = gaussian(400).double()
    deviation = base.numpy().std(axis=0)
    got = fit(base).compare(base + 3)
    assert got.wasserstein_by_dimension.tolist() == pytest.approx((3 / deviation).tolist())
    assert got.wasserstein == pytest.approx((3 / deviation).mean())
    by_deviations = fit(base).compare(base - 2 * torch.from_numpy(deviation))
    assert by_deviations.wasserstein == pytest.approx(2.0)


def test_doubling_every_vector_moves_log2_norms_by_one():
    base = gaussian(100)
    assert fit(base).compare(2 * base).norm_wasserstein == pytest.approx(1.0)
    assert fit(base).compare(-base).norm_wasserstein == 0.0


@pytest.mark.parametrize(("n", "m"), [(200, 200), (200, 77), (3, 200), (2, 1)])
def test_figures_agree_with_scipy_and_numpy(n, m):
    base, x = gaussian(n), 1.7 * gaussian(m, seed=1) + 0.4
    got = fit(base).compare(x)
    b, y = base.double().numpy(), x.double().numpy()
    low, high = np.percentile(b, 0.1, axis=0), np.percentile(b, 99.9, axis=0)
    distances = [scipy.stats.wasserstein_distance(b[:, j], y[:, j]) / b[:, j].std() for j in range(19)]
    norms = [np.log2(np.linalg.norm(rows, axis=1)) for rows in (b, y)]
    assert got.outside_by_dimension.tolist() == pytest.approx(
        (100 * ((y < low) | (y > high)).mean(axis=0)).tolist()
    )
    assert got.wasserstein_by_dimension.tolist() == pytest.approx(distances)
    assert got.wasserstein == pytest.approx(np.mean(distances))
    assert got.norm_wasserstein == pytest.approx(scipy.stats.wasserstein_distance(*norms))


@given(matrix((1, 9)), matrix((1, 9)), WHOLE, st.sampled_from([0.25, 2.0, 8.0]))
def test_the_unit_follows_the_base(base, x, shift, scale):
    base = torch.from_numpy(np.concatenate([base, [[0.0, 0.0], [1.0, 2.0]]]))
    x = torch.from_numpy(x)
    once = fit(base).compare(x)
    moved = fit(base * scale + shift).compare(x * scale + shift)
    assert moved.wasserstein == pytest.approx(once.wasserstein)
    same = fit(base * scale).compare(x * scale)
    assert same.outside_by_dimension.tolist() == once.outside_by_dimension.tolist()


@given(matrix((2, 9), width=3), st.randoms(use_true_random=False))
def test_neither_the_order_of_rows_nor_their_repetition_matters(x, random):
    base, x = gaussian(50, 3), torch.from_numpy(x)
    order = list(range(len(x)))
    random.shuffle(order)
    once, shuffled = fit(base).compare(x), fit(base[torch.randperm(50)]).compare(x[order])
    assert shuffled.to_dict() == once.to_dict()
    assert torch.equal(shuffled.wasserstein_by_dimension, once.wasserstein_by_dimension)
    twice = fit(base).compare(x.repeat(2, 1))
    assert twice.wasserstein == pytest.approx(once.wasserstein)
    assert twice.outside == pytest.approx(once.outside)


def test_the_number_of_threads_does_not_matter():
    base, x = gaussian(9000), 2 * gaussian(5000, seed=1)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(compare_settings(base, [WatchedRows("steering", {}, x)]))
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1]


def test_a_dimension_in_which_the_base_is_constant_has_no_unit():
    base = torch.stack([torch.full((10,), 4.0), torch.arange(10.0)], dim=1)
    got = fit(base).compare(base + 1)
    assert got.wasserstein_by_dimension.isnan().tolist() == [True, False]
    assert got.wasserstein == pytest.approx(1 / np.arange(10.0).std())
    assert got.outside_by_dimension.tolist() == [100.0, 20.0]  # 9 and 10 lie beyond 8.991


def test_zero_vectors_count_as_the_smallest_norm():
    assert log_norms(torch.tensor([[0.0, 0.0], [3.0, 4.0]])).tolist() == pytest.approx([-24.0, np.log2(5)])
    assert SMALLEST_NORM == 2.0**-24
    base = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert fit(base).compare(torch.zeros(3, 2)).norm_wasserstein == pytest.approx(24.0)


def test_broken_values_are_outside_and_their_rows_have_no_distance():
    base = torch.arange(1001.0).unsqueeze(1).expand(-1, 2)
    x = torch.tensor([[500.0, float("nan")], [float("inf"), 500.0], [500.0, 500.0], [500.0, 500.0]])
    got, without = fit(base).compare(x), fit(base).compare(x[2:])
    assert (got.patches, got.broken, got.outside_by_dimension.tolist()) == (4, 2, [25.0, 25.0])
    assert (got.wasserstein, got.norm_wasserstein) == (without.wasserstein, without.norm_wasserstein)
    nothing = fit(base).compare(torch.full((2, 2), float("nan")))
    assert nothing.to_dict() == {
        "patches": 2,
        "outside": 100.0,
        "wasserstein": None,
        "norm wasserstein": None,
    }


@pytest.mark.parametrize(
    ("base", "error", "text"),
    [
        (torch.zeros(4), ValueError, r"base: expected \[rows, d\]"),
        (torch.zeros(0, 3), ValueError, r"one row or more, got \[0, 3\]"),
        (torch.zeros(4, 0), ValueError, r"got \[4, 0\]"),
        (torch.ones(1, 3), ValueError, "two rows or more, got 1"),
        (torch.ones(5, 3), ValueError, "all 5 rows are equal"),
        (torch.tensor([[1.0], [float("nan")], [float("inf")]]), ValueError, "2 of 3 rows hold NaN"),
        (torch.ones(5, 3, dtype=torch.int64), TypeError, "floating point tensor.*torch.int64"),
        ([[1.0], [2.0]], TypeError, "got list"),
    ],
    ids=["flat", "no rows", "no dimension", "one row", "constant", "not finite", "integers", "list"],
)
def test_a_base_that_measures_nothing_is_refused(base, error, text):
    with pytest.raises(error, match=text):
        fit(base)


@pytest.mark.parametrize(
    "x", [torch.zeros(4, 18), torch.zeros(0, 19), torch.zeros(19)], ids=["width", "empty", "flat"]
)
def test_rows_of_another_shape_are_refused(x):
    with pytest.raises(ValueError, match=r"x: expected \[rows, 19\]"):
        fit(gaussian(10)).compare(x)


def test_half_precision_rows_are_taken():
    base = gaussian(30).half()
    assert fit(base).compare(base.bfloat16().half()).wasserstein < 0.01


def shares(entry: dict, name: str) -> np.ndarray:
    return np.array(entry[name]["share"])


def test_settings_share_their_bins_and_the_dimension_that_steering_moves_most():
    base = gaussian(500)
    steered, replaced = base.clone(), base.clone()
    steered[:, 11] += 1.5
    replaced[:, 3] += 40  # further, but not by steering
    found = compare_settings(
        base,
        [WatchedRows("per", {"padding": 1}, replaced), WatchedRows("steering", {"strength": -5.0}, steered)],
    )
    assert [(e["method"], e["settings"]) for e in found] == [
        ("base", {}),
        ("per", {"padding": 1}),
        ("steering", {"strength": -5.0}),
    ]
    for entry in found:
        assert list(entry) == [
            *(
                "method",
                "settings",
                "patches",
                "outside",
                "wasserstein",
                "norm wasserstein",
                "norms",
                "dimension",
            )
        ]
        assert entry["norms"]["edges"] == found[0]["norms"]["edges"] and len(entry["norms"]["edges"]) == 61
        assert entry["dimension"]["edges"] == found[0]["dimension"]["edges"]
        assert entry["dimension"]["index"] == 11
        assert shares(entry, "norms").sum() == shares(entry, "dimension").sum() == pytest.approx(1.0)
    assert shares(found[0], "dimension").tolist() == shares(found[1], "dimension").tolist()
    centres = np.convolve(found[0]["dimension"]["edges"], [0.5, 0.5], "valid")
    moved = (shares(found[2], "dimension") - shares(found[0], "dimension")) @ centres
    assert moved == pytest.approx(1.5, rel=0.05)
    assert compare_settings(base, [])[0]["wasserstein"] == 0.0


def test_a_setting_whose_rows_are_all_broken_is_still_listed():
    base = gaussian(20)
    found = compare_settings(base, [WatchedRows("steering", {}, torch.full_like(base, float("inf")))])
    assert (found[1]["outside"], found[1]["wasserstein"], sum(found[1]["norms"]["share"])) == (
        100.0,
        None,
        0.0,
    )


def test_bins_cover_every_setting_up_to_a_reach():
    base, near, far = torch.arange(1001.0), torch.arange(1001.0) + 500, torch.tensor([-1e9, 1e9])
    assert edges_of(base, [near], 2, (0.1, 99.9)).tolist() == [1.0, 750.0, 1499.0]
    reach = REACH * 998
    assert edges_of(base, [near, far], 1, (0.1, 99.9)).tolist() == [1 - reach, 999 + reach]
    flat = edges_of(torch.full((5,), 7.0), [], 4, (0.1, 99.9))
    assert (flat.diff() > 0).all() and flat[0] < 7 < flat[-1]
    with pytest.raises(ValueError, match="bins: expected an integer >= 1, got 0"):
        edges_of(base, [], 0, (0.1, 99.9))


def test_a_histogram_is_numpys_with_what_lies_beyond_in_the_outer_bins():
    sample, edges = gaussian(300, 1, seed=3).flatten(), torch.linspace(-1, 1, 9, dtype=torch.float64)
    counts, _ = np.histogram(np.clip(sample.double().numpy(), -1, np.nextafter(1, 0)), edges.numpy())
    assert histogram(sample, edges)["share"] == pytest.approx((counts / 300).tolist())
    assert histogram(torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0.0, 1.0, 2.0]).double())[
        "share"
    ] == pytest.approx([1 / 3, 2 / 3])
