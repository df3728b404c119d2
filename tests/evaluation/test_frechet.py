"""The Frechet distance against its formula with scipy's matrix root, and where it is known."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from lbdt.evaluation.metrics.feature_distances import frechet_distance


def draw(count, width=6, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return scale * torch.randn(count, width, generator=generator, dtype=torch.float64) @ mixing


def by_formula(a, b):
    a, b = a.double().numpy(), b.double().numpy()
    ca, cb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca + cb - 2 * sqrtm(ca @ cb).real)


@pytest.mark.parametrize(("first", "second"), [(200, 200), (60, 300), (9, 8)], ids=["equal", "other", "few"])
def test_the_formula(first, second):
    a, b = draw(first, seed=1), draw(second, seed=2) + 0.5
    expected = by_formula(a, b)
    assert expected > 1
    assert frechet_distance(a, b) == pytest.approx(expected)
    assert frechet_distance(b, a) == pytest.approx(expected)


def test_float32_features_are_computed_in_float64():
    a, b = draw(100, seed=1).float() + 100, draw(100, seed=2).float() + 100
    assert frechet_distance(a, b) == pytest.approx(by_formula(a, b))


def test_equal_sets_are_at_no_distance():
    a = draw(100)
    assert 0 <= frechet_distance(a, a.flip(0)) < 1e-9


def test_a_shift_alone_costs_its_square():
    a = draw(100)
    shift = torch.tensor([3.0, 0, -4.0, 0, 0, 12.0], dtype=torch.float64)
    assert frechet_distance(a + shift, a) == pytest.approx(169)


def test_a_scale_alone_costs_the_square_of_the_change_in_deviation():
    # Around its own mean: C2 = 4 C1, so the trace is that of C1 + 4 C1 - 2 * 2 C1 = C1.
    a = draw(100)
    a = a - a.mean(0)
    assert frechet_distance(2 * a, a) == pytest.approx(np.trace(np.cov(a.numpy(), rowvar=False)))


@pytest.mark.parametrize(
    ("features", "reference", "message"),
    [
        (torch.zeros(1, 3), torch.zeros(5, 3), r"features: expected finite \[n >= 2, F\], got \[1, 3\]"),
        (torch.zeros(5, 3), torch.zeros(5), "reference: expected"),
        (torch.zeros(5, 3), torch.full((5, 3), torch.nan), "reference: expected finite"),
        (torch.zeros(5, 3), torch.zeros(5, 4), "expected 4 wide as the reference, got 3"),
    ],
    ids=["one-picture", "one-dimension", "nan", "widths"],
)
def test_other_features_are_refused(features, reference, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(features, reference)
