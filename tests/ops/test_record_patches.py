"""record_patches against a Python loop: counts, rings that wrap, cells kept or not."""

import math
import struct

import pytest
import torch

from lbdt import ops
from tests import backends
from tests.backends import DEVICE, on_device

every_backend = backends.every_backend("cpp", "triton")


def inputs(seed=0, B=2, N=35, R=8, C=0, rows_before=0, cells_before=0, sums=False, gated=False):
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(B, N, generator=g) < 0.3
    given = {
        "mask": mask,
        "replaced": mask | (torch.rand(B, N, generator=g) < 0.2),
        "timesteps": torch.rand(B, generator=g) * 1000,
        "sizes": (1 << 62) + 12345,
        "rows": torch.empty(0),
        "cells": torch.full((C,), 99, dtype=torch.uint8),
        "written": torch.tensor([rows_before, cells_before]),
    }
    if sums:
        odd = torch.tensor([0.0, -1.5, 3e38, torch.nan, torch.inf, -torch.inf])
        given["sums"] = odd[torch.randint(6, (B, N), generator=g)]
    if gated:
        given["gated"] = torch.randint(N + 1, (B,), generator=g)
    given["rows"] = torch.full((R, 4 + sums + gated), -1)
    return given


def literal(mask, replaced, timesteps, sizes, rows, cells, written, sums=None, gated=None):
    """Row by row and cell by cell, into copies."""
    rows, cells, written = rows.clone(), cells.clone(), written.clone()
    for b in range(mask.shape[0]):
        (bits,) = struct.unpack("i", struct.pack("f", float(timesteps[b])))
        values = [int(mask[b].sum()), int(replaced[b].sum()), bits, sizes]
        if sums is not None:
            values.append(sum(not math.isfinite(value) for value in sums[b].tolist()))
        if gated is not None:
            values.append(int(gated[b]))
        rows[(int(written[0]) + b) % len(rows)] = torch.tensor(values)
    if len(cells):
        for i, (m, r) in enumerate(zip(mask.flatten().tolist(), replaced.flatten().tolist(), strict=True)):
            cells[(int(written[1]) + i) % len(cells)] = m + 2 * r
        written[1] += mask.numel()
    written[0] += mask.shape[0]
    return rows, cells, written


ROWS = [
    pytest.param({}, id="plain"),
    pytest.param({"C": 500}, id="cells"),
    pytest.param({"rows_before": 7, "C": 90, "cells_before": 61}, id="both-rings-wrap"),
    pytest.param({"rows_before": 2**40 + 3, "C": 90, "cells_before": 2**40 + 61}, id="long-running"),
    pytest.param({"rows_before": -5, "C": 90, "cells_before": -(2**40)}, id="negative-counters"),
    pytest.param({"rows_before": 2**63 - 9, "C": 90, "cells_before": 2**63 - 99}, id="the-last-that-fit"),
    pytest.param({"B": 5, "R": 3}, id="more-rows-than-fit"),
    pytest.param({"B": 3, "C": 50, "cells_before": 13}, id="more-cells-than-fit"),
    pytest.param({"B": 1, "N": 1, "R": 1, "C": 1}, id="one-of-everything"),
    pytest.param({"B": 2, "N": 2500, "C": 6000}, id="several-blocks-a-row"),
    pytest.param({"B": 0, "C": 10}, id="no-image"),
    pytest.param({"sums": True, "R": 3, "B": 5}, id="sums"),
    pytest.param({"sums": True, "N": 2500, "C": 6000}, id="sums-several-blocks"),
    pytest.param({"gated": True, "R": 3, "B": 5}, id="gated"),
    pytest.param({"gated": True, "sums": True, "rows_before": 7, "C": 90}, id="gated-and-sums"),
    pytest.param({"gated": True, "B": 1, "N": 1, "R": 1}, id="gated-one-of-everything"),
]


@every_backend
@pytest.mark.parametrize("sizes", ROWS)
def test_equals_the_loop(sizes, backend):
    if backend == "cpp" and DEVICE.type != "cpu":
        pytest.skip("the C++ version takes CPU tensors")
    arguments = inputs(**sizes)
    given = on_device({name: v.clone() if torch.is_tensor(v) else v for name, v in arguments.items()})
    assert ops.record_patches(**given, backend=backend) is None
    for name, expected in zip(("rows", "cells", "written"), literal(**arguments), strict=True):
        assert torch.equal(given[name].cpu(), expected), name


