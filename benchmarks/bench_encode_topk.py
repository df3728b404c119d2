"""encode_topk and its baselines under pytest-benchmark: `pytest benchmarks`."""

import pytest

from benchmarks.timed import time_version
from lbdt.bench.cases import Spec


@pytest.mark.parametrize("version", ["ours", "literal", "compiled"])
@pytest.mark.parametrize("shape", ["sd15-b1", "sdxl-turbo", "canvas"])
def test_encode_topk(benchmark, shape, version):
    time_version(benchmark, Spec("encode_topk", shape, None, "", "float32"), version)
