"""record_patches and its baselines under pytest-benchmark: `pytest benchmarks`."""

import pytest

from benchmarks.timed import time_version
from lbdt.bench.cases import Spec


@pytest.mark.parametrize("version", ["ours", "literal", "compiled"])
@pytest.mark.parametrize("shape", ["sd15-b1", "sd15-b8"])
def test_record_patches(benchmark, shape, version):
    time_version(benchmark, Spec("record_patches", shape, None, "", "float32"), version)
