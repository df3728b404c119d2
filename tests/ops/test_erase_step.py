"""erase_step, C++ and Triton against the reference: what is returned, recorded and kept of a run has the same bits."""

import inspect

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lbdt import ops
from lbdt.ops.erase_step import erase_step_or_none, serves
from lbdt.testing import layouts
from tests.backends import DEVICE, HAS_CPP, HAS_TRITON, every_backend, on_device
from tests.layouts import bits, integers

INF, NAN = float("inf"), float("nan")
WRITTEN = ("rows", "cells", "written", "run_sums", "run_last", "run_count")
backends = every_backend("cpp", "triton")
FUSED = [name for name, there in (("cpp", HAS_CPP and DEVICE.type == "cpu"), ("triton", HAS_TRITON)) if there]
on_cpu = pytest.mark.skipif(DEVICE.type != "cpu", reason="of C++, or of values that are read on the CPU only")


def inputs(
    seed=0,
    B=4,
    d=12,
    H=4,
    W=5,
    L=40,
    U=5,
    T=3,
    C=2,
    k=4,
    dtype=torch.float32,
    threshold=2.0,
    gate=None,
    **given,
):
    """Integer-valued, so that every order of adding gives the same sums. `gate`: "call" or "run", by two patches."""
    g = torch.Generator().manual_seed(seed)
    arguments = {
        "x": integers((B, d, H, W), g, dtype),
        "timesteps": torch.tensor([999.0, 490.0, 1.0, 640.0])[torch.arange(B) % 4],
        "weight": integers((L, d), g, dtype),
        "bias": integers((L,), g, torch.float32),
        "latents": torch.randperm(L, generator=g)[:U].sort().values,
        "thresholds": torch.full((T, U), float(threshold)) + torch.arange(T).unsqueeze(1),
        "times": torch.tensor([999.0, 500.0, 1.0])[:T],
        "enabled": torch.ones(1, U, dtype=torch.bool),
        "seeds": torch.tensor([7]),
        "k": k,
        "images": max(B // 2, 1),
        "height": H,
        "width": W,
        "sizes": 12345,
        "rows": torch.full((8, 5 + (gate is not None)), -1),
        "cells": torch.full((given.pop("C_kept", 0),), 99, dtype=torch.uint8),
        "written": torch.tensor([0, 0]),
    }
    if gate is not None:
        arguments |= {
            "owners": torch.arange(U) % C,
            "least": torch.full((T, C), 4 if gate == "run" else 2),
            "least_of": 0,
        }
    if gate == "run":
        arguments |= {
            "run_sums": torch.zeros(6, C + 1, dtype=torch.int64),
            "run_last": torch.full((6,), -INF),
            "run_count": torch.tensor(0),
        }
    if given.pop("bank", False):
        arguments["bank"] = integers((T, 3, d), g, dtype, high=9)
    if given.pop("known", False):
        arguments["known_latents"] = torch.randperm(L, generator=g)[:7]
        arguments["known_thresholds"] = torch.full((T, 7), 1.0)
    if given.pop("minus", False):
        arguments["minus"] = integers((B, d, H, W), g, dtype)
    return arguments | given


def called(arguments, backend):
    """What a call on copies returned, and what it has written."""
    own = {n: arguments[n].clone() if arguments.get(n) is not None else None for n in WRITTEN}
    own = {name: value for name, value in own.items() if value is not None}
    before = {n: v.clone() for n, v in arguments.items() if torch.is_tensor(v)}
    there = on_device(arguments | own)
    out = ops.erase_step(**there, backend=backend)
    for name in before.keys() - own.keys():
        assert torch.equal(bits_of(there[name].cpu()), bits_of(before[name])), f"{name} was written"
    return out.cpu(), {name: there[name].cpu() for name in own}


def bits_of(t):
    return bits(t) if t.is_floating_point() else t


def check_same(arguments):
    """All backends, compared; what the reference has written."""
    expected, kept = called(arguments, "reference")
    x = arguments["x"]
    for backend in FUSED:
        got, written = called(arguments, backend)
        assert got.shape == x.shape and got.dtype == x.dtype and got.stride() == expected.stride()
        assert not x.numel() or got.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
        assert torch.equal(bits(got), bits(expected)), backend
        for name, value in kept.items():
            assert torch.equal(bits_of(written[name]), bits_of(value)), (backend, name)
    return expected, kept


ROWS = [
    pytest.param({}, id="plain"),
    pytest.param({"threshold": 1e9}, id="no-candidate"),
    pytest.param({"threshold": -1e9, "k": 0}, id="all-detected"),
    pytest.param({"threshold": -1e9, "k": 0, "bank": True}, id="all-detected-bank"),
    pytest.param({"threshold": INF}, id="nothing-selected"),
    pytest.param({"U": 0}, id="no-latent"),
    pytest.param({"B": 0}, id="no-image"),
    pytest.param({"B": 1, "H": 1, "W": 1, "C_kept": 3}, id="one-patch"),
    pytest.param({"d": 13, "H": 3, "W": 7, "L": 97, "U": 7, "k": 9, "padding": 1}, id="odd-sizes"),
    pytest.param({"H": 13, "W": 11, "U": 40, "k": 12, "padding": 1, "bank": True}, id="several-panels"),
    pytest.param({"dtype": torch.float16, "padding": 1, "bank": True}, id="float16"),
    pytest.param({"dtype": torch.bfloat16, "padding": 2, "source": "mean", "minus": True}, id="bfloat16"),
    pytest.param({"minus": True, "padding": 1}, id="update"),
    pytest.param({"source": "nearest", "padding": 3}, id="nearest-padding-3"),
    pytest.param({"source": "row", "padding": 1, "known": True}, id="row-known"),
    pytest.param({"source": "mean", "known": True, "bank": True}, id="mean-known-bank"),
    pytest.param({"known": True, "threshold": 1e9}, id="known-without-candidate"),
    pytest.param({"known": True, "threshold": 6.0, "minus": True}, id="known-in-some-rows-update"),
    pytest.param({"gate": "call", "padding": 1}, id="gate"),
    pytest.param({"gate": "call", "cond": 1, "least_of": 30}, id="gate-cond-second"),
    pytest.param({"gate": "call", "cond": 0, "U": 6, "C": 3}, id="gate-cond-first"),
    pytest.param({"gate": "call", "B": 6, "images": 2, "cond": 2, "counted": 0b100}, id="three-branches"),
    pytest.param({"gate": "call", "B": 6, "images": 2, "cond": 1, "counted": 0b011}, id="cond-in-the-middle"),
    pytest.param({"gate": "run", "B": 0}, id="run-no-image"),
    pytest.param({"gate": "run", "U": 0}, id="run-no-latent"),
    pytest.param({"B": 3, "images": 3, "counted": -1}, id="one-branch"),
    pytest.param({"counted": 0}, id="no-branch-counted"),
    pytest.param({"counted": 0b10, "bank": True, "source": "nearest"}, id="second-branch-counted"),
    pytest.param({"B": 66, "H": 1, "W": 2, "images": 1, "counted": -(2**63)}, id="branches-past-the-mask"),
    pytest.param({"schedule": torch.tensor([900, 500, 2]), "first": 1, "last": 3}, id="window"),
    pytest.param({"schedule": torch.tensor([5.0, NAN, 2.0]), "first": 1, "last": 2}, id="window-nan"),
    pytest.param(
        {"schedule": torch.arange(40, 0, -1)[::2].half(), "first": 3, "last": 20}, id="window-halves"
    ),
    pytest.param({"C_kept": 500}, id="cells"),
    pytest.param({"written": torch.tensor([7, 61]), "C_kept": 90}, id="rings-wrap"),
    pytest.param({"written": torch.tensor([-5, 2**63 - 30]), "C_kept": 50}, id="odd-counters"),
    pytest.param(
        {"B": 6, "rows": torch.zeros(3, 5, dtype=torch.int64), "images": 2}, id="more-rows-than-fit"
    ),
    pytest.param({"seeds": torch.tensor([3, -1])}, id="seed-each-image"),
    pytest.param({"B": 8, "images": 4, "seeds": torch.tensor([2**63 - 1, 2**40])}, id="seed-each-prompt"),
    pytest.param({"enabled": torch.tensor([[1, 0, 1, 0, 1], [0] * 5]).bool()}, id="sets"),
    pytest.param({"B": 8, "images": 4, "enabled": torch.eye(2, 5).bool()}, id="set-each-prompt"),
    pytest.param({"timesteps": torch.tensor([999, 490, 1, 640])}, id="int64-timesteps"),
    pytest.param({"timesteps": torch.tensor([-3, 490, 1, 640], dtype=torch.int32)}, id="int32-timesteps"),
    pytest.param({"timesteps": torch.tensor(750.5).half().expand(4)}, id="expanded-half-timesteps"),
    pytest.param({"timesteps": torch.tensor([NAN, INF, -INF, 750.0]).bfloat16()}, id="odd-timesteps"),
    pytest.param({"timesteps": torch.tensor([750.0, 249.75, 1e300, 0.5]).double()}, id="double-timesteps"),
    pytest.param({"times": torch.tensor([5.0, NAN, NAN])}, id="nan-bins"),
    pytest.param(
        {"timesteps": torch.tensor([1.0, 2.0, INF, 3.0]), "times": torch.tensor([3.0, INF, 1.0])}, id="ties"
    ),
]


@pytest.mark.parametrize("given", ROWS)
def test_it_does_what_the_reference_does(given):
    check_same(inputs(**given))


@pytest.mark.parametrize("layout", ["channels_last", "sliced", "transposed_grid", "patches", "tokens_view"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_any_layout(layout, dtype):
    arguments = inputs(
        B=3, images=3, d=13, H=3, W=7, dtype=dtype, padding=1, minus=True, bank=True, known=True
    )
    expected, kept = called(arguments, "reference")
    assert not torch.equal(expected, arguments["x"])
    there = {name: layouts(arguments[name])[layout] for name in ("x", "minus")}
    _, same = check_same(arguments | there)
    assert all(torch.equal(same[name], kept[name]) for name in kept)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "tokens_view"])
def test_patches_that_are_not_finite_are_counted(layout):
    arguments = inputs(threshold=-50.0, k=0, minus=True, B=2, images=1)
    x, minus = arguments["x"], arguments["minus"]
    x[0, 3, 0, 1], x[0, 5, 2, 2], minus[0, 11, 2, 2], minus[0, 0, 3, 4] = NAN, INF, INF, -INF
    x[1, 7, 1, 1], minus[1, 7, 1, 1] = 3e38, -3e38  # their difference is infinite, and they are not
    arguments |= {name: layouts(arguments[name])[layout] for name in ("x", "minus")}
    _, kept = check_same(arguments)
    assert kept["rows"][:2, 4].tolist() == [3, 0]


def test_a_latent_of_odd_weights_makes_no_patch_odd():
    arguments = inputs()
    arguments["weight"][arguments["latents"][0], 2] = NAN
    _, kept = check_same(arguments)
    assert kept["rows"][:4, 4].tolist() == [0] * 4


CALLS = [
    pytest.param([(999, 2), (500, 2), (1, 2)], False, id="a-run"),
    pytest.param([(999, 2), (500, 2), (500, 2), (999, 2)], False, id="as-large-begins"),
    pytest.param([(999, 2), (500, 2), (500, 2), (999, 2)], True, id="as-large-goes-on"),
    pytest.param([(999, 2), (500, 4), (1, 1), (1, 2)], True, id="other-images"),
    pytest.param([(999, 2), (NAN, 2), (1, 2)], False, id="no-number"),
]


@pytest.mark.parametrize(("calls", "whole_calls"), CALLS)
@pytest.mark.parametrize("more", [{"cond": 1}, {"cond": 0, "counted": 1}, {}, {"window": True}], ids=str)
def test_a_gate_over_a_run(calls, whole_calls, more):
    state, gated = {}, []
    more, windowed = {**more}, "window" in more
    if more.pop("window", False):
        more |= {"schedule": torch.tensor([999, 500, 1]), "first": 0, "last": 2, "cond": 1}
    for place, (timestep, images) in enumerate(calls):
        batch = images if more.get("cond", -1) < 0 else 2 * images
        arguments = inputs(seed=place, B=batch, images=images, gate="run", threshold=4.0, C=3)
        arguments["least"] = torch.tensor([[6, 3, 40]]).expand(3, 3).contiguous()
        arguments |= {
            "timesteps": torch.full((batch,), float(timestep)),
            "whole_calls": whole_calls,
            **more,
            **state,
        }
        _, kept = check_same(arguments)
        state = {name: kept[name] for name in ("run_sums", "run_last", "run_count")}
        gated.append(int(kept["rows"][:batch, 5].sum()))
    assert windowed or any(gated)
    assert (state["run_sums"] >= 1 << 40).any(), "no concept was found in any image"


@on_cpu
def test_what_is_kept_of_a_run_by_hand():
    """Two patches of evidence a call, with 3 quarters of a patch in the mean: found in the first call."""
    arguments = inputs(B=1, d=2, H=1, W=3, L=2, U=1, T=1, C=1, k=0, gate="run", threshold=0.5)
    arguments |= {
        "x": torch.tensor([[[[1.0, 1, 0]], [[4.0, 5, 6]]]]),
        "weight": torch.eye(2),
        "bias": torch.zeros(2),
        "latents": torch.tensor([0]),
        "least": torch.tensor([[9]]),
        "source": "nearest",
    }
    out, kept = called(arguments, "cpp")
    assert torch.equal(out, arguments["x"]) and kept["rows"][0].tolist()[:2] == [0, 0]
    assert kept["rows"][0, 5] == 2 and kept["run_sums"][0].tolist() == [2, 1]
    out, kept = called(arguments | {"least": torch.tensor([[8]])}, "cpp")
    assert out.flatten().tolist() == [0.0, 0.0, 0.0, 6.0, 6.0, 6.0]
    assert kept["rows"][0].tolist()[:2] == [2, 2] and kept["run_sums"][0].tolist() == [1 << 40, 1]


REFUSED = [
    pytest.param({"images": 3}, ValueError, "images: expected a divisor of the 4 rows", id="images"),
    pytest.param({"height": 5}, ValueError, "height, width: expected x's grid", id="grid"),
    pytest.param({"cond": 2}, ValueError, "cond: expected -1 or one of the 2 branches", id="cond"),
    pytest.param({"source": "far"}, ValueError, "source: expected one of random", id="source"),
    pytest.param({"padding": -1}, ValueError, "padding: expected >= 0", id="padding"),
    pytest.param(
        {"seeds": torch.arange(4)}, ValueError, "seeds: expected .a divisor of 2 images", id="seeds"
    ),
    pytest.param({"enabled": torch.ones(3, 5).bool()}, ValueError, "enabled: expected", id="sets"),
    pytest.param({"timesteps": torch.ones(3)}, ValueError, r"timesteps: expected \[B\]", id="timesteps"),
    pytest.param(
        {"timesteps": torch.ones(4).bool()}, TypeError, "timesteps: expected dtype", id="timesteps-dtype"
    ),
    pytest.param({"times": torch.ones(2)}, ValueError, r"times: expected \[T\]", id="times"),
    pytest.param({"latents": torch.arange(36, 41)}, IndexError, "latents: expected values in", id="latents"),
    pytest.param({"bank": torch.ones(3, 0, 12)}, ValueError, "bank: expected", id="bank"),
    pytest.param({"known_latents": torch.arange(3)}, ValueError, "expected both or none", id="known"),
    pytest.param(
        {"owners": torch.zeros(5, dtype=torch.int64)}, ValueError, "least: expected a tensor", id="gate"
    ),
    pytest.param({"run_last": torch.zeros(4)}, ValueError, "run_sums, run_last, run_count", id="run"),
    pytest.param({"schedule": torch.zeros(0)}, ValueError, "schedule: expected", id="schedule"),
    pytest.param(
        {"rows": torch.zeros(8, 6, dtype=torch.int64)}, ValueError, r"rows: expected .R >= 1, 5", id="rows"
    ),
    pytest.param({"sizes": -1}, ValueError, "sizes: expected", id="sizes"),
    pytest.param({"minus": torch.ones(4, 12, 20)}, ValueError, "minus: expected the shape of x", id="minus"),
    pytest.param({"weight": None}, TypeError, "weight: expected a tensor, got None", id="no-weight"),
]


@on_cpu
@backends
@pytest.mark.parametrize(("given", "error", "message"), REFUSED)
def test_it_refuses(given, error, message, backend):
    with pytest.raises(error, match=message):
        called(inputs() | given, backend)


@on_cpu
@backends
def test_it_refuses_memory_that_is_shared(backend):
    arguments = inputs()
    arguments["latents"] = arguments["rows"].view(-1)[:5].fill_(1)
    with pytest.raises(RuntimeError, match="rows: it is written, and shares memory"):
        ops.erase_step(**arguments, backend=backend)


def test_no_gradient():
    arguments = inputs()
    arguments["x"].requires_grad_()
    with pytest.raises(RuntimeError, match=r"erase_step has no gradient: .* lbdt.reference.erase_step"):
        ops.erase_step(**arguments)


@on_cpu
@backends
@pytest.mark.parametrize("given", [{}, {"gate": "run", "cond": 1}, {"threshold": 1e9, "C_kept": 50}], ids=str)
def test_opcheck(given, backend):
    arguments = tuple(inputs(known=True, **given).items())
    with torch.inference_mode():
        torch.library.opcheck(torch.ops.lbdt.erase_step.default, (), {**dict(arguments), "backend": backend})


def positional(arguments, source=0):
    """The arguments of `erase_step_or_none`, which is not called unless it serves."""
    assert serves(arguments["x"], None)
    names = inspect.signature(ops.erase_step).parameters
    return [
        source if name == "source" else arguments.get(name, parameter.default)
        for name, parameter in names.items()
        if name != "backend"
    ]


@on_cpu
def test_nothing_replaced_is_nothing_returned():
    arguments = inputs(threshold=1e9)
    assert erase_step_or_none(*positional(arguments)) is None
    assert arguments["written"].tolist() == [4, 0]
    arguments = inputs()
    expected, kept = called(arguments, "reference")
    assert torch.equal(erase_step_or_none(*positional(arguments)), expected)
    assert torch.equal(arguments["rows"], kept["rows"])


@on_cpu
@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
def test_launches_are_checked_and_do_not_tell_whether_anything_was_replaced():
    arguments = inputs(threshold=1e9)
    with ops.use_backend("triton"):
        assert torch.equal(erase_step_or_none(*positional(arguments)), arguments["x"])
        assert arguments["written"].tolist() == [4, 0]
        with pytest.raises(TypeError, match="timesteps: expected dtype"):
            erase_step_or_none(*positional(arguments | {"timesteps": torch.ones(4, dtype=torch.int16)}))
        with pytest.raises(ValueError, match="weight: expected .L, d. with d = 12"):
            erase_step_or_none(*positional(arguments | {"weight": torch.ones(40, 11)}))
    assert arguments["written"].tolist() == [4, 0]


@on_cpu
def test_what_the_op_does_not_take_is_said_by_the_checks_or_copied():
    arguments = inputs()
    with pytest.raises(ValueError, match="images: expected a divisor"):
        erase_step_or_none(*positional(arguments | {"images": 3}))
    assert arguments["written"].tolist() == [0, 0]
    spread = torch.stack([arguments["latents"]] * 2, 1)[:, 0]
    expected, _ = called(arguments, "reference")
    assert torch.equal(erase_step_or_none(*positional(arguments | {"latents": spread})), expected)


@on_cpu
def test_it_serves_plain_calls_of_its_backend_only():
    x = torch.ones(1, 2, 3, 4)
    assert serves(x, None)
    with ops.use_backend("reference"):
        assert not serves(x, None)
    with ops.use_backend("triton"):
        assert serves(x, None) == HAS_TRITON and not serves(x.double(), None)
    with torch.enable_grad():
        assert not serves(x.clone().requires_grad_(), None) and not serves(x, x.clone().requires_grad_())
    assert not serves(x.double(), None) and not serves(x.to("meta"), None)
    assert not serves(torch.nn.Parameter(x, requires_grad=False), None)
    with FlopCounterMode(display=False):
        assert not serves(x, None)
