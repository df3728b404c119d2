"""Launches of the Triton kernels as their launchers make them, without a GPU, and compiled for one.

The launchers run on CPU tensors with their kernels replaced by recorders; what these were called with is specialised as
Triton's own launcher does (pointers and integers that are multiples of 16, integers that are 1). So no kernel's list of
arguments is written twice. Needs a process without Triton's interpreter.
"""

import contextlib
import importlib
import sys
from typing import NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_TYPES = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
}
_OPTIONS = ("num_warps", "num_stages")


class Launch(NamedTuple):
    """A kernel, and what it was launched with."""

    kernel: object
    args: tuple
    kwargs: dict
    grid: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.kernel.__name__


class _Recorder:
    """Stands for a kernel: keeps its launches."""

    def __init__(self, kernel, launches: list[Launch]) -> None:
        # Of a module that is in two lists the kernel has been replaced already.
        self._kernel = kernel._kernel if isinstance(kernel, _Recorder) else kernel
        self._launches = launches

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self._launches.append(Launch(self._kernel, args, kwargs, grid))


def record(op: str, arch: int, **arguments) -> tuple[list[Launch], object]:
    """The launches that the launcher of `op` makes for these arguments, and what it returns, which nothing has filled.

    `op` is one of lbdt, or the path of a module whose launcher has the name of its file.
    """
    module = importlib.import_module(op if "." in op else f"lbdt.kernels.{op}")
    places = [module, *(place for name, place in sys.modules.items() if name.startswith("lbdt.kernels."))]
    found: list[Launch] = []
    with contextlib.ExitStack() as stack:
        for place in places:
            for name, value in list(vars(place).items()):
                if name.endswith("_kernel"):
                    stack.enter_context(mock.patch.object(place, name, _Recorder(value, found)))
            if hasattr(place, "capability"):
                stack.enter_context(mock.patch.object(place, "capability", lambda device: divmod(arch, 10)))
        result = getattr(module, op.rpartition(".")[2])(**arguments)
    return found, result


def compile_launch(launch: Launch, arch: int):
    """(what Triton compiles for sm_`arch`, the launch's arguments that are left at run time)."""
    kernel = launch.kernel
    given = dict(zip(kernel.arg_names, launch.args, strict=False)) | {
        name: value for name, value in launch.kwargs.items() if name not in _OPTIONS
    }
    signature, constants, attributes, passed = {}, {}, {}, []
    for place, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and isinstance(value, int) and value == 1):
            signature[parameter.name], constants[(place,)] = "constexpr", value
            continue
        passed.append(value)
        if isinstance(value, torch.Tensor):
            signature[parameter.name], divisible = _TYPES[value.dtype], value.data_ptr() % 16 == 0
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible = special and value % 16 == 0
        if divisible:
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {name: launch.kwargs[name] for name in _OPTIONS}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options), passed
