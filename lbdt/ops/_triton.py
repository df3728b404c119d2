"""What every Triton backend asks of a call, and where its kernels are."""

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lbdt.ops import _dispatch

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_LEAST_CAPABILITY = (8, 0)


def supports(x: Tensor) -> str | None:
    """Why Triton cannot take `x`; None if it can. Triton is imported only where the device could run it."""
    if not _installed():
        return "triton is not installed: pip install 'lbdt[gpu]'"
    kind = x.device.type
    if kind == "cuda":
        return _unfit(x.device)
    if kind != "cpu" or not interpreted():
        return f"needs a CUDA tensor, got one on {kind}"
    return None


def supports_product(*factors: Tensor | None) -> str | None:
    """Why Triton cannot multiply these ([B, d, ...] or [L, d]); None if it can."""
    for tensor in factors:
        if tensor is None:
            continue
        if tensor.dtype not in _DTYPES:
            return f"needs float32, float16 or bfloat16, got {str(tensor.dtype).removeprefix('torch.')}"
        # A tile's 64-bit channel offsets would not fit in registers.
        if tensor.shape[1] * tensor.stride(1) >= 1 << 31:
            return f"needs channels within 2**31 elements, got stride {tensor.stride(1)} x {tensor.shape[1]}"
    return None


def supports_order(order: Tensor | None) -> str | None:
    """Why Triton cannot take a dictionary in this order; None if it can."""
    return None if order is None else "needs the rows of weight in the order of the latents, got order"


def register(
    op: str, supports: Callable[..., str | None], around: Callable[[Callable], Callable] = lambda run: run
) -> None:
    """Makes `lbdt.kernels.<op>` the backend "triton" of `op`, within `around`; its module is imported at the first
    call."""
    run = around(lambda *args: getattr(kernels(op), op)(*args))
    _dispatch.register(op, "triton", supports, run, _declines)


def _declines(*args: Any, **kwargs: Any) -> str | None:
    return "Triton's interpreter is for tests" if interpreted() else None


def kernels(op: str) -> ModuleType:
    """The module `lbdt.kernels.<op>`; ImportError where it is missing from the installation."""
    try:
        return importlib.import_module(f"lbdt.kernels.{op}")
    except ModuleNotFoundError as error:
        if error.name not in ("lbdt.kernels", f"lbdt.kernels.{op}"):
            raise
        raise ImportError(
            "this installation of lbdt lacks its package lbdt.kernels (in a checkout: kernels/triton): install lbdt "
            "with pip (-e .), rather than by PYTHONPATH"
        ) from error


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    # Asked of the environment first: without it, calls on the CPU need not import Triton at all.
    if not os.environ.get("TRITON_INTERPRET"):
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


@functools.cache
def _unfit(device: torch.device) -> str | None:
    if torch.version.hip is not None:
        return "its tiles are chosen for NVIDIA GPUs, and this torch is built for AMD's"
    capability = torch.cuda.get_device_capability(device)
    if capability < _LEAST_CAPABILITY:
        return f"needs compute capability 8.0 or later, {device} has {'.'.join(map(str, capability))}"
    return None
