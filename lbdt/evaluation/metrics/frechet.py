"""Frechet distance between two sets of pictures, in a feature space that must be named with it."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class _Given(nn.Module):
    """Stands where torchmetrics expects a network: the features are computed already."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """`|m1 - m2|^2 + trace(C1 + C2 - 2 (C1 C2)^(1/2))` of features [n, F] and [m, F] (Heusel et al., 2017),
    by torchmetrics in float64; C are divided by n - 1.

    It is "FID" only with the original Inception's features; distances of different features, or of very
    different numbers of pictures, cannot be compared.

    Raises:
        ValueError: fewer than two pictures on a side, different widths, values that are not finite.
        ImportError: torchmetrics is not installed.
    """
    for name, x in (("features", features), ("reference", reference)):
        if x.dim() != 2 or len(x) < 2 or not torch.isfinite(x).all():
            raise ValueError(f"{name}: expected finite [n >= 2, F], got {list(x.shape)}")
    if features.shape[1] != reference.shape[1]:
        raise ValueError(
            f"features: expected {reference.shape[1]} wide as the reference, got {features.shape[1]}"
        )
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ModuleNotFoundError as error:
        raise ImportError("a Frechet distance needs torchmetrics: pip install lbdt[evaluate]") from error
    # Of several processes each may ask for its own distance: torchmetrics would wait for all, and add theirs.
    metric = FrechetInceptionDistance(feature=_Given(features.shape[1]), sync_on_compute=False)
    metric.set_dtype(torch.float64)
    metric.update(reference.double().cpu(), real=True)
    metric.update(features.double().cpu(), real=False)
    return max(float(metric.compute()), 0.0)
