"""Shares of patches that are candidates and detected, and how much is read to refute one: those of EmojiCanvas, from
which `lbdt bench` makes cases that are as pictures are. `python -m benchmarks.early_stop` measured them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class MeasuredShares(NamedTuple):
    """Measured on pictures with a concept, or without it."""

    candidates: float
    """Share of the patches in which a threshold is passed, before the rank test."""
    detected: float
    """Share of the patches that are detected."""
    read: tuple[float, ...]
    """Shares of the dictionary, in the SAE's own order, until a refuted candidate is known to be one: the middles of
    ten equal groups of them."""

    def values(self, k: int, latents: int) -> Tensor:
        """The value of a refuted candidate of each group, [10] float32, among `latents` pre-activations drawn from
        N(0, 1): so many are larger that the k-th of them is expected after that share, or after half of them, as
        the draw might let pass what is refuted later."""
        larger = (k / latents / torch.tensor(self.read)).clamp(2 * k / latents, 0.4)
        return torch.special.ndtri(1 - larger)


MEASURED: dict[str, MeasuredShares] = {
    "saeuron, present": MeasuredShares(
        0.842, 0.051, (0.02, 0.029, 0.035, 0.043, 0.055, 0.069, 0.09, 0.129, 0.204, 0.448)
    ),
    "saeuron, absent": MeasuredShares(
        0.848, 0.011, (0.021, 0.029, 0.035, 0.043, 0.055, 0.069, 0.09, 0.128, 0.21, 0.486)
    ),
    "saemnesia, present": MeasuredShares(
        0.136, 0.056, (0.03, 0.04, 0.051, 0.068, 0.084, 0.12, 0.186, 0.29, 0.508, 0.799)
    ),
    "saemnesia, absent": MeasuredShares(
        0.1, 0.007, (0.031, 0.039, 0.048, 0.059, 0.07, 0.087, 0.118, 0.181, 0.333, 0.694)
    ),
    "gsae, present": MeasuredShares(
        0.509, 0.047, (0.021, 0.023, 0.025, 0.027, 0.029, 0.033, 0.038, 0.049, 0.076, 0.24)
    ),
    "gsae, absent": MeasuredShares(
        0.551, 0.01, (0.021, 0.023, 0.025, 0.027, 0.029, 0.033, 0.038, 0.05, 0.075, 0.205)
    ),
    "sdxl, present": MeasuredShares(
        0.823, 0.124, (0.018, 0.027, 0.034, 0.044, 0.055, 0.069, 0.094, 0.13, 0.225, 0.515)
    ),
    "sdxl, absent": MeasuredShares(
        0.779, 0.01, (0.02, 0.029, 0.037, 0.047, 0.059, 0.077, 0.105, 0.152, 0.249, 0.522)
    ),
    "saeparate, present": MeasuredShares(
        0.157, 0.064, (0.057, 0.111, 0.173, 0.236, 0.288, 0.391, 0.467, 0.599, 0.68, 0.898)
    ),
    "saeparate, absent": MeasuredShares(
        0.129, 0.013, (0.042, 0.062, 0.08, 0.117, 0.183, 0.258, 0.357, 0.467, 0.606, 0.794)
    ),
}
"""The shares of each kind of eraser, where the concept is in the picture and where it is not."""
