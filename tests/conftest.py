"""Shared by all tests: what torch.empty returns is poisoned, so no test passes on leftover memory."""

import os

import pytest
import torch
from hypothesis import settings

# Read when triton is imported: without a GPU its kernels run in the interpreter.
if os.environ.get("LBDT_TEST_DEVICE", "cpu") == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile("lbdt", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("lbdt")


@pytest.fixture
def poisoned(monkeypatch):
    """`torch.empty` and its kin filled with NaN (largest value for integers, True for bool)."""
    for name in ("empty", "empty_like"):
        original = getattr(torch, name)

        def filled(*args, _original=original, **kwargs):
            tensor = _original(*args, **kwargs)
            if tensor.is_floating_point():
                return tensor.fill_(float("nan"))
            if tensor.dtype == torch.bool:
                return tensor.fill_(True)
            return tensor.fill_(torch.iinfo(tensor.dtype).max)

        monkeypatch.setattr(torch, name, filled)
