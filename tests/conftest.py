"""Shared by all tests: what torch.empty returns is poisoned, so no test passes on leftover memory."""

import gc
import os
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests import fuzzing, interpreter
from tests.backends import HAS_TRITON
from tests.longest import LONGEST
from tests.misaligned import products
from tests.repeats import MISALIGNED

# Read when triton is imported: without a GPU its kernels run in the interpreter.
if os.environ.get("LBDT_TEST_DEVICE", "cpu") == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")
if HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1":
    interpreter.quicken()

# A shell has what it starts with `&` ignore interruptions, and so what that starts, which a test may interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Kept: the kernels leave with it.
PRODUCTS = products.install() if MISALIGNED else None

# Imports and made-up tests leave a million objects for good: Python's collector, which would look through them again
# and again, waits until they are there, passes over them from then on, and comes less often.
gc.disable()

settings.register_profile("lbdt", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("lbdt")


def pytest_addoption(parser):
    parser.addoption(
        "--fuzz-cases", type=int, default=fuzzing.CASES, metavar="N", help="cases of each fuzz target"
    )


def pytest_configure(config):
    # Before any test module is imported, as its targets are made then. Workers of xdist share one seed.
    given = getattr(config, "workerinput", {}).get("fuzz_seed") or config.getoption("--hypothesis-seed")
    if hasattr(
        config.option, "loadscopereorder"
    ):  # by the number of their tests, which tells nothing of the time
        config.option.loadscopereorder = False
    config.fuzz_line = fuzzing.choose(config.getoption("--fuzz-cases"), given)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    if "PYTEST_XDIST_WORKER" in os.environ:
        tests = Path(__file__).parent
        place = {tests / name: number for number, name in enumerate(LONGEST)}
        items.sort(key=lambda item: place.get(item.path, len(place)))


def pytest_collection_finish(session):
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    gc.enable()


def pytest_unconfigure(config):
    gc.unfreeze()  # or libraries report at the end that what they made was never freed


def pytest_report_header(config):
    return config.fuzz_line


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    node.workerinput["fuzz_seed"] = str(fuzzing.chosen_seed())


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
