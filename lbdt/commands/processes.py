"""The processes of a command that `accelerate launch` or torchrun started, and each one's `--device`."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal

import torch

from lbdt.commands.device import usable_device
from lbdt.training.world import World, joined, launched

_ANY = ("auto", "cuda")
_PR_SET_PDEATHSIG = 1


def end_with(parent: int) -> None:
    """Ends this process as soon as `parent`, the id of the one that started it, has ended in whatever way (Linux)."""
    # Not SIGINT, which what a shell runs in the background ignores, and with it what that starts.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before
        os._exit(1)


def joined_on(device: str) -> contextlib.AbstractContextManager[tuple[World, torch.device]]:
    """The processes that `accelerate launch` or torchrun started, as one group, and this one's device: for "auto" and
    "cuda" a CUDA device of its own."""
    return joined(lambda: usable_device(device), device in _ANY)


def launched_on(device: str) -> tuple[World, torch.device]:
    """The same without a group, for processes that meet by files."""
    world = launched()
    if world.size > 1 and device in _ANY and torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK') or world.rank}"
    return world, usable_device(device)
