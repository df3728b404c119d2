"""The learned prefix: one distribution over the vocabulary for each of its tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Prefix:
    """k distributions over V tokens, found by Adam on a relaxation of one-hot vectors (METHOD.md, 8.7).

    Each step draws one token of each distribution, takes the loss there, hands its gradient straight through to the
    distribution (clipped to [-1, 1]), and projects the result on the simplex. It starts uniform, with the learning
    rate 0.01 and the L2 weight decay 0.1 of the published attack.
    """

    def __init__(
        self,
        tokens: int,
        vocabulary: int,
        generator: torch.Generator,
        *,
        lr: float = 0.01,
        weight_decay: float = 0.1,
        device: torch.device | str = "cpu",
    ) -> None:
        """
        Args:
            tokens, vocabulary: k and V, each >= 1.
            generator: on the CPU; of the draws, which are thus the same on every device.
            lr, weight_decay: of Adam.
            device: of the distributions.

        Raises:
            ValueError: `tokens` or `vocabulary` below 1.
        """
        for name, value in (("tokens", tokens), ("vocabulary", vocabulary)):
            if value < 1:
                raise ValueError(f"{name}: expected an integer >= 1, got {value}")
        self.weights = torch.full((tokens, vocabulary), 1 / vocabulary, device=device, requires_grad=True)
        """float32 [k, V]; every row is >= 0 and sums to 1."""
        self._generator = generator
        self._optimizer = torch.optim.Adam([self.weights], lr=lr, weight_decay=weight_decay)

    def sample(self) -> Tensor:
        """One token drawn of each distribution, one-hot float32 [k, V]; differentiable, straight through."""
        u = torch.rand(len(self.weights), 1, generator=self._generator, dtype=torch.float64)
        return _StraightThrough.apply(self.weights, u.to(self.weights.device))

    def step(self, loss: Tensor) -> None:
        """One step of Adam down `loss`, a scalar that depends on what `sample` gave; then the projection.

        Raises:
            RuntimeError: `loss` does not depend on the prefix.
        """
        (self.weights.grad,) = torch.autograd.grad(loss, [self.weights])
        self._optimizer.step()
        with torch.no_grad():
            self.weights.copy_(project_simplex(self.weights))

    def best(self) -> Tensor:
        """The most likely token of each distribution, int64 [k]; of equal ones the first."""
        # argmax does not say which of equal values it takes.
        weights = self.weights.detach()
        return (weights == weights.amax(1, keepdim=True)).to(torch.uint8).argmax(1)


def project_simplex(x: Tensor) -> Tensor:
    """The point nearest to each row of `x` [k, V] whose entries are >= 0 and sum to 1 (Duchi et al., ICML 2008).

    With the row sorted in descending order as s: `max(x - theta, 0)`, `theta = (sum_{i <= r} s_i - 1) / r`, r the
    largest index with `s_r > theta` so far.
    """
    ordered = x.double().sort(dim=1, descending=True).values
    place = torch.arange(1, x.shape[1] + 1, device=x.device)
    theta = (ordered.cumsum(1) - 1) / place
    last = (ordered > theta).sum(1, keepdim=True) - 1
    return (x.double() - theta.gather(1, last)).clamp(min=0).to(x.dtype)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, u: Tensor) -> Tensor:
        total = weights.double().cumsum(1)
        drawn = torch.searchsorted(total, u * total[:, -1:], right=True)
        return torch.zeros_like(weights).scatter_(1, drawn, 1.0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.clamp(-1, 1), None
