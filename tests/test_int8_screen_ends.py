"""The int8 screen where numbers end: what overflows or vanishes has room in the bounds, or no bound."""

import pytest
import torch

from tests.backends import HAS_CPP
from tests.test_int8_screen import masks, normal

pytestmark = pytest.mark.skipif(not HAS_CPP, reason="no C++ compiler")


def small(x, weight, bias, watched, threshold, k):
    """Arguments for one image of patches [d, N]."""
    count = len(watched)
    return {
        "x": x.unsqueeze(0),
        "weight": weight,
        "bias": bias,
        "latents": torch.tensor(watched),
        "thresholds": torch.full((1, count), threshold),
        "timestep_bin": torch.zeros(1, dtype=torch.int64),
        "enabled": torch.ones(1, count, dtype=torch.bool),
        "k": k,
    }


def one_and_others(other, first, d=1):
    """A dictionary [200, d] whose rows are `other`, but for the first, of zeros, and a bias of `first` there."""
    weight, bias = torch.zeros(200, d), torch.zeros(200)
    weight[1:] = torch.tensor(other)
    bias[0] = first
    return weight, bias


UNIT = 2.0**-149  # the least float32
ENDS = [
    pytest.param(
        small(torch.zeros(1, 1), *one_and_others(1e20, 1.0), [0], -9.0, 1), 1e19, id="start-overflows"
    ),
    pytest.param(small(torch.ones(1, 1), *one_and_others(1e20, 1.0), [0], -9.0, 1), -1e19, id="and-below"),
    pytest.param(
        small(torch.full((2, 1), 1e19), *one_and_others([1e20, -1e20], 1e36, 2), [0], -9.0, 1),
        1e19,
        id="sums-overflow",
    ),
    pytest.param(
        small(torch.full((2, 1), 1e19), *one_and_others(UNIT, 2.4e-26, 2), [0], -9.0, 1),
        0.0,
        id="lengths-vanish",
    ),
    pytest.param(
        small(torch.full((64, 1), 1e-15), *one_and_others(1e-30, 55 * UNIT, 64), [0], -9.0, 1),
        0.0,
        id="products-vanish",
    ),
    pytest.param(
        small(torch.full((64, 1), 1e-15), *one_and_others(1e-30, 0.0, 64), list(range(1, 65)), 55 * UNIT, 0),
        0.0,
        id="products-vanish-before-a-threshold",
    ),
    pytest.param(
        small(
            torch.full((1, 1), 6.2e18),
            torch.full((64, 1), 1e20),
            torch.full((64,), -3e38),
            list(range(64)),
            3e38,
            0,
        ),
        0.0,
        id="a-threshold-at-the-end",
    ),
]


@pytest.mark.parametrize(("given", "centre"), ENDS)
def test_bounds_hold_or_are_none_at_the_ends_of_the_numbers(given, centre):
    plain, screened = masks(given, torch.full((given["x"].shape[1],), centre))
    assert torch.equal(plain, screened)


@pytest.mark.parametrize(("scale", "rows"), [(1e-24, 1e6), (1e-24, 1e3), (1e-30, 1e12)])
def test_ties_between_equal_rows_on_patches_near_zero(scale, rows):
    weight = normal(400, 128, scale=rows)
    weight[200:] = weight[0]
    given = small(normal(128, 200, seed=1, scale=scale), weight, torch.zeros(400), [0], -9.0, 50)
    plain, screened = masks(given)
    assert torch.equal(plain, screened)


def test_magnitudes_of_any_kind():
    g = torch.Generator().manual_seed(5)

    def spread(*shape):
        return torch.randn(shape, generator=g) * 10.0 ** (torch.rand(shape, generator=g) * 60 - 30)

    for _ in range(300):
        d, latents, patches = (int(torch.randint(1, most, (1,), generator=g)) for most in (6, 80, 20))
        watched = torch.randperm(latents, generator=g)[
            : int(torch.randint(1, 50, (1,), generator=g))
        ].tolist()
        k = int(torch.randint(0, min(latents, 4) + 1, (1,), generator=g))
        given = small(spread(d, patches), spread(latents, d), spread(latents), watched, -9.0, k)
        plain, screened = masks(given, spread(d))
        assert torch.equal(plain, screened)
