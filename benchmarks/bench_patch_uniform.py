"""patch_uniform and its baselines under pytest-benchmark: `pytest benchmarks`."""

import pytest

from benchmarks.timed import time_version
from lbdt.bench.cases import Spec


@pytest.mark.parametrize("version", ["ours", "literal", "compiled", "rand"])
@pytest.mark.parametrize("shape", ["sd15-b1", "sd15-b8", "canvas"])
def test_patch_uniform(benchmark, shape, version):
    time_version(benchmark, Spec("patch_uniform", shape, None, "", "float32"), version)
