"""The learned prefix: projection, draws, straight-through gradient, descent."""

import pytest
import torch

from lbdt.attack import Prefix, project_simplex


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([0.25, 0.75], [0.25, 0.75]),
        ([0.5, 0.5, 0.5, 0.5], [0.25, 0.25, 0.25, 0.25]),
        ([3.0, 0.0, 0.0], [1.0, 0.0, 0.0]),
        ([-1.0, -1.0], [0.5, 0.5]),
        ([0.75, 0.75, -4.0], [0.5, 0.5, 0.0]),
        ([1.0, 0.5, 0.0], [0.75, 0.25, 0.0]),
        ([-7.0], [1.0]),
    ],
    ids=["on-it", "too-long", "a-corner", "negative", "an-edge", "an-edge-off-middle", "one-token"],
)
def test_projections_known_by_hand(row, expected):
    assert project_simplex(torch.tensor([row])).tolist() == [expected]


def test_the_projection_is_the_root_that_bisection_finds():
    x = torch.randn(20, 50, generator=generator(), dtype=torch.float64)
    for row, projected in zip(x, project_simplex(x), strict=True):
        low, high = float(row.min()) - 1, float(row.max())
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if float((row - middle).clamp(min=0).sum()) > 1 else (low, middle)
        assert projected.tolist() == pytest.approx((row - low).clamp(min=0).tolist())
        assert float(projected.sum()) == pytest.approx(1.0)


def test_draws_follow_the_distribution_and_only_the_generator():
    prefix, again = (Prefix(2, 4, generator(3)) for _ in range(2))
    for one in (prefix, again):
        one.weights.data = torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.5, 0.0, 0.5, 0.0]])
    drawn = [prefix.sample().argmax(1).tolist() for _ in range(400)]
    assert drawn == [again.sample().argmax(1).tolist() for _ in range(400)]
    assert {first for first, _ in drawn} == {1} and {second for _, second in drawn} == {0, 2}
    # 0.5 of 400 draws, 10 being one standard deviation.
    assert 160 < sum(second == 0 for _, second in drawn) < 240


def test_the_gradient_goes_straight_through_and_is_clipped():
    prefix = Prefix(1, 3, generator())
    one_hot = prefix.sample()
    assert sorted(one_hot[0].tolist()) == [0, 0, 1]
    (gradient,) = torch.autograd.grad((one_hot * torch.tensor([0.5, -7.0, 2.0])).sum(), prefix.weights)
    assert gradient.tolist() == [[0.5, -1.0, 1.0]]


def test_steps_find_the_cheapest_tokens():
    # Adam steps by the sign of a steady gradient, so that only one token a row may have a negative one.
    cheapest = [[4], [17], [29]]
    costs = torch.rand(3, 30, generator=generator(5)).scatter(1, torch.tensor(cheapest), -0.5)
    prefix = Prefix(3, 30, generator())
    first = float((prefix.weights.detach() * costs).sum())
    for _ in range(150):
        prefix.step((prefix.sample() * costs).sum())
        assert bool((prefix.weights >= 0).all())
    assert prefix.weights.sum(1).tolist() == pytest.approx([1.0] * 3)
    assert prefix.best().unsqueeze(1).tolist() == cheapest
    assert float((prefix.weights.detach() * costs).sum()) < 0 < first


def test_of_equal_tokens_the_first_is_the_best():
    assert Prefix(2, 1000, generator()).best().tolist() == [0, 0]


@pytest.mark.parametrize("sizes", [(0, 5), (5, 0)], ids=["no-tokens", "no-vocabulary"])
def test_bad_sizes(sizes):
    with pytest.raises(ValueError, match="expected an integer >= 1, got 0"):
        Prefix(*sizes, generator())
