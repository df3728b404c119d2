"""What the kernels share: loads that the interpreter gets right, patch offsets, dot products, launch helpers."""

import contextlib
import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))


class Config(NamedTuple):
    """Tile sizes of a launch."""

    block_p: int
    """Patches a tile."""
    block_l: int
    """Latents a tile."""
    block_d: int
    """Channels a step."""
    num_warps: int
    num_stages: int


@triton.jit
def load(pointers, mask):
    """Loads under `mask`, 0 elsewhere; None: everywhere. The interpreter would compute with bfloat16's bits."""
    if mask is None:
        values = tl.load(pointers)
    else:
        values = tl.load(pointers, mask=mask, other=0.0)
    if INTERPRET:
        values = values.to(tl.float32)
    return values


@triton.jit
def rounded(values, DTYPE: tl.constexpr):
    """float32 `values` as DTYPE, to the nearest. The interpreter would cut them off to bfloat16."""
    if INTERPRET:
        if DTYPE == tl.bfloat16:
            bits = values.to(tl.int32, bitcast=True)
            bits += 0x7FFF + ((bits >> 16) & 1)
            values = (bits & -65536).to(tl.float32, bitcast=True)
    return values.to(DTYPE)


@triton.jit
def both(mask, other):
    """`mask & other`, each of which may be None: everywhere."""
    if mask is None:
        result = other
    elif other is None:
        result = mask
    else:
        result = mask & other
    return result


@triton.jit
def set_bits(word):
    """How many bits of int32 words are set."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    word += word >> 8
    word += word >> 16
    return word & 0x3F


@triton.jit
def patch_offset(patch, width, stride_h, stride_w, FLAT: tl.constexpr):
    """Elements from an image's origin to `patch`, int64; FLAT: the grid's rows follow each other at `stride_w`."""
    patch = patch.to(tl.int64)
    if FLAT:
        offset = patch * stride_w
    else:
        offset = patch // width * stride_h + patch % width * stride_w
    return offset


@triton.jit
def accumulate(
    acc,  # [M, N] float32
    a_pointers,  # [M, 1], of channel 0
    a_stride,
    x_pointers,  # [1, N], of channel 0
    x_stride,
    minus_pointers,  # [1, N]; anything where not HAS_MINUS
    minus_stride,
    x_mask,  # [1, N] or None
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_MINUS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`acc + a (x - minus)` over all D channels, products accumulated in float32.

    float32 subtracts first, as the reference does. Half precision multiplies twice instead: its products are
    exact, while a rounded difference would not be.

    Channel offsets are 32-bit, as 64-bit ones of a whole tile would not fit in registers.
    """
    channel = tl.arange(0, BLOCK_D)
    TWICE: tl.constexpr = HAS_MINUS and a_pointers.dtype.element_ty != tl.float32
    if TWICE:
        less = tl.zeros(acc.shape, tl.float32)
    for start in range(0, D, BLOCK_D):
        c = start + channel
        inside_a = None
        inside_x = None
        if D % BLOCK_D != 0:
            inside_a = (c < D)[None, :]
            inside_x = (c < D)[:, None]
        a = load(a_pointers + c[None, :] * a_stride, inside_a)
        x = load(x_pointers + c[:, None] * x_stride, both(x_mask, inside_x))
        if HAS_MINUS:
            minus = load(minus_pointers + c[:, None] * minus_stride, both(x_mask, inside_x))
            if TWICE:
                less = tl.dot(a, minus, less)
            else:
                x -= minus
        acc = tl.dot(a, x, acc, input_precision=PRECISION)
    if TWICE:
        acc -= less
    return acc


def precision(dtype: torch.dtype) -> str:
    """How float32 products are taken: exactly, unless torch's own may be TF32."""
    allowed = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"


def grid_strides(x: Tensor) -> tuple[int, int, int, bool]:
    """Width, row stride and patch stride of `x` [B, d, H, W] or [B, d, N], and whether one stride serves all."""
    if x.dim() == 3:
        return x.shape[2], 0, x.stride(2), True
    height, width = x.shape[2:]
    row, column = x.stride(2), x.stride(3)
    if width == 1:
        return width, row, row, True
    return width, row, column, height == 1 or row == width * column


def device_of(tensor: Tensor) -> contextlib.AbstractContextManager:
    """The tensor's GPU as the current one, where Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability; (0, 0) where there is none."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


@functools.cache
def programs(device: torch.device, per_multiprocessor: int) -> int:
    """Programs of a grid that keeps the device busy; few in the interpreter, so that each loops."""
    if device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count * per_multiprocessor
