"""The int8 screen: bounds that hold, and masks that stay what they are without it.

Whether this machine has the instructions or not, every row runs: without them the ops leave a screen aside.
"""

import os
import subprocess
import sys
from types import SimpleNamespace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from benchmarks.screen_bounds import bounds
from lbdt import int8_screen, ops
from lbdt.bench.hardware import allocated_peak
from lbdt.int8_screen import MOST_CHANNELS, Screen, instructions
from lbdt.ops import _triton
from lbdt.ops.detect_patches import CODE_LANES
from tests.backends import HAS_CPP, internal
from tests.layouts import integers, misaligned

INF = float("inf")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
needs_cpp = pytest.mark.skipif(not HAS_CPP, reason="no C++ compiler")


def normal(*shape, seed=0, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("d", [1, 3, 4, 130])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_pre_activation_lies_within_its_bounds(d, dtype):
    weight, bias = (normal(37, d, seed=1) * 2.0 ** normal(37, 1, seed=2)).to(dtype), normal(37, seed=3)
    centre, rows = normal(d, seed=4, scale=5.0), normal(50, d, seed=5)
    rows = rows + centre
    found = Screen.of(weight, bias, centre)
    _, _, _, _, slack, sums = found.bounds.double()
    assert torch.equal(sums, found.codes.double().sum(1))
    assert found.codes.shape[1] % CODE_LANES == 0 and not found.codes[:, d:].any()
    h, error = bounds(rows, found)
    error = error + slack
    exact = rows.double() @ weight.double().t() + bias.double()
    assert ((exact - h).abs() <= error).all()
    # They are bounds of products, not of everything: far narrower than the products' own largest size.
    assert error.mean() < 0.05 * (rows.double().norm(dim=1).mean() * weight.double().norm(dim=1).mean())


@pytest.mark.parametrize(
    "weight",
    [
        pytest.param(torch.zeros(3, 8), id="zeros"),
        pytest.param(torch.full((3, 8), 1e-38), id="denormal-scales"),
        pytest.param(torch.full((3, 8), 3e38), id="as-large-as-can-be"),
    ],
)
def test_rows_of_any_size_have_bounds(weight):
    found = Screen.of(weight, torch.zeros(3), torch.zeros(8))
    scale, _, inner, outer, _, _ = found.bounds.double()
    assert found.codes.dtype == torch.int8
    assert (inner + outer >= weight.double().norm(dim=1) * (1 - 1e-6)).all()
    assert not scale.isnan().any()


def arguments(
    B=2, d=130, H=5, W=7, L=333, U=3, k=4, dtype=torch.float32, seed=0, threshold=0.5, update=False
):
    """Of real numbers: what lies near a value is decided by bounds, or by counting exactly."""
    given = {
        "x": (normal(B, d, H, W, seed=seed) + normal(d, 1, 1, seed=seed + 1)).to(dtype),
        "weight": (normal(L, d, seed=seed + 2) / d**0.5).to(dtype),
        "bias": normal(L, seed=seed + 3, scale=0.1),
        "latents": torch.randperm(L, generator=torch.Generator().manual_seed(seed))[:U].sort().values,
        "thresholds": torch.full((2, U), float(threshold)),
        "timestep_bin": torch.arange(B) % 2,
        "enabled": torch.ones(B, U, dtype=torch.bool),
        "k": k,
    }
    if update:
        given["minus"] = normal(B, d, H, W, seed=seed + 4).to(dtype)
    return given


def masks(given, centre=None):
    """By C++ without and with a screen."""
    if centre is None:
        centre = torch.zeros(given["x"].shape[1])
    screen = Screen.of(given["weight"], given["bias"], centre)
    plain = ops.detect_patches(**given, backend="cpp")
    return plain, ops.detect_patches(**given, **screen._asdict(), backend="cpp")


SIZES = [
    pytest.param({}, id="plain"),
    pytest.param({"H": 1, "W": 1, "B": 1}, id="one-patch"),
    pytest.param({"H": 4, "W": 4}, id="sixteen-patches"),
    pytest.param({"H": 16, "W": 16, "threshold": -9.0}, id="every-patch-a-candidate"),
    pytest.param({"threshold": 99.0}, id="no-candidate"),
    pytest.param({"d": 1}, id="d-1"),
    pytest.param({"d": 3, "L": 5, "U": 2, "k": 1}, id="d-3"),
    pytest.param({"d": 65}, id="d-65"),
    pytest.param({"L": 1, "U": 1, "k": 1, "threshold": -9.0}, id="dictionary-of-one"),
    pytest.param({"L": 97, "k": 97, "threshold": -9.0}, id="k-all"),
    pytest.param({"L": 2000, "k": 1, "threshold": -9.0}, id="k-1"),
    pytest.param({"L": 2000, "k": 300, "threshold": -9.0}, id="k-large"),
    pytest.param({"k": 0}, id="no-rank-test"),
    pytest.param({"U": 33, "threshold": 2.0}, id="many-watched"),
    pytest.param({"U": 200, "threshold": 2.5}, id="more-watched-than-a-block"),
    pytest.param({"U": 60, "threshold": -9.0}, id="all-watched-pass"),
    pytest.param({"update": True, "threshold": 1.0}, id="update"),
    pytest.param({"update": True, "U": 40, "threshold": 2.0}, id="update-many-watched"),
]


@needs_cpp
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("sizes", SIZES)
def test_the_mask_is_that_without_a_screen(sizes, dtype):
    given = arguments(dtype=dtype, **sizes)
    for centre in (
        None,
        normal(given["x"].shape[1], seed=1),
        normal(given["x"].shape[1], seed=9, scale=100.0),
    ):
        plain, screened = masks(given, centre)
        assert torch.equal(plain, screened)


@needs_cpp
@pytest.mark.parametrize("sizes", SIZES)
def test_with_exact_sums_the_mask_is_the_reference_s(sizes):
    """Small integers: ties are frequent, and every order of addition gives the same."""
    given = arguments(**sizes)
    g = torch.Generator().manual_seed(7)
    for name in ("x", "weight", "bias", "minus"):
        if name in given:
            given[name] = integers(given[name].shape, g, torch.float32)
    _, screened = masks(given)
    assert torch.equal(screened, ops.detect_patches(**given, backend="reference"))


@needs_cpp
@pytest.mark.parametrize("watched", [3, 40])
def test_ties_of_a_whole_dictionary(watched):
    """Equal rows: every pre-activation lies between every other's bounds, and none exceeds another."""
    given = arguments(U=watched, threshold=-9.0, k=2)
    given["weight"] = given["weight"][:1].expand(333, -1).contiguous()
    given["bias"] = torch.zeros(333)
    plain, screened = masks(given)
    assert screened.all() and torch.equal(plain, screened)
    given["bias"][5] = 1e-6  # in the next number or so above the rest
    plain, screened = masks(given)
    assert torch.equal(plain, screened)


@needs_cpp
@pytest.mark.parametrize("watched", [3, 40])
@pytest.mark.parametrize("value", [float("nan"), INF, -INF, 3e38, 1e-38, 1e-44])
def test_values_at_the_ends_of_the_numbers(value, watched):
    given = arguments(U=watched)
    given["x"][0, :, 1, 2] = value
    given["x"][1, 4, :, 0] = value
    given["weight"][7] = value if abs(value) < 1 else given["weight"][7]
    plain, screened = masks(given)
    assert torch.equal(plain, screened)
    given["x"] *= 1e-30
    given["thresholds"].fill_(-INF)
    plain, screened = masks(given)
    assert torch.equal(plain, screened)


@needs_cpp
def test_many_candidates_are_decided_some_at_a_time():
    given = arguments(B=1, H=60, W=70, L=500, U=1, k=40, d=16, threshold=-9.0)
    plain, screened = masks(given)
    assert plain.any() and not plain.all() and torch.equal(plain, screened)
    screen = Screen.of(given["weight"], given["bias"], torch.zeros(16))._asdict()
    peak = allocated_peak(lambda: ops.detect_patches(**given, **screen, backend="cpp"))
    # A bit a latent and candidate and its codes, of 1,024 of these a thread.
    assert peak < 4 * torch.get_num_threads() * 1024 * (500 // 8 + 16)


def test_a_screen_is_float32_whatever_torch_makes_by_default():
    torch.set_default_dtype(torch.float64)
    try:
        found = Screen.of(torch.ones(3, 5, dtype=torch.float32), *(torch.zeros(n).float() for n in (3, 5)))
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.bounds.dtype == torch.float32


@needs_cpp
@pytest.mark.parametrize(
    "layout", ["channels_last", "tokens", "transposed", *misaligned(torch.zeros(1, 1, 2, 2))]
)
@pytest.mark.parametrize("watched", [3, 40])
def test_maps_of_every_layout(layout, watched):
    given = arguments(U=watched, threshold=1.0 if watched == 3 else 2.0, k=60)
    x = given["x"]
    forms = {
        "channels_last": x.to(memory_format=torch.channels_last),
        "tokens": x.flatten(2).transpose(1, 2).contiguous().transpose(1, 2),
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
    }
    given["x"] = (forms | misaligned(x))[layout]
    plain, screened = masks(given)
    assert plain.any() and not plain.all() and torch.equal(plain, screened)


@needs_cpp
def test_with_a_gate_over_a_run_sums_and_counts_stay():
    given = arguments(U=40, threshold=1.5)
    gate = {"owners": torch.arange(40) % 3, "least": torch.full((2, 3), 60), "deciding": torch.tensor([1, 1])}
    found = []
    screen = Screen.of(given["weight"], given["bias"], torch.zeros(130))._asdict()
    for more in ({}, screen):
        gated, so_far = torch.zeros(2, dtype=torch.int64), torch.zeros(2, 4, dtype=torch.int64)
        written = {"gated": gated, "so_far": so_far}
        mask = ops.detect_patches(**given, **gate, **written, **more, backend="cpp")
        found.append((mask, gated, so_far))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert found[0][1].any()


@needs_cpp
@given(st.data())
def test_any_dictionary_gives_the_mask_that_it_gives_without_a_screen(data):
    draw = data.draw
    seed = draw(st.integers(0, 2**31 - 1))
    sizes = {
        "B": draw(st.integers(1, 3)),
        "d": draw(st.sampled_from([1, 2, 7, 32, 61])),
        "H": draw(st.integers(1, 6)),
        "W": draw(st.integers(1, 6)),
        "L": draw(st.sampled_from([40, 64, 191, 700])),
        "U": draw(st.sampled_from([1, 5, 40])),
        "k": draw(st.integers(0, 40)),
        "threshold": draw(st.sampled_from([-9.0, 0.0, 1.0, 2.0])),
        "dtype": draw(st.sampled_from(FLOATS)),
    }
    given = arguments(seed=seed, **sizes)
    if draw(st.booleans()):  # many latents near to one another
        given["weight"] = (given["weight"][:1] + 1e-3 * given["weight"]).to(sizes["dtype"])
    given["enabled"] = torch.rand(given["enabled"].shape) < 0.7
    plain, screened = masks(given, normal(sizes["d"], seed=seed + 1))
    assert torch.equal(plain, screened)


_OLDER = """
import torch, pytest, sys
from lbdt.int8_screen import instructions
print(instructions())
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", sys.argv[1], "-k", "exact_sums or layout or every_patch"]))
"""


@needs_cpp
@pytest.mark.parametrize(
    ("older", "left"),
    [
        ("avx512", ("avx512_vnni", "avx_vnni", "")),
        ("avx2", ("avx_vnni", "")),
        ("default", ("",)),
    ],
)
def test_on_a_processor_with_fewer_instructions(older, left):
    """What torch itself is held to by this variable: no AMX, no AVX-512, and none, where the machine has more."""
    done = subprocess.run(
        [sys.executable, "-c", _OLDER, __file__],
        env=os.environ | {"ATEN_CPU_CAPABILITY": older},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert done.stdout.splitlines()[0] in left


def test_a_screen_is_made_where_it_spares_time():
    weight, bias, centre = normal(16384, 64), torch.zeros(16384), torch.zeros(64)
    found = Screen.where_useful(weight, bias, centre)
    assert (found is None) == (not instructions())
    assert Screen.where_useful(weight[:9], bias[:9], centre) is None
    assert Screen.where_useful(weight.double(), bias, centre) is None
    assert Screen.where_useful(weight.to("meta"), bias.to("meta"), centre.to("meta")) is None


@pytest.mark.parametrize("served", [True, False], ids=["served", "not-served"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_on_a_gpu_a_screen_is_made_for_triton_in_half_precision(dtype, served, monkeypatch):
    monkeypatch.setattr(_triton, "supports", lambda x: None if served else "needs another GPU")
    weight = SimpleNamespace(device=torch.device("cuda"), dtype=dtype)
    assert int8_screen._serves(weight) == (served and dtype != torch.float32)


REFUSED = [
    pytest.param({"weight": torch.zeros(3)}, ValueError, "weight: expected", id="weight-1d"),
    pytest.param({"weight": torch.zeros(3, 4).double()}, TypeError, "weight", id="float64"),
    pytest.param({"weight": torch.zeros(1, MOST_CHANNELS + 1)}, ValueError, "65536", id="too-wide"),
    pytest.param({"bias": torch.zeros(2)}, ValueError, "bias", id="bias-shape"),
    pytest.param({"bias": torch.zeros(3).double()}, TypeError, "bias", id="bias-dtype"),
    pytest.param({"centre": torch.zeros(5)}, ValueError, "centre", id="centre-shape"),
]


@pytest.mark.parametrize(("wrong", "kind", "said"), REFUSED)
def test_what_is_no_dictionary_is_refused(wrong, kind, said):
    right = {"weight": torch.zeros(3, 4), "bias": torch.zeros(3), "centre": torch.zeros(4)}
    with pytest.raises(kind, match=said):
        Screen.of(**right | wrong)


WRONG = [
    pytest.param({"codes": None}, ValueError, "expected all", id="no-codes"),
    pytest.param({"codes": torch.zeros(332, 132, dtype=torch.int8)}, ValueError, "codes", id="fewer-rows"),
    pytest.param({"codes": torch.zeros(333, 130, dtype=torch.int8)}, ValueError, "codes", id="not-padded"),
    pytest.param({"codes": torch.zeros(333, 132)}, TypeError, "codes", id="codes-dtype"),
    pytest.param(
        {"codes": torch.zeros(132, 333, dtype=torch.int8).t()}, ValueError, "contiguous", id="strided"
    ),
    pytest.param({"bounds": torch.zeros(5, 333)}, ValueError, "bounds", id="bounds-shape"),
    pytest.param({"centre": torch.zeros(130).double()}, TypeError, "centre", id="centre-dtype"),
]


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=needs_cpp)])
@pytest.mark.parametrize(("wrong", "kind", "said"), WRONG)
def test_a_screen_of_another_shape_is_refused(wrong, kind, said, backend):
    given = arguments()
    screen = Screen.of(given["weight"], given["bias"], torch.zeros(130))._asdict()
    with pytest.raises(kind, match=said):
        ops.detect_patches(**given, **screen | wrong, backend=backend)
    if backend == "cpp":
        names = ("owners", "least", "least_of", "deciding", "gated", "so_far")
        gate = dict.fromkeys((*names, "order")) | {
            "least_of": 0,
            "mask": torch.zeros(2, 35, dtype=torch.bool),
        }
        with pytest.raises(RuntimeError, match="codes|bounds|centre"):
            internal("detect_patches_cpp")(**given, minus=None, **gate, **screen | wrong)
