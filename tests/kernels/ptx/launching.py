"""Ops as their compiled kernels: recorded, compiled, and run in the machine launch by launch."""

import functools
import importlib
import math
from pathlib import Path

import torch
import triton
from triton.backends.nvidia.compiler import CUDABackend

from tests.kernels.launches import compile_launch, record
from tests.kernels.ptx.cases import Case
from tests.kernels.ptx.instructions import prepare
from tests.kernels.ptx.machine import Launch, Step
from tests.kernels.ptx.memory import GlobalMemory
from tests.kernels.ptx.parsing import Program

# Machine code is not asked for here, so what is compiled goes where no launch will look.
CUDABackend.make_cubin = lambda *args, **kwargs: b""
triton.knobs.cache.dir = str(Path(triton.knobs.cache.dir) / "without-machine-code")

VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
COPIES_NEED_FENCE = VERSION >= (3, 9)
"""Triton 3.6 puts no proxy fence between cp.async and wgmma: for it the copies are taken as visible to the products, as
they have been on every device that its kernels ran on."""


@functools.cache
def _prepared(ptx: str) -> tuple[Program, list[Step]]:
    """The same code is that of several cases."""
    program = Program(ptx)
    return program, prepare(program)


class Ready:
    """One launch: its program, its grid and its arguments in the machine's memory."""

    def __init__(self, name: str, ptx: str, shared: int, grid, values: list, memory: GlobalMemory) -> None:
        self.name, self.grid, self.memory, self._shared = name, grid, memory, shared
        self.program, self.steps = _prepared(ptx)
        self._arguments = [
            memory.address(value) if isinstance(value, torch.Tensor) else int(value) for value in values
        ]

    def run(self, seed: int = 0, steps=None, journal: list | None = None) -> Launch:
        """Runs it on the memory as it is. `steps`: in place of the program's own."""
        launch = Launch(
            self.program,
            self.steps if steps is None else steps,
            self.grid,
            self._shared,
            self._arguments,
            self.memory,
            seed,
            COPIES_NEED_FENCE,
            journal,
        )
        launch.run()
        return launch


class Compiled:
    """A case for sm_`arch`: `run`, then `wrong`."""

    def __init__(self, case: Case, arch: int) -> None:
        arguments = case.inputs()
        self._expected = _reference(case, arguments)
        with _Poisoned():
            launches, result = record(case.op, arch, **arguments)
        self._outputs = _tensors([result, arguments])
        compiled = []
        for launch in launches:
            kernel, passed = compile_launch(launch, arch)
            compiled.append((launch, kernel, [*passed, *_scratch(kernel.metadata, launch.grid)]))
        tensors = [v for _, _, passed in compiled for v in passed if isinstance(v, torch.Tensor)]
        self.memory = GlobalMemory([*_distinct([*tensors, *self._outputs])])
        self.launches = [
            Ready(launch.name, kernel.asm["ptx"], kernel.metadata.shared, launch.grid, passed, self.memory)
            for launch, kernel, passed in compiled
        ]
        self._begin = self.memory.bytes.copy()

    def restart(self) -> None:
        """The memory as it was before the first launch."""
        self.memory.bytes[:] = self._begin

    def wrong(self) -> str | None:
        """What differs from the reference in the memory as it is; None: nothing."""
        self.memory.copy_back()
        for place, (got, expected) in enumerate(zip(self._outputs, self._expected, strict=True)):
            same = (got == expected) | ((got != got) & (expected != expected))
            if not same.all():
                differ = f"{int((~same).sum())} of {same.numel()} values"
                return f"{differ} of tensor {place} of the op's results and arguments"
        return None

    def first_result(self) -> torch.Tensor:
        """The first tensor that the op returns, or takes where it returns none."""
        return self._outputs[0]

    def run(self, seed: int = 0) -> list[Launch]:
        """Runs all launches from the begin."""
        self.restart()
        return [ready.run(seed + place) for place, ready in enumerate(self.launches)]


def _reference(case: Case, arguments: dict) -> list[torch.Tensor]:
    """What the op returns, and what it makes of its arguments."""
    cloned = {
        name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()
    }
    if case.expected is not None:
        return _tensors([case.expected(cloned), cloned])
    reference = getattr(importlib.import_module(f"lbdt.reference.{case.op}"), case.op)
    return _tensors([reference(**cloned), cloned])


def _scratch(metadata, grid: tuple[int, ...]) -> list[torch.Tensor]:
    """Global memory that the kernel has for itself, for tensor maps; the parameter that follows its own."""
    size = metadata.global_scratch_size * math.prod(grid)
    if not size:
        return []
    whole = torch.zeros(size + 256, dtype=torch.uint8)
    begin = -whole.data_ptr() % 256
    return [whole[begin : begin + size]]


def _tensors(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    return [t for member in value or () for t in _tensors(member)] if not isinstance(value, int) else []


def _distinct(tensors: list[torch.Tensor]):
    """Tensors that differ in where they lie or how; bool as bytes."""
    seen = {}
    for tensor in tensors:
        if tensor.dtype == torch.bool:
            tensor = tensor.view(torch.uint8)
        seen.setdefault((tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()), tensor)
    return seen.values()


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
