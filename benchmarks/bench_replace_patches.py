"""replace_patches_, C++ and reference, under pytest-benchmark: `pytest benchmarks`."""

import pytest
import torch

from benchmarks import shapes
from lbdt import ops

LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("source", ["random", "nearest", "mean"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", shapes.SHAPES)
def test_replace_patches(benchmark, name, layout, source, backend):
    arguments = shapes.replacement(shapes.SHAPES[name], 0.05, LAYOUTS[layout])
    arguments |= {"padding": 1, "source": source}
    expected, where = ops.replace_patches(**arguments, backend="reference")
    assert where.any() and not where.all()
    benchmark.group = f"replace_patches_, {name}, {layout}, {source}"
    # In place: what a second round writes is what the first one wrote, as donors are never overwritten.
    benchmark.pedantic(
        ops.replace_patches_,
        kwargs={**arguments, "backend": backend},
        rounds=20,
        iterations=5,
        warmup_rounds=2,
    )
    assert torch.equal(arguments["x"], expected)
