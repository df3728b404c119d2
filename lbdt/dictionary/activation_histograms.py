"""`Histograms` of the candidate latents' activations, and the edges of their bins."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lbdt.dictionary.checks import require_range, require_shape

SPACINGS = ("log", "logit")
_SPAN = 1e-4
"""First positive edge as a fraction of the last: activations below it count as zeros."""


@dataclass
class Histograms:
    """Activations of the candidate latents, counted in K bins (edges[j], edges[j+1]], zeros in the first."""

    candidates: Tensor
    """[C, T, M] int64, the best-scoring latents of a concept and bin, best first; where an assigned latent is not
    among them, it takes the last place."""
    on: Tensor
    """[C, T, M, K] int64, patches of the concept's own prompts."""
    off: Tensor
    """[C, T, M, K] int64, patches of other concepts' prompts."""
    edges: Tensor
    """[K + 1] float32, ascending from 0. The last bin also holds what lies above."""

    def clone(self) -> Histograms:
        return Histograms(self.candidates.clone(), self.on.clone(), self.off.clone(), self.edges.clone())

    def merge(self, other: Histograms) -> Histograms:
        """Summed counts; ValueError where candidates or edges differ."""
        if not torch.equal(self.candidates, other.candidates) or not torch.equal(self.edges, other.edges):
            raise ValueError(
                "cannot merge: the calibrations have other candidates or edges; merge the statistics first, "
                "then calibrate every part with the one dictionary built from them"
            )
        return Histograms(self.candidates, self.on + other.on, self.off + other.off, self.edges)

    def check(self, concepts: int, bins: int, num_latents: int) -> None:
        """ValueError unless shapes and values fit a dictionary of C concepts, T bins and L latents."""
        require_shape("candidates", self.candidates, (concepts, bins, None))
        width = self.edges.numel() - 1
        shape = (*self.candidates.shape, width)
        require_shape("on", self.on, shape)
        require_shape("off", self.off, shape)
        require_range("on", self.on)
        require_range("off", self.off)
        edges = self.edges
        if edges.dim() != 1 or width < 2 or float(edges[0]) != 0 or not bool((edges[1:] > edges[:-1]).all()):
            raise ValueError("edges: expected [K + 1] values ascending from 0, K >= 2")
        require_range("candidates", self.candidates)
        if int(self.candidates.max()) >= num_latents:
            raise ValueError(
                f"candidates: expected latents in [0, {num_latents}), got {int(self.candidates.max())}"
            )


def spaced_edges(peak: float, bins: int, spacing: str) -> Tensor:
    """[K + 1] float32 edges from 0 to `peak`, the first positive one at 1e-4 of it.

    "log": equal ratios, K = `bins`. "logit", for activations of a sigmoid: equal steps of the pre-activation, so bins
    are as fine near 1 as near 0; edges that float32 cannot tell apart near 1 are one, so K <= `bins`.

    Raises:
        ValueError: another spacing, or "logit" with a peak above 1.
    """
    if spacing not in SPACINGS:
        raise ValueError(f"spacing: expected one of {', '.join(SPACINGS)}; got {spacing!r}")
    if spacing == "log":
        edges = torch.logspace(0, 1, bins, base=1 / _SPAN) * (peak * _SPAN)
    else:
        if peak > 1:
            raise ValueError(
                f"spacing 'logit' is for activations of a sigmoid, at most 1; got a peak of {peak}"
            )
        # A sigmoid is 1 in float32 from a pre-activation of about 17 on.
        ends = torch.tensor([peak * _SPAN, min(peak, 1 - 2.0**-24)], dtype=torch.float64).logit().tolist()
        edges = torch.linspace(*ends, bins, dtype=torch.float64).sigmoid().float()
    edges[-1] = peak
    return torch.cat([torch.zeros(1), edges.unique()])
