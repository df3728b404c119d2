"""What an SAE has between a feature map and its encoder rows: SAEParate's linear map and GELU (METHOD.md, 6.7)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


class PreEncoder:
    """`gelu(W_pre x + b)` of every patch, in the activations' dtype."""

    def __init__(
        self,
        weight: Tensor,  # [d, d]
        bias: Tensor,  # [d], pre-bias folded in
    ) -> None:
        # As given, since a cast to the dtype of one call's activations would be rounded for the next one's.
        self._exact = weight, bias
        self.weight, self.bias = weight, bias

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Moves the tensors; `dtype` is that of the activations."""
        self.weight, self.bias = (tensor.to(device, dtype) for tensor in self._exact)

    def __call__(
        self,
        x: Tensor,  # [B, d, H, W] or [B, d, N]
        minus: Tensor | None = None,  # like x
    ) -> Tensor:  # [B, d, N], contiguous
        """What the encoder's rows are multiplied with, of `x`, or of `x - minus`."""
        x = (x if minus is None else x - minus).flatten(2)
        batch, width, patches = x.shape
        # A product a row: it does not depend on the rows around it, and the detection reads its layout quickest.
        return F.gelu(
            torch.baddbmm(
                self.bias.unsqueeze(1).expand(batch, width, patches),
                self.weight.expand(batch, width, width),
                x,
            )
        )
