"""Launches made ready for the machine, whichever compiler made their PTX, and what their op was to give."""

import functools

import torch

from tests.kernels.ptx.instructions import prepare
from tests.kernels.ptx.machine import Launch, Step
from tests.kernels.ptx.memory import GlobalMemory
from tests.kernels.ptx.parsing import Program


@functools.cache
def prepared(ptx: str) -> tuple[Program, list[Step]]:
    """A kernel; the same code is that of several cases."""
    program = Program(ptx)
    return program, prepare(program)


class Ready:
    """One launch: its program, its grid and its arguments in the machine's memory.

    `shared`: the bytes of shared memory that the launch asks for. `arguments`: as `memory.parameters` takes them.
    """

    def __init__(
        self,
        name: str,
        ptx: str,
        shared: int,
        grid: tuple[int, ...],
        arguments: list[int | bytes],
        memory: GlobalMemory,
        copies_need_fence: bool = True,
    ) -> None:
        self.name, self.grid, self.memory, self._shared = name, grid, memory, shared
        self.program, self.steps = prepared(ptx)
        self.copies_need_fence, self._arguments = copies_need_fence, arguments

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
            self.copies_need_fence,
            journal,
        )
        launch.run()
        return launch


class Runnable:
    """An op's launches on one memory: `run`, then `wrong`.

    `outputs`: what the op returns, and the arguments that it may have changed; `expected`: the same of the reference.
    `same`: whether two tensors agree, value by value.
    """

    def __init__(self, launches: list[Ready], memory: GlobalMemory, outputs: list, expected: list) -> None:
        self.launches, self.memory = launches, memory
        self._outputs, self._expected = outputs, expected
        self._begin = memory.bytes.copy()

    def restart(self) -> None:
        """The memory as it was before the first launch."""
        self.memory.bytes[:] = self._begin

    def wrong(self) -> str | None:
        """What differs from the reference in the memory as it is; None: nothing."""
        self.memory.copy_back()
        for place, (got, expected) in enumerate(zip(self._outputs, self._expected, strict=True)):
            same = self.same(got, expected)
            if not same.all():
                differ = f"{int((~same).sum())} of {same.numel()} values"
                return f"{differ} of tensor {place} of the op's results and arguments"
        return None

    @staticmethod
    def same(got: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
        """Numbers that are equal, or both none."""
        return (got == expected) | ((got != got) & (expected != expected))

    def first_result(self) -> torch.Tensor:
        """The first tensor that the op returns, or takes where it returns none."""
        return self._outputs[0]

    def run(self, seed: int = 0) -> list[Launch]:
        """Runs all launches from the begin."""
        self.restart()
        return [ready.run(seed + place) for place, ready in enumerate(self.launches)]


def tensors_of(value) -> list[torch.Tensor]:
    """All tensors of a result or of arguments, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    if isinstance(value, (int, float, str)):
        return []
    return [t for member in value or () for t in tensors_of(member)]


def distinct(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Tensors that differ in where they lie or how; bool as bytes."""
    seen = {}
    for tensor in tensors:
        if tensor.dtype == torch.bool:
            tensor = tensor.view(torch.uint8)
        seen.setdefault((tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()), tensor)
    return list(seen.values())
