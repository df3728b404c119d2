"""Feature maps in memory: equality of bits, and layouts that rule out 16-byte access."""

import torch
from torch import Tensor


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
