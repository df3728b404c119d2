"""Arguments that few would pass: memory shared with what an op writes, numbers out of range, extreme sizes."""

import math

import pytest
import torch

from lbdt import _build, ops
from tests import backends
from tests.backends import on_device
from tests.layouts import bits
from tests.ops import test_record_patches as recording
from tests.ops import test_replace_patches as replacing

OVERLAPS = [
    pytest.param(lambda x: x[:, :1].expand(-1, 6, -1, -1), True, id="one-channel-for-all"),
    pytest.param(lambda x: x.flatten().unfold(0, 35, 2)[:12].view(2, 6, 5, 7), True, id="windows"),
    pytest.param(lambda x: x.as_strided((2, 6, 5, 7), (210, 35, 6, 1)), True, id="rows-of-seven-six-apart"),
    pytest.param(lambda x: x.as_strided((2, 6, 5, 7), (1, 1, 1, 1)), True, id="more-places-than-memory"),
    pytest.param(lambda x: x.as_strided((1, 6, 3, 2), (0, 30, 2, 3)), False, id="interleaved-apart"),
    pytest.param(lambda x: x[:1].as_strided((1, 6, 5, 7), (0, 35, 7, 1)), False, id="one-image-stride-0"),
    pytest.param(lambda x: x[:, ::2, ::2, 1:5], False, id="sliced"),
]


@backends.every_backend("cpp")
@pytest.mark.parametrize(("view", "shared"), OVERLAPS)
def test_places_that_share_memory_are_refused_in_place_and_no_others(view, shared, backend):
    x = view(replacing.inputs()["x"])
    batch, channels, height, width = x.shape
    arguments = replacing.inputs(B=batch, d=channels, H=height, W=width) | {"x": x}
    before = bits(x).clone()
    if shared:
        with pytest.raises(ValueError, match="x: elements share memory"):
            ops.replace_patches_(**arguments, backend=backend)
        assert torch.equal(bits(x), before)
    else:
        expected, where = ops.replace_patches(**arguments, backend="reference")
        assert torch.equal(ops.replace_patches_(**arguments, backend=backend), where) and where.any()
        assert torch.equal(bits(x), bits(expected))


@backends.every_backend("cpp")
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_bank_or_numbers_in_x_s_own_memory_are_read_before_it_is_written(channels_last, backend):
    arguments = replacing.inputs(bank=2, padding=1, d=35, avoid=0.3)
    arguments["mask"][0] = True
    x = arguments["x"].abs() / 9
    arguments["x"] = x.to(memory_format=torch.channels_last) if channels_last else x
    for name, view in (
        ("bank", lambda x: x.flatten(2).transpose(1, 2)[:, 3:5]),
        ("bank", lambda x: x.flatten(2)[:, 3:5]),
        ("u", lambda x: x[:, 0].flatten(1)),
    ):
        own = {**arguments, "x": arguments["x"].clone()}
        own[name] = view(own["x"])
        expected, where = ops.replace_patches(**own, backend="reference")
        assert torch.equal(ops.replace_patches_(**own, backend=backend), where) and where.any()
        assert torch.equal(bits(own["x"]), bits(expected)), name


@backends.every_backend("cpp")
@pytest.mark.parametrize("bank", [0, 3], ids=["no-bank", "bank"])
def test_a_number_outside_of_its_range_picks_an_end(bank, backend):
    arguments = replacing.inputs(rate=2.0 if bank else 0.5, bank=bank, seed=3)
    odd = {0.0: (math.nan, -0.5, -math.inf, -0.0, 1e-45), 1 - 2.0**-24: (1.0, 1.5, 3e38, math.inf)}
    for inside, outside in odd.items():
        arguments["u"].fill_(inside)
        expected, _ = replacing.check(arguments, backend)
        for number in outside:
            arguments["u"].fill_(number)
            out, _ = ops.replace_patches(**arguments, backend=backend)
            assert torch.equal(bits(out), bits(expected)), number


def test_a_grid_whose_distances_exceed_an_int64_is_refused():
    patches = 3_000_000
    x, mask, u = (
        torch.zeros(1, 1, patches),
        torch.zeros(1, patches, dtype=torch.bool),
        torch.zeros(1, patches),
    )
    with pytest.raises(ValueError, match="source: 'mean' orders squared distances .* 1 x 3000000"):
        ops.replace_patches(x, mask, u, 1, patches, source="mean")
    assert not ops.replace_patches(x, mask, u, 1, patches)[1].any()


@backends.every_backend("cpp")
def test_a_padding_far_beyond_the_grid_is_the_grid(backend):
    arguments = replacing.inputs(rate=0.1, padding=2**62, bank=2)
    assert replacing.check({**arguments, "padding": 7}, backend)[1].all()
    assert ops.replace_patches(**arguments, backend=backend)[1].all()


SHARED = [
    pytest.param("written", lambda a: a["rows"].view(-1)[2:4], id="written-in-rows"),
    pytest.param("cells", lambda a: a["rows"].view(-1).view(torch.uint8)[30:], id="cells-in-rows"),
    pytest.param("cells", lambda a: a["written"].view(torch.uint8), id="cells-in-written"),
    pytest.param("cells", lambda a: a["mask"].view(torch.uint8).view(-1), id="cells-in-the-mask"),
    pytest.param("timesteps", lambda a: a["rows"].view(-1).view(torch.float32)[:4:2], id="timesteps-in-rows"),
]


@backends.every_backend("cpp", "triton")
@pytest.mark.parametrize(("name", "view"), SHARED)
def test_buffers_that_share_memory_are_refused(name, view, backend):
    arguments = on_device(recording.inputs(C=50))
    arguments[name] = view(arguments)
    before = [arguments[n].clone() for n in ("rows", "cells", "written")]
    with pytest.raises(RuntimeError, match="is written, and shares memory with another argument"):
        ops.record_patches(**arguments, backend=backend)
    assert all(
        torch.equal(arguments[n], b) for n, b in zip(("rows", "cells", "written"), before, strict=True)
    )


@backends.every_backend("cpp", "triton")
def test_buffers_cut_from_one_are_apart(backend):
    arguments = on_device(recording.inputs(C=40))
    expected = recording.literal(**arguments)
    room = torch.cat([arguments["written"], arguments["rows"].view(-1), torch.full((5,), 0x6363636363636363)])
    arguments |= {"written": room[:2], "rows": room[2:34].view(8, 4), "cells": room[34:].view(torch.uint8)}
    ops.record_patches(**arguments, backend=backend)
    got = (arguments["rows"], arguments["cells"], arguments["written"])
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.skipif(not backends.HAS_CPP, reason="no C++ compiler")
@pytest.mark.parametrize("name", ["replace_patches_cpp", "replace_patches_cpp_"])
def test_an_internal_op_refuses_before_it_writes(name):
    assert _build.load() is None
    x = torch.zeros(1, 2, 3, 3, dtype=torch.int32)
    mask, u, replaced = (
        torch.eye(9, dtype=torch.bool)[:1],
        torch.zeros(1, 9),
        torch.zeros(1, 9, dtype=torch.bool),
    )
    out = () if name.endswith("_") else (x.clone(),)
    with pytest.raises(RuntimeError, match="x: expected float32, .* got Int"):
        getattr(torch.ops.lbdt, name)(x, mask, u, None, None, 0, 0, *out, replaced)
    assert not replaced.any()
