"""Shared by all tests: what torch.empty returns is poisoned, so no test passes on leftover memory."""

import pytest
import torch
from hypothesis import settings

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
