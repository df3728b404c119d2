"""A call of the hooked block, by hook, under pytest-benchmark: `pytest benchmarks`. "bare" is the block
without one."""

import pytest

from benchmarks.timed import time_version
from lbdt.bench.cases import Spec


@pytest.mark.parametrize("version", ["ours", "published", "compiled", "bare"])
@pytest.mark.parametrize("share", [0.0, 0.1, 1.0], ids=lambda share: f"{share:.0%}")
@pytest.mark.parametrize("shape", ["sd15-b1", "canvas"])
def test_hook(benchmark, shape, share, version):
    time_version(benchmark, Spec("hook", shape, share, "", "float32"), version)
