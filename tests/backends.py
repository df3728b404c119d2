"""The backends that the tests of an op run, on the device named by LBDT_TEST_DEVICE (default: cpu).

On the CPU the Triton kernels run in Triton's interpreter, which tests/conftest.py switches on.
"""

import importlib.util
import os
import shutil

import pytest
import torch

from lbdt import _build

DEVICE = torch.device(os.environ.get("LBDT_TEST_DEVICE", "cpu"))
HAS_CPP = (
    bool(os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++"))
    or (_build._PACKAGE / _build.LIBRARY).exists()
)
HAS_TRITON = importlib.util.find_spec("triton") is not None

_MARKS = {
    "cpp": pytest.mark.skipif(not HAS_CPP, reason="no C++ compiler"),
    "triton": pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed"),
}


def every_backend(*names: str):
    """Parametrizes `backend` over the reference and the named ones."""
    return pytest.mark.parametrize(
        "backend",
        ["reference", *(pytest.param(name, marks=_MARKS[name], id=name) for name in names)],
    )


def internal(op: str):
    """The internal C++ op of this name, past the wrappers that check and load the library."""
    assert _build.missing(op, "cpu") is None
    return getattr(torch.ops.lbdt, op)


def on_device(arguments: dict) -> dict:
    """The arguments of an op with their tensors on the tested device."""
    return {n: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}
