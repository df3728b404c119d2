"""The gradient that an attack goes by: through `replace_patches`, and through attached hooks to the prompt."""

import pytest
import torch

from lbdt import ops
from lbdt.editors import Steering
from lbdt.testing import DTYPES
from tests import backends, toy
from tests.repeats import MISALIGNED, repeats

SOURCES = ("random", "nearest", "mean", "row")
every_backend = backends.every_backend("cpp")


def arguments(source="random", bank=False, rate=0.3, shape=(2, 3, 3, 4), avoid=None):
    g = torch.Generator().manual_seed(0)
    patches = shape[2] * shape[3]
    given = {
        "x": torch.randn(shape, generator=g, dtype=torch.float64),
        "mask": torch.rand(shape[0], patches, generator=g) < rate,
        "u": torch.rand(shape[0], patches, generator=g),
        "height": shape[2],
        "width": shape[3],
        "padding": 0,
        "source": source,
        "bank": torch.randn(shape[0], 2, shape[1], generator=g, dtype=torch.float64) if bank else None,
    }
    return given if avoid is None else given | {"avoid": torch.rand(shape[0], patches, generator=g) < avoid}


ROWS = [
    pytest.param({"rate": 0.3}, id="some"),
    pytest.param({"rate": 0.0}, id="nothing-replaced"),
    pytest.param({"rate": 2.0}, id="full-mask-unchanged"),
    pytest.param({"rate": 2.0, "bank": True}, id="full-mask-bank"),
    pytest.param({"rate": 0.9, "bank": True}, id="few-donors"),
    pytest.param({"shape": (0, 3, 3, 4)}, id="no-image"),
    pytest.param({"avoid": 0.4}, id="avoid-some"),
    pytest.param({"avoid": 2.0, "rate": 0.6, "bank": True}, id="avoid-all"),
]


@every_backend
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("change", ROWS)
def test_the_gradient_is_the_finite_differences(change, source, backend):
    given = arguments(source, **change)
    leaves = [given[name].requires_grad_() for name in ("x", "bank") if given[name] is not None]
    assert torch.autograd.gradcheck(
        lambda *_: ops.replace_patches(**given, backend=backend)[0],
        leaves,
        nondet_tol=1e-12 if MISALIGNED else 0,
        check_batched_grad=False,
    )


@every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_has_the_gradient_of_float64(dtype, backend):
    found = []
    for kind in (dtype, torch.float64):
        given = arguments(bank=True, rate=0.1, shape=(2, 3, 5, 6))
        given["mask"][1] = True
        leaves = [given[name].to(kind).requires_grad_() for name in ("x", "bank")]
        out, replaced = ops.replace_patches(
            **{**given, "padding": 1, "x": leaves[0], "bank": leaves[1]}, backend=backend
        )
        assert out.requires_grad and not replaced.requires_grad
        # Small integers, so every sum is exact in every dtype.
        weights = (torch.arange(out.numel()) % 5).view_as(out).to(kind)
        found.append(torch.autograd.grad((out * weights).sum(), leaves))
    for got, wanted in zip(*found, strict=True):
        assert got.dtype == dtype and torch.equal(got.double(), wanted) and got.abs().sum() > 0


def test_a_replaced_patch_hands_its_gradient_to_its_donor():
    x = torch.randn(1, 2, 2, 2, requires_grad=True)
    mask = torch.tensor([[True, False, False, False]])
    out, replaced = ops.replace_patches(x, mask, torch.full((1, 4), 0.9), 2, 2)
    assert replaced.tolist() == mask.tolist()
    out.sum().backward()
    # u = 0.9 of three free patches: the last one.
    assert x.grad.flatten(2)[0].tolist() == [[0, 1, 1, 2]] * 2


def test_a_gradient_in_a_full_graph():
    given = arguments(rate=0.5)
    x = given["x"].requires_grad_()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(x):
        return ops.replace_patches(**{**given, "x": x})[0].square().sum()

    (got,) = torch.autograd.grad(loss(x), x)
    (wanted,) = torch.autograd.grad(ops.replace_patches(**given)[0].square().sum(), x)
    assert repeats(got, wanted)


ATTACHED = [
    pytest.param(lambda: toy.eraser(), id="random"),
    pytest.param(lambda: toy.eraser(source="mean", padding=0), id="mean"),
    pytest.param(lambda: toy.eraser(target="update", source="nearest"), id="update"),
    pytest.param(lambda: toy.eraser(padding=9, bank=True), id="bank"),
    pytest.param(lambda: toy.eraser(detect_at=toy.DETECT_AT, k=8), id="detect-at"),
    pytest.param(lambda: Steering.from_eraser(toy.eraser(k=8), strength=-2.0), id="saeuron"),
    pytest.param(lambda: Steering.from_eraser(toy.eraser(k=8), rule="gsae", strength=-0.3), id="gsae"),
    pytest.param(lambda: Steering.from_eraser(toy.eraser(), rule="sdxl", strength=-1.0), id="sdxl"),
]


@pytest.mark.parametrize("make", ATTACHED)
def test_the_gradient_goes_through_an_attached_unet(make, tmp_path):
    pipe, eraser = toy.pipeline(tmp_path), make()
    pipe.unet.double()
    g = torch.Generator().manual_seed(2)
    latent, embedding, direction, weights = (
        torch.randn(shape, generator=g, dtype=torch.float64)
        for shape in ((1, 4, 8, 8), (1, 16, 16), (1, 16, 16), (1, 4, 8, 8))
    )

    def value(length):
        given = embedding + length * direction
        return (pipe.unet(latent, torch.tensor([666]), given).sample * weights).sum()

    length = torch.zeros((), dtype=torch.float64, requires_grad=True)
    without = value(length).detach()
    with eraser.attach(pipe, ["Cats"], layout=("cond",)) as attached:
        there = value(length)
        (slope,) = torch.autograd.grad(there, length)
        with torch.no_grad():
            step = 1e-5
            differences = (value(step) - value(-step)) / (2 * step)
        assert attached.report().replaced > 0 and there.item() != without.item()
    assert float(slope) == pytest.approx(float(differences)) and slope != 0
