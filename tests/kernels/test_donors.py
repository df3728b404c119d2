"""replace_patches on every backend: which patch is the donor, with patches to avoid, against the loop and by hand."""

import pytest
import torch

from lbdt import ops
from tests import backends
from tests.backends import DEVICE
from tests.layouts import bits
from tests.ops.test_replace_patches import SOURCES, check, inputs

every_backend = backends.every_backend("cpp")

ROWS = [
    pytest.param({"avoid": 0.3}, id="some"),
    pytest.param({"avoid": 0.5, "padding": 1, "rate": 0.05, "H": 13, "W": 3}, id="beside-padding"),
    pytest.param({"avoid": 0.0}, id="none"),
    pytest.param({"avoid": 2.0}, id="all-is-avoid-none"),
    pytest.param({"avoid": 2.0, "rate": 0.0}, id="all-empty-mask"),
    pytest.param({"avoid": 0.5, "rate": 2.0}, id="full-mask-unchanged"),
    pytest.param({"avoid": 0.5, "rate": 2.0, "bank": 3}, id="full-mask-bank"),
    pytest.param({"avoid": 0.9, "rate": 0.7, "B": 7, "bank": 2}, id="all-in-some-images"),
    pytest.param({"avoid": 0.4, "H": 11, "W": 33, "rate": 0.02, "padding": 1}, id="across-words"),
    pytest.param({"avoid": 0.95, "B": 1, "d": 2, "H": 19, "W": 32, "rate": 0.3}, id="nearly-all"),
    pytest.param({"avoid": 2, "H": 1, "W": 1, "rate": 2}, id="one-patch"),
    pytest.param({"avoid": 0.5, "B": 0}, id="no-image"),
]


@every_backend
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("sizes", ROWS)
def test_equals_the_patch_by_patch_version(sizes, source, backend, poisoned):
    check(inputs(**sizes, source=source), backend)


def test_the_rows_stress_what_they_say():
    left = [inputs(avoid=0.9, rate=0.7, B=7, bank=2)[name] for name in ("mask", "avoid")]
    left = (~(left[0] | left[1])).sum(1)
    assert (left == 0).any() and (left > 0).any()
    near = inputs(avoid=0.95, B=1, d=2, H=19, W=32, rate=0.3)
    near = int((~(near["mask"] | near["avoid"])).sum())
    assert 5 < near and 19 + near <= 19 * 32 / 8


MAP = [  # x: masked, ~: to be avoided
    pytest.param(["..x..", "....."], "nearest", 2, 1, id="nearest-tie-to-the-left"),
    pytest.param(["..x..", "....."], "row", 2, 1, id="row-tie-to-the-left"),
    pytest.param([".~x..", "....."], "row", 2, 3, id="row-avoid-the-left"),
    pytest.param([".~x~.", "....."], "row", 2, 0, id="row-tie-behind-the-avoided"),
    pytest.param([".~x~.", "....."], "nearest", 2, 7, id="nearest-below-the-avoided"),
    pytest.param([".xxxx", "....."], "row", 4, 0, id="row-far-before-another-row"),
    pytest.param(["xxxxx", "..~.."], "row", 2, 6, id="row-without-free-patch"),
    pytest.param([".~~~~", "xxxxx", ".~~~~"], "row", 5, 0, id="row-without-free-patch-tie-to-above"),
    pytest.param(["~~x~~", "....."], "row", 2, 7, id="row-all-avoided"),
    pytest.param(["~~x~~", "~~~~~"], "row", 2, 1, id="row-everything-avoided"),
    pytest.param(["~~x~~", "~~~~~"], "random", 2, 0, id="random-everything-avoided"),
    pytest.param(["~~x~.", "~~~~~"], "random", 2, 4, id="random-one-left"),
    pytest.param(["~~x~.", "~~~~~"], "mean", 2, 4, id="mean-one-left"),
]


@every_backend
@pytest.mark.parametrize(("picture", "source", "patch", "donor"), MAP)
def test_the_donor_is_the_one_that_can_be_counted_off(picture, source, patch, donor, backend):
    cells = "".join(picture)
    arguments = inputs(B=1, d=2, H=len(picture), W=len(picture[0]), source=source)
    x = arguments["x"]
    arguments["u"].zero_()
    arguments["mask"] = torch.tensor([[cell == "x" for cell in cells]], device=DEVICE)
    arguments["avoid"] = torch.tensor([[cell == "~" for cell in cells]], device=DEVICE)
    out, replaced = ops.replace_patches(**arguments, backend=backend)
    assert torch.equal(replaced, arguments["mask"])
    assert torch.equal(out.flatten(2)[0, :, patch], x.flatten(2)[0, :, donor])


@every_backend
@pytest.mark.parametrize("source", SOURCES)
def test_no_patch_to_avoid_is_a_donor_while_there_are_others(source, backend):
    """They are NaN in the input, so one that is read would show; they are not replaced either."""
    arguments = inputs(seed=7, B=3, H=9, W=8, rate=0.1, padding=1, source=source, avoid=0.3)
    x = arguments["x"]
    x.masked_fill_(arguments["avoid"].view(3, 1, 9, 8), float("nan"))
    out, replaced = ops.replace_patches(**arguments, backend=backend)
    assert replaced.any(1).all()
    assert out.flatten(2).isfinite().all(1)[replaced].all()
    assert torch.equal(
        bits(out.flatten(2)).movedim(1, 2)[~replaced], bits(x.flatten(2)).movedim(1, 2)[~replaced]
    )


@every_backend
@pytest.mark.parametrize("source", SOURCES)
def test_one_donor_serves_every_other_patch(source, backend):
    arguments = inputs(B=1, source=source)
    arguments["mask"] = torch.ones_like(arguments["mask"])
    arguments["mask"][0, 11] = False
    out, replaced = check(arguments, backend)
    assert replaced.sum() == 34
    donor = arguments["x"].flatten(2)[:, :, 11:12].expand(-1, -1, 35)
    assert torch.equal(out.flatten(2), donor)


@every_backend
def test_u_of_zero_takes_the_first_donor_and_the_largest_u_the_last(backend):
    arguments = inputs(B=2, rate=0.5, seed=3)
    arguments["u"][0] = 0.0
    arguments["u"][1] = 1 - 2.0**-24
    out, replaced = check(arguments, backend)
    for image, position in ((0, 0), (1, -1)):
        free = (~arguments["mask"][image]).nonzero().flatten()
        donor = arguments["x"].flatten(2)[image, :, free[position], None]
        assert (out.flatten(2)[image][:, replaced[image]] == donor).all() and replaced[image].any()
