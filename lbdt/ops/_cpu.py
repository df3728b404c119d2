"""What the C++ backends that take CPU tensors alone ask of a call."""

import functools
from typing import Any

import torch
from torch import Tensor

from lbdt import _build


def supports(op: str, x: Tensor) -> str | None:
    """Why the internal `op`, such as "record_patches_cpp", cannot take `x`; None if it can."""
    if x.device.type != "cpu":
        return f"needs a CPU tensor, got one on {x.device}"
    return _build.missing(op, "cpu")


def supports_product(op: str, x: Tensor) -> str | None:
    """The same for an op that multiplies `x` by the dictionary."""
    if x.device.type == "cpu" and x.dtype == torch.float64:
        return "computes in float32, and x is float64"
    return supports(op, x)


def declines_product(*args: Any, **kwargs: Any) -> str | None:
    """Why "auto" does not choose such an op on this processor though it could."""
    return _processor()


@functools.cache
def _processor() -> str | None:
    if torch.backends.cpu.get_cpu_capability().startswith(("AVX2", "AVX512")):
        return None
    return "its matrix product is written for AVX2 and AVX-512, which this processor lacks"
