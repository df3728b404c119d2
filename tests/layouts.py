"""Feature maps and their layouts: exact values, equality of bits, and memory that rules out 16-byte access."""

import torch
from torch import Tensor


def integers(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype, high: int = 3) -> Tensor:
    """Small integers in [-high, high]: every dot product is exact in every order, and ties are frequent."""
    return torch.randint(-high, high + 1, shape, generator=generator).to(dtype)


def bits(x: Tensor) -> Tensor:
    """Comparable with torch.equal where NaN and -0.0 count too."""
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def misaligned(x: Tensor) -> dict[str, Tensor]:
    """The values of `x` [B, d, H, W] where 16-byte access is not possible though the sizes are multiples of it."""
    B, d, H, W = x.shape
    padded = x.new_zeros(B, d, H * W + 3)
    padded[..., : H * W] = x.flatten(2)
    shifted = x.new_zeros(x.numel() + 1)[1:].view(x.shape).copy_(x)
    tokens = x.new_zeros(B, H * W, d + 1)
    tokens[..., :d] = x.flatten(2).transpose(1, 2)
    return {
        "padded_channels": padded[..., : H * W],
        "shifted": shifted,
        "padded_tokens": tokens[..., :d].transpose(1, 2),
    }
