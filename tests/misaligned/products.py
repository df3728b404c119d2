"""Matrix products and convolutions on the CPU whose last bit depends on where their operands lie within 64 bytes.

That is what MKL's do on some machines, on AMD ones above all. It holds for float32 and float64, and not where rounding
plays no part (as far as the result tells): a product of small integers is exact on every machine.
"""

import warnings

import torch
from torch import Tensor

_aten = torch.ops.aten
_FEWER_DIGITS = {torch.float32: torch.bfloat16, torch.float64: torch.float32}


def _rounded_by_address(out: Tensor, *operands: Tensor) -> Tensor:
    """`out`, every third rounded element one step up, which third by the operands' addresses; `out` itself where
    both lie as torch's allocator lays them."""
    key = sum((i + 1) * (operand.data_ptr() // 4 % 16) for i, operand in enumerate(operands))
    if not key or out.dtype not in _FEWER_DIGITS:
        return out
    # As it lies in memory, whatever its strides: it was made just now, without holes.
    third = out.as_strided((out.numel(),), (1,))[key % 3 :: 3]
    inexact = third.to(_FEWER_DIGITS[out.dtype]) != third
    third.copy_(torch.where(inexact, torch.nextafter(third, out.new_tensor(torch.inf)), third))
    return out


def _product(name: str):
    # The kernel with `out` is another one, which stays torch's own.
    into = getattr(_aten, name).out

    def kernel(*arguments, **settings):
        left, right = [value for value in arguments if isinstance(value, Tensor)][-2:]
        out = left.new_empty((*left.shape[:-1], *right.shape[left.dim() - 1 :]))
        into(*arguments, **settings, out=out)
        return _rounded_by_address(out, left, right)

    return kernel


def _convolution(x: Tensor, weight: Tensor, *settings):
    return _rounded_by_address(_aten._convolution(x, weight, *settings, False, False, True, True), x, weight)


def install() -> torch.library.Library:
    """Puts the kernels in the place of torch's, for this process and as long as the result lives."""
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that kernels are overridden is meant
        for name in ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv"):
            library.impl(name, _product(name), "CPU")
        library.impl("convolution", _convolution, "CPU")
    return library
