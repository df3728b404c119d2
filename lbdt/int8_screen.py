"""The int8 screen: a dictionary's rows as codes of one byte a weight, with what it takes to bound their products."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from lbdt import _build
from lbdt.ops import _dispatch, _triton
from lbdt.ops.detect_patches import BOUNDS, CODE_LANES

MOST_CHANNELS = 1 << 16
"""The largest d whose products of codes fit an int32; csrc/cpu/screen.h: kMostScreened."""
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_CHUNK = 1 << 16  # weights coded at a time
_LEAST = 1 << 20  # weights from which on a screen spares time
_UP = 1 + 2.0**-20  # lengths are rounded to float32 upwards
_TINY = 2.0**-120  # in which squares and products vanish
_LARGE = 2.0**60  # from which on products may overflow: there is no bound, as in csrc/cpu/screen.h
_dispatch.define_internal("screen_instructions_cpp() -> str", lambda: "")


class Screen(NamedTuple):
    """The arguments of `detect_patches` and `erase_step` by which they bound pre-activations, rather than compute them,
    where that decides: they change no result, only the time of it."""

    codes: Tensor
    """[L, d] int8, d padded to a multiple of 4: the rows of the dictionary divided by their scales."""
    bounds: Tensor
    """[6, L] float32, of each row: its scale; its bias and product with the centre; the length of the coded row; the
    length of what its codes leave out; what rounding may add to a pre-activation by the bias; the sum of its codes."""
    centre: Tensor
    """[d] float32, what is taken from every patch before it is coded: bounds are narrow where patches are near it."""

    @classmethod
    def of(
        cls,
        weight: Tensor,  # [L, d]
        bias: Tensor,  # [L]
        centre: Tensor,  # [d]
        order: Tensor | None = None,  # [L]
    ) -> Screen:
        """The screen of a dictionary, for patches near `centre`, as the pre-bias `b_dec` of its SAE is.

        Eq.: METHOD.md, 2.7; ours. A byte a weight and 24 a row are kept; about 4 MB more are needed on the way.

        Args:
            weight: float32 | float16 | bfloat16, any strides; as the ops get it.
            bias: float32, as the ops get it.
            centre: float32.
            order: int64, the row of `weight` that each latent is, as the ops get it.

        Raises:
            ValueError, TypeError: the argument, what was expected, what was given. ValueError for d above 65,536.
        """
        if weight.dim() != 2 or not 1 <= weight.shape[1] <= MOST_CHANNELS:
            raise ValueError(f"weight: expected [L, 1 <= d <= {MOST_CHANNELS}], got {list(weight.shape)}")
        if weight.dtype not in _DTYPES:
            raise TypeError(f"weight: expected float32, float16 or bfloat16, got {weight.dtype}")
        weight, bias, centre = weight.detach(), bias.detach(), centre.detach()
        latents, width = weight.shape
        for name, tensor, size in (("bias", bias, latents), ("centre", centre, width)):
            if tuple(tensor.shape) != (size,) or tensor.device != weight.device:
                raise ValueError(
                    f"{name}: expected [{size}] on {weight.device}, got {list(tensor.shape)} on {tensor.device}"
                )
            if tensor.dtype != torch.float32:
                raise TypeError(f"{name}: expected float32, got {tensor.dtype}")
        padded = -(-width // CODE_LANES) * CODE_LANES
        codes = torch.zeros(latents, padded, dtype=torch.int8, device=weight.device)
        bounds = torch.empty(BOUNDS, latents, dtype=torch.float32, device=weight.device)
        middle, step = centre.double(), max(1, _CHUNK // width)
        for first in range(0, latents, step):
            part = slice(first, first + step)
            rows = weight[part] if order is None else weight[order[part]]
            codes[part, :width], bounds[:, part] = _coded(rows.double(), bias[part].double(), middle)
        return cls(codes, bounds, centre.contiguous())

    @classmethod
    def where_useful(
        cls,
        weight: Tensor,  # [L, d]
        bias: Tensor,  # [L]
        centre: Tensor,  # [d]
        order: Tensor | None = None,  # [L]
    ) -> Screen | None:
        """The same where it spares time (`useful`); else None."""
        return cls.of(weight, bias, centre, order) if useful(weight) else None


def useful(weight: Tensor) -> bool:
    """Whether a screen of a dictionary [L, d] spares time and the dictionary is no small one: on a CPU with the
    instructions, and in half precision on a GPU that Triton serves."""
    fits = weight.dtype in _DTYPES and weight.shape[1] <= MOST_CHANNELS
    return fits and weight.numel() >= _LEAST and _serves(weight)


def _serves(weight: Tensor) -> bool:
    """Whether some op of the weight's device counts by a screen."""
    if weight.device.type == "cpu":
        return bool(instructions())
    return weight.device.type == "cuda" and weight.dtype != torch.float32 and _triton.supports(weight) is None


@functools.cache
def instructions() -> str:
    """The int8 instructions with which the C++ ops screen on this CPU: "amx_int8", "avx512_vnni", "avx_vnni"; "": none.

    All give the same bits. AMX needs AVX-512 VNNI beside it, Linux's permission, which is asked for once, here or at
    the first detection, and no `ATEN_CPU_CAPABILITY` in the environment, by which torch is held to older instructions.

    Raises:
        RuntimeError: a processor has AMX, and it multiplies wrongly; what to do without it.
    """
    if _build.missing("screen_instructions_cpp", "cpu") is not None:
        return ""
    return torch.ops.lbdt.screen_instructions_cpp()


def _coded(rows: Tensor, bias: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [l, d] and bounds [6, l] of some rows [l, d], all float64."""
    scale = (rows.abs().amax(1) / 127).float().double()
    # A row of zeros, or of numbers too small for a scale, has codes of zero.
    codes = (rows / scale.clamp(min=2.0**-100).unsqueeze(1)).round().nan_to_num().clamp(-127, 127)
    coded = codes * scale.unsqueeze(1)
    start = bias + rows @ centre
    lengths = coded.norm(dim=1) * _UP + _TINY, (rows - coded).norm(dim=1) * _UP + _TINY
    # As screen_rounding of csrc/cpu/screen.h has it for the products; what underflow takes from a sum is less.
    rounding = (rows.shape[1] + 64) * 2.0**-22
    slack = (bias.abs() + start.abs()) * rounding + rounding * 2.0**-102
    bounded = (sum(lengths) < _LARGE) & (bias.abs() < _LARGE**2) & (start.abs() < _LARGE**2)
    slack = torch.where(bounded, slack, torch.inf)
    return codes.to(torch.int8), torch.stack((scale, start, *lengths, slack, codes.sum(1))).float()
