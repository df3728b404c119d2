"""A dictionary whose rows lie in another order than its latents: masks and pictures of one that is copied into it."""

import pytest
import torch

from lbdt import ops
from lbdt.bench.hardware import allocated_peak
from lbdt.int8_screen import Screen
from tests.backends import DEVICE, HAS_CPP, HAS_TRITON, every_backend, internal
from tests.ops.test_detect_patches import ROWS, inputs
from tests.ops.test_erase_step import called
from tests.ops.test_erase_step import inputs as step_inputs

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="orders are of the CPU")
backends = every_backend("cpp")
needs_cpp = pytest.mark.skipif(not HAS_CPP, reason="no C++ compiler")


def shuffled(given, seed=1):
    """The same dictionary with its rows elsewhere, and where."""
    order = torch.randperm(len(given["weight"]), generator=torch.Generator().manual_seed(seed))
    weight = torch.empty_like(given["weight"])
    weight[order] = given["weight"]
    return given | {"weight": weight, "order": order}


def forms(weight):
    """The same values, otherwise in memory."""
    wide = torch.zeros(len(weight), weight.shape[1] + 3, dtype=weight.dtype)
    wide[:, 2:-1] = weight
    return {"contiguous": weight, "strided": wide[:, 2:-1], "transposed": weight.t().contiguous().t()}


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("sizes", ROWS)
def test_the_mask_is_that_of_the_copied_dictionary(sizes, dtype, backend):
    backend = "reference" if dtype == torch.float64 else backend  # C++ multiplies float32 and smaller
    given = inputs(**sizes, dtype=dtype)
    expected = ops.detect_patches(**given, backend=backend)
    assert torch.equal(ops.detect_patches(**shuffled(given), backend=backend), expected)


@backends
@pytest.mark.parametrize("form", ["contiguous", "strided", "transposed"])
def test_rows_in_any_memory(form, backend):
    given = shuffled(inputs(L=300, k=9, threshold=-1e9))
    expected = ops.detect_patches(**given, backend="reference")
    given["weight"] = forms(given["weight"])[form]
    assert expected.any() and not expected.all()
    assert torch.equal(ops.detect_patches(**given, backend=backend), expected)


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param({"L": 700, "d": 33, "k": 20, "threshold": -1e9}, id="all-candidates"),
        pytest.param({"L": 700, "d": 33, "k": 20, "U": 50, "threshold": 8.0}, id="many-watched"),
        pytest.param({"L": 300, "d": 2, "k": 60, "threshold": -1e9}, id="ties"),
    ],
)
def test_a_screen_in_the_same_order(sizes, dtype):
    given = inputs(**sizes, H=9, W=11, dtype=dtype)
    # Real numbers, so that products differ, but for the ties.
    if sizes["d"] > 2:
        given["x"] = torch.randn(given["x"].shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    expected = ops.detect_patches(**given, backend="cpp")
    centre = torch.ones(sizes["d"])
    moved = shuffled(given)
    screen = Screen.of(moved["weight"], moved["bias"], centre, moved["order"])
    for one, other in zip(screen, Screen.of(given["weight"], given["bias"], centre), strict=True):
        assert torch.equal(one, other)
    assert expected.any() and not expected.all()
    assert torch.equal(ops.detect_patches(**moved, **screen._asdict(), backend="cpp"), expected)


@needs_cpp
def test_a_screened_dictionary_is_not_copied():
    given = shuffled(inputs(B=1, d=256, H=8, W=8, L=20000, U=2, k=4, threshold=-1e9))
    screen = Screen.of(given["weight"], given["bias"], torch.zeros(256), given["order"])._asdict()
    peak = allocated_peak(lambda: ops.detect_patches(**given, **screen, backend="cpp"))
    assert 0 < peak < 1 << 20 < given["weight"].nbytes / 10


@backends
@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param({"threshold": 2.0}, id="plain"),
        pytest.param({"known": True, "minus": True, "bank": True, "padding": 1}, id="known-update-bank"),
        pytest.param({"gate": "run", "cond": 1}, id="gate-over-a-run"),
    ],
)
def test_a_step(sizes, backend):
    given = step_inputs(**sizes)
    out, written = called(given, backend)
    moved, also = called(shuffled(given), backend)
    assert not torch.equal(out, given["x"])
    assert torch.equal(moved, out) and all(torch.equal(also[name], written[name]) for name in written)


@backends
@pytest.mark.parametrize(
    ("order", "error", "message"),
    [
        pytest.param(torch.arange(39), ValueError, r"order: expected \[L\] = \[40\]", id="shorter"),
        pytest.param(torch.arange(40).int(), TypeError, "order: expected dtype int64", id="int32"),
        pytest.param(torch.arange(80)[::2], ValueError, "order: .*contiguous", id="strided"),
        pytest.param(torch.arange(40, device="meta"), ValueError, "order: ", id="elsewhere"),
        pytest.param(torch.arange(1, 41), IndexError, r"order: .*\[0, 40\)", id="past-the-end"),
        pytest.param(torch.arange(-1, 39), IndexError, r"order: .*\[0, 40\)", id="before-the-first"),
    ],
)
@pytest.mark.parametrize("op", ["detect_patches", "erase_step"])
def test_an_order_that_is_none_is_refused(op, order, error, message, backend):
    given = (inputs if op == "detect_patches" else step_inputs)(threshold=-1e9)
    with pytest.raises(error, match=message):
        getattr(ops, op)(**given, order=order, backend=backend)


@needs_cpp
@pytest.mark.parametrize("place", [-1, 40, 1 << 62])
@pytest.mark.parametrize("latent", ["watched", "counted"])
def test_cpp_looks_where_it_reads(place, latent):
    """Past the wrappers too: no row outside of the dictionary is read."""
    given = inputs(U=1, threshold=-1e9)
    own = int(given["latents"][0])
    order = torch.arange(40)
    order[own if latent == "watched" else (own + 1) % 40] = place
    names = ("minus", "owners", "least", "deciding", "gated", "so_far", "codes", "bounds", "centre")
    rest = dict.fromkeys(names) | {"least_of": 0, "order": order, "mask": torch.zeros(2, 20).bool()}
    with pytest.raises(RuntimeError, match=r"order: expected values in \[0, 40\)"):
        internal("detect_patches_cpp")(**given, **rest)


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
@pytest.mark.parametrize("op", ["detect_patches", "erase_step"])
def test_triton_says_that_it_takes_none(op):
    given = shuffled((inputs if op == "detect_patches" else step_inputs)())
    assert "order" in ops.explain(op, **given).reasons["triton"]
    if op == "detect_patches":
        left = [given.get(name) for name in ("minus", "owners", "least")]
        positional = (*list(given.values())[:-1], *left, 0, *6 * (None,), given["order"])
        assert "order" in ops.explain(op, *positional).reasons["triton"]
