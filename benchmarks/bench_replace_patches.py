"""replace_patches_ by backend, layout, source and patches to avoid under pytest-benchmark: `pytest benchmarks`."""

import pytest

from benchmarks.timed import time_version
from lbdt.bench.cases import Spec
from lbdt.donors import SOURCES

_ROWS = [
    (f"{layout}, {source}", version)
    for layout in ("NCHW", "channels_last")
    for source in (*SOURCES, "nearest, avoid")
    for version in ("ours", "reference", *(["published"] * (source == "random")))
]


@pytest.mark.parametrize(("variant", "version"), _ROWS)
@pytest.mark.parametrize("shape", ["sd15-b1", "canvas"])
def test_replace_patches(benchmark, shape, variant, version):
    time_version(benchmark, Spec("replace_patches_", shape, 0.1, variant, "float32"), version)
