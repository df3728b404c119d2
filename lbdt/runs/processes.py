"""The processes of a command that `accelerate launch` or torchrun started (or the only one), and each one's device."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

# The others wait while the first process evaluates and writes, however long it takes.
_PATIENCE = datetime.timedelta(days=365)
_ANY = ("auto", "cuda")
_PR_SET_PDEATHSIG = 1
_POLL_SECONDS = 0.2
_LAST_WORD_SECONDS = 10.0
_T = TypeVar("_T")


@dataclass(frozen=True)
class Processes:
    """Process `rank` of `size`. Sums are over all processes, in the same order on each, so all see the same bits."""

    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def part(self, count: int) -> slice:
        """This process's share of `count` rows or samples, contiguous."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def sum_(self, tensor: Tensor) -> Tensor:
        """`tensor` summed over the processes, in place."""
        if self.size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def gather(self, part: Tensor, count: int) -> Tensor:
        """The parts [P, ...] of all processes, [count, ...]; differentiable in this process's own."""
        if self.size == 1:
            return part
        own = self.part(count)
        whole = part.new_zeros(count, *part.shape[1:])
        whole[own] = part.detach()
        self.sum_(whole)
        return torch.cat([whole[: own.start], part, whole[own.stop :]])

    def same_(self, tensors: Iterable[Tensor]) -> None:
        """Overwrites tensors by those of the first process."""
        if self.size > 1:
            for tensor in tensors:
                torch.distributed.broadcast(tensor, 0)

    def wait(self) -> None:
        """Waits until all processes are here."""
        if self.size > 1:
            torch.distributed.barrier()


def launched() -> Processes:
    """This process among those that `accelerate launch` or torchrun started (one where none did), by what they set in
    the environment; no process group is made, so only `rank`, `size`, `main` and `part` are of use."""
    rank, size = (int(os.environ.get(name) or default) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    return Processes(rank, size) if size > 1 else Processes()


@contextlib.contextmanager
def joined(device: Callable[[], torch.device], auto: bool) -> Iterator[tuple[Processes, torch.device]]:
    """The processes that `accelerate launch` or torchrun started (one where none did), and this one's device.

    `device()` is the one asked for; `auto`: any CUDA device of it will do, so each process takes its own. The process
    group is made by accelerate: gloo on CPUs, NCCL on CUDA.
    """
    if launched().size == 1:
        yield Processes(), device()
        return
    # Default arguments there keep the group of the moment of its import, which the first optimizer brings about: the
    # group would outlive its end, and its threads, still running, might abort the process at the interpreter's.
    import torch.distributed.nn.functional  # noqa: F401
    from accelerate import PartialState

    state = PartialState(cpu=device().type == "cpu", timeout=_PATIENCE)
    try:
        where = state.device if auto else device()
        yield Processes(state.process_index, state.num_processes), where
    finally:
        state.destroy_process_group()


def awaited(look: Callable[[], _T | None], tell: str = "") -> _T:
    """What `look` finds, once it finds something: it is asked every 0.2 s, and `tell` goes to stderr if it waits."""
    while (found := look()) is None:
        if tell:
            sys.stderr.write(f"{tell}\n")
            tell = ""
        time.sleep(_POLL_SECONDS)
    return found


def spawn(count: int, work: Callable[..., object], *arguments: Any) -> None:
    """Calls `work(*arguments)`, which are pickled, in `count` new processes that are started as torchrun would start
    them, and returns when all are done. They end with this process, however it ends (Linux).

    Raises:
        RuntimeError: what went wrong in one of them, or that one was ended.
    """
    from torch import multiprocessing

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    try:
        multiprocessing.start_processes(
            _spawned,
            (os.getpid(), count, port, work, arguments),
            nprocs=count,
            # Or an interrupted parent would wait for the others at its end.
            daemon=True,
            start_method="spawn",
        )
    except multiprocessing.ProcessRaisedException as error:
        # The child's traceback is in its text; its last line is what went wrong.
        raise RuntimeError(str(error).strip().splitlines()[-1].partition(": ")[2] or str(error)) from error
    except multiprocessing.ProcessExitedException as error:
        raise RuntimeError(
            f"a process was ended ({error}); is there too little memory for {count}? The same command goes "
            "on, also with fewer --processes"
        ) from error


def _spawned(
    rank: int, parent: int, count: int, port: int, work: Callable[..., object], arguments: Sequence[Any]
) -> None:
    end_with(parent)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    try:
        work(*arguments)
    except RuntimeError as error:
        if "/gloo/" in str(error) or isinstance(error, torch.distributed.DistError):
            # Another process is about to end, and only it knows why: the parent has to hear that first.
            time.sleep(_LAST_WORD_SECONDS)
        raise


def end_with(parent: int) -> None:
    """Ends this process as soon as `parent`, the id of the one that started it, has ended in whatever way (Linux)."""
    # Not SIGINT, which what a shell runs in the background ignores, and with it what that starts.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before
        os._exit(1)


def joined_on(device: str) -> contextlib.AbstractContextManager[tuple[Processes, torch.device]]:
    """The processes that `accelerate launch` or torchrun started, as one group, and this one's device: for "auto" and
    "cuda" a CUDA device of its own."""
    return joined(lambda: usable_device(device), device in _ANY)


def launched_on(device: str) -> tuple[Processes, torch.device]:
    """The same without a group, for processes that meet by files."""
    world = launched()
    if world.size > 1 and device in _ANY and torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK') or world.rank}"
    return world, usable_device(device)


def usable_device(name: str) -> torch.device:
    """The device of this name; "auto": CUDA where there is one. ValueError where it is not usable here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.type == "meta":
            raise NotImplementedError("its tensors have no values")
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(
            f"--device {name}: not usable here ({first}); `lbdt env` lists the devices"
        ) from error
    return device
