"""What a step of `erase_step` costs on a device, as far as that can be told without one: its launches, by recorders in
the kernels' places and torch's own ops counted, none of which may wait for the device. Times need a GPU."""

import ctypes
import importlib
import sys
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lbdt.donors import SOURCES
from tests.backends import DEVICE, HAS_TRITON
from tests.ops.test_erase_step import inputs

pytestmark = [
    pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed"),
    pytest.mark.skipif(DEVICE.type != "cpu", reason="the recorders stand for kernels on the CPU"),
]
# They say where memory is, and start nothing on a device.
FREE = {
    *("aten.empty.memory_format", "aten.empty_like.default", "aten.unbind.int", "aten.view.dtype"),
    *("aten.expand.default", "aten.detach.default"),
}


class Counting(TorchDispatchMode):
    """Counts torch's ops that a device would be given."""

    def __init__(self, counts):
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func) not in FREE:
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


class Recording:
    """Stands for a kernel, counts its launches, and does nothing."""

    def __init__(self, name, counts):
        self.name, self.counts = name, counts

    def __getitem__(self, grid):
        assert all(isinstance(size, int) and size > 0 for size in grid), grid
        return lambda *args, **kwargs: self.counts.update([self.name])


@pytest.fixture
def launched(monkeypatch):
    """The launches of a call by name, where nothing that a kernel would have written is there but zeros."""
    counts = Counter()
    module = importlib.import_module("lbdt.kernels.erase_step")
    for place in [m for path, m in sys.modules.items() if path.startswith("lbdt.kernels.")]:
        for name in [name for name in vars(place) if name.endswith("_kernel")]:
            monkeypatch.setattr(place, name, Recording(name, counts))
    empty = torch.empty

    def cleared(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        ctypes.memset(tensor.data_ptr(), 0, tensor.nbytes)
        return tensor

    monkeypatch.setattr(torch, "empty", cleared)

    def replace(x, mask, u, height, width, padding, source, bank, avoid):
        assert source in SOURCES and u.is_contiguous() and mask.is_contiguous()
        assert bank is None or bank.shape[0] == x.shape[0]
        counts.update(["replace"])
        return torch.empty_like(x), mask

    def run(**given):
        arguments = inputs(**given)
        defaults = importlib.import_module("lbdt.ops.erase_step")._DEFAULTS[:-1]  # it takes no order
        names = list(module.erase_step.__annotations__)
        assert names[-2:] == ["replace", "return"]
        optional = dict(zip(names[-2 - len(defaults) : -2], defaults, strict=True))
        with Counting(counts):
            module.erase_step(**(optional | arguments), replace=replace)
        return dict(counts)

    return run


DETECTION = {"detect_patches_candidates_kernel": 1, "detect_patches_count_kernel": 1, "aten.zeros.default": 1}
PLAIN = DETECTION | {"erase_step_rows_kernel": 1, "record_patches_kernel": 1, "replace": 1}
GATED = PLAIN | {"detect_patches_gate_kernel": 1}
ROWS = [
    pytest.param({}, PLAIN, id="plain"),
    pytest.param({"minus": True, "padding": 3, "source": "mean", "C_kept": 90}, PLAIN, id="update-masks"),
    pytest.param(
        {"schedule": torch.arange(9).half(), "last": 4, "counted": 2, "enabled": torch.eye(2, 5).bool()},
        PLAIN,
        id="window-branch-sets",
    ),
    pytest.param({"timesteps": torch.tensor(1).expand(4), "dtype": torch.float16}, PLAIN, id="expanded"),
    pytest.param({"bank": True}, PLAIN | {"aten.index_select.default": 1}, id="bank"),
    pytest.param(
        {"known": True},
        PLAIN | {name: 2 * count for name, count in DETECTION.items()} | {"aten.any.dim": 1},
        id="known",
    ),
    pytest.param({"gate": "call", "cond": 1}, GATED, id="gate"),
    pytest.param({"gate": "run"}, GATED | {"erase_step_keep_kernel": 1}, id="gate-over-a-run"),
]


@pytest.mark.parametrize(("given", "expected"), ROWS)
def test_a_step_is_a_handful_of_launches(given, expected, launched):
    assert launched(**given) == expected