@every_backend
def test_strided_masks_and_expanded_timesteps(backend):
    if backend == "cpp" and DEVICE.type != "cpu":
        pytest.skip("the C++ version takes CPU tensors")
    arguments = inputs(C=100, sums=True, gated=True)
    arguments["gated"] = torch.stack([arguments["gated"]] * 2, dim=1)[:, 0]
    for name in ("mask", "replaced", "sums"):
        arguments[name] = arguments[name].t().contiguous().t()
    arguments["timesteps"] = torch.tensor([501.5]).expand(2)
    expected = literal(**arguments)
    given = on_device(arguments)
    ops.record_patches(**given, backend=backend)
    for name, wanted in zip(("rows", "cells", "written"), expected, strict=True):
        assert torch.equal(given[name].cpu(), wanted), name


BAD = [
    pytest.param({"mask": torch.zeros(70).bool()}, ValueError, r"mask: expected \[B, N\]", id="mask-1d"),
    pytest.param({"mask": torch.zeros(2, 35)}, TypeError, "mask: expected dtype bool", id="mask-dtype"),
    pytest.param({"replaced": torch.zeros(2, 34).bool()}, ValueError, "replaced: ", id="replaced-shape"),
    pytest.param(
        {"timesteps": torch.zeros(2).double()}, TypeError, "timesteps: .* float32", id="times-dtype"
    ),
    pytest.param({"timesteps": torch.zeros(3)}, ValueError, "timesteps: ", id="times-shape"),
    pytest.param({"rows": torch.zeros(0, 4).long()}, ValueError, r"rows: expected \[R >= 1", id="no-row"),
    pytest.param({"rows": torch.zeros(8, 5).long()}, ValueError, r"rows: expected \[R", id="columns"),
    pytest.param({"rows": torch.zeros(4, 8).long().t()}, ValueError, "rows: .*contiguous", id="strided-rows"),
    pytest.param({"cells": torch.zeros(4, 4).byte()}, ValueError, r"cells: expected \[C\]", id="cells-2d"),
    pytest.param({"written": torch.zeros(2)}, TypeError, "written: expected dtype int64", id="written-dtype"),
    pytest.param({"rows": torch.zeros(8, 4)}, TypeError, "rows: expected dtype int64", id="rows-dtype"),
    pytest.param({"sums": torch.zeros(2, 35)}, ValueError, r"rows: expected \[R >= 1, 5", id="sums-rows"),
    pytest.param(
        {"sums": torch.zeros(2, 34), "rows": torch.zeros(8, 5).long()},
        ValueError,
        "sums: expected",
        id="sums",
    ),
    pytest.param(
        {"gated": torch.zeros(2).long()}, ValueError, r"rows: expected \[R >= 1, 5", id="gated-rows"
    ),
    pytest.param(
        {"gated": torch.zeros(2), "rows": torch.zeros(8, 5).long()},
        TypeError,
        "gated: .*int64",
        id="gated-dtype",
    ),
    pytest.param(
        {"gated": torch.zeros(3).long(), "rows": torch.zeros(8, 5).long()},
        ValueError,
        "gated: ",
        id="gated-shape",
    ),
    pytest.param({"sizes": -1}, ValueError, r"sizes: expected 0 <= sizes < 2\*\*63, got -1", id="sizes"),
    pytest.param(
        {"cells": torch.zeros(0, device="meta").byte()},
        ValueError,
        "cells: expected on cpu like mask",
        id="device",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_arguments(change, error, message):
    arguments = {**inputs(), **change}
    before = arguments["written"].clone()
    with pytest.raises(error, match=message):
        ops.record_patches(**arguments)
    assert torch.equal(arguments["written"], before)


@every_backend
def test_opcheck_and_fullgraph(backend):
    if backend == "cpp" and DEVICE.type != "cpu":
        pytest.skip("the C++ version takes CPU tensors")
    given = tuple(on_device(inputs(C=100, sums=True, gated=True)).values())
    torch.library.opcheck(torch.ops.lbdt.record_patches.default, given, {"backend": backend})
    mask, replaced, times, sizes, *buffers = on_device(inputs(C=100)).values()
    expected = literal(
        *(v.cpu() if torch.is_tensor(v) else v for v in (mask, replaced, times, sizes, *buffers))
    )

    @torch.compile(fullgraph=True, backend="aot_eager")
    def record(mask, replaced):
        ops.record_patches(~mask, replaced, times, sizes, *buffers, backend=backend)
        return ~mask

    record(~mask, replaced)
    for got, wanted in zip(buffers, expected, strict=True):
        assert torch.equal(got.cpu(), wanted)
