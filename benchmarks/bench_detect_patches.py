"""detect_patches and its baselines under pytest-benchmark: `pytest benchmarks`."""

import pytest

from benchmarks.timed import time_version
from lbdt.bench.cases import OUTSIDE, Spec


@pytest.mark.parametrize("version", ["ours", "literal", "compiled"])
@pytest.mark.parametrize(
    ("share", "variant"),
    [(0.0, ""), (0.1, ""), (1.0, ""), (1.0, OUTSIDE)],
    ids=["0%", "10%", "100%", "outside"],
)
@pytest.mark.parametrize("shape", ["sd15-b1", "canvas"])
def test_detect_patches(benchmark, shape, share, variant, version):
    time_version(benchmark, Spec("detect_patches", shape, share, variant, "float32"), version)
