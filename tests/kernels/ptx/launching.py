"""Ops as their Triton kernels: recorded, and compiled for the machine."""

import functools
import importlib
import math
from pathlib import Path

import torch
import triton
from triton.backends.nvidia.compiler import CUDABackend

from tests.kernels.launches import compile_launch, record
from tests.kernels.ptx.cases import Case
from tests.kernels.ptx.memory import GlobalMemory
from tests.kernels.ptx.running import Ready, Runnable, distinct, tensors_of

# Machine code is not asked for here, so what is compiled goes where no launch will look.
CUDABackend.make_cubin = lambda *args, **kwargs: b""
triton.knobs.cache.dir = str(Path(triton.knobs.cache.dir) / "without-machine-code")

VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
COPIES_NEED_FENCE = VERSION >= (3, 9)
"""Triton 3.6 puts no proxy fence between cp.async and wgmma: for it the copies are taken as visible to the products, as
they have been on every device that its kernels ran on."""


class Compiled(Runnable):
    """A case for sm_`arch`."""

    def __init__(self, case: Case, arch: int) -> None:
        arguments = case.inputs()
        expected = _reference(case, arguments)
        with _Poisoned():
            launches, result = record(case.op, arch, **arguments)
        outputs = tensors_of([result, arguments])
        compiled = []
        for launch in launches:
            kernel, passed = compile_launch(launch, arch)
            compiled.append((launch, kernel, [*passed, *_scratch(kernel.metadata, launch.grid)]))
        tensors = [v for _, _, passed in compiled for v in passed if isinstance(v, torch.Tensor)]
        memory = GlobalMemory(distinct([*tensors, *outputs]))
        launches = [
            Ready(
                launch.name,
                kernel.asm["ptx"],
                kernel.metadata.shared,
                launch.grid,
                [memory.address(v) if isinstance(v, torch.Tensor) else int(v) for v in passed],
                memory,
                COPIES_NEED_FENCE,
            )
            for launch, kernel, passed in compiled
        ]
        super().__init__(launches, memory, outputs, expected)


def _reference(case: Case, arguments: dict) -> list[torch.Tensor]:
    """What the op returns, and what it makes of its arguments."""
    cloned = {
        name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()
    }
    if case.expected is not None:
        return tensors_of([case.expected(cloned), cloned])
    reference = getattr(importlib.import_module(f"lbdt.reference.{case.op}"), case.op)
    return tensors_of([reference(**cloned), cloned])


def _scratch(metadata, grid: tuple[int, ...]) -> list[torch.Tensor]:
    """Global memory that the kernel has for itself, for tensor maps; the parameter that follows its own."""
    size = metadata.global_scratch_size * math.prod(grid)
    if not size:
        return []
    whole = torch.zeros(size + 256, dtype=torch.uint8)
    begin = -whole.data_ptr() % 256
    return [whole[begin : begin + size]]


class _Poisoned:
    """While it is entered torch.empty and torch.empty_like return NaN, or the largest integers."""

    def __enter__(self) -> None:
        self._original = {name: getattr(torch, name) for name in ("empty", "empty_like")}
        for name, function in self._original.items():
            setattr(torch, name, functools.partial(_filled, function))

    def __exit__(self, *exception) -> None:
        for name, function in self._original.items():
            setattr(torch, name, function)


def _filled(function, *args, **kwargs) -> torch.Tensor:
    tensor = function(*args, **kwargs)
    if tensor.dtype == torch.bool:
        return tensor.fill_(True)
    return tensor.fill_(torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)
