"""The mode of `.ci/test --misaligned` itself: tensors lie everywhere, products tell, and nothing else does."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CODE = """
import torch
from lbdt.testing import assert_close
from tests.misaligned import products

kept = products.install()
torch.manual_seed(0)  # a sum near zero would have a large relative error
sizes = (3, 1000, 500_000)
print(*({torch.ones(n).data_ptr() % 64 for _ in range(64)} == {0, 16, 32, 48} for n in sizes))
x, w, many = torch.randn(37, 65), torch.randn(65, 51), torch.randn(2, 2, 9, 9)


def results(product, times=30):
    return len({tuple(product().flatten().tolist()) for _ in range(times)})


print(
    results(lambda: x.clone() @ w) > 1,
    results(lambda: x.double() @ w.double()) > 1,
    results(lambda: torch.mv(x.clone(), w[:, 0])) > 1,
    results(lambda: torch.nn.functional.linear(x.clone(), w.T, w[0])) > 1,
    results(lambda: torch.bmm(x.clone()[None], w[None])) > 1,
    results(lambda: torch.nn.functional.conv2d(many.clone(), many[:, :, :3, :3])) > 1,
    results(lambda: x.clone().round() @ w.clone().round()) == 1,
    results(lambda: x.clone().exp().sum()) == 1,
)
weight = w.clone().requires_grad_()
((x.clone() @ weight).sum() ** 2).backward()
expected = 2 * (x.double() @ w.double()).sum() * x.double().sum(0)
assert_close(weight.grad, expected[:, None].expand(-1, 51), "repeated")
"""


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
def test_products_depend_on_where_tensors_lie(tmp_path):
    shim = tmp_path / "shim.so"
    flags = ["-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run(["cc", *flags, "-o", shim, HERE / "allocator.c"], check=True)
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        capture_output=True,
        text=True,
        cwd=HERE.parents[1],
        env=os.environ | {"LD_PRELOAD": str(shim), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == {"True"}, done.stdout
