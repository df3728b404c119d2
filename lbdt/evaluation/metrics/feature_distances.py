"""Distances in a feature space that must be named with them: of a picture from unedited generations, which tells
artifacts, and Frechet's of two sets of pictures."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

FOLDS = 4
SMALLEST = 2 * FOLDS
"""Pictures to fit to, at least; with fewer than features the judge is coarse."""
QUANTILE = 0.99
SHRINKAGE = 0.01


@dataclass(frozen=True)
class FeatureJudge:
    """Calls a picture an artifact if its Mahalanobis distance from unedited generations passes `threshold`.

    The published artifact rate asks a vision language model instead (`lbdt.evaluation.metrics.vlm`); the two
    are not comparable. Take a feature space that does not know the erased objects: a clean picture without
    the object would be far from all pictures with one in an object classifier's.
    """

    RULE: ClassVar[str] = "Mahalanobis distance in the features of"
    mean: Tensor
    """float64 [F]."""
    precision: Tensor
    """float64 [F, F], the inverse of the shrunk covariance."""
    threshold: float

    @classmethod
    def fit(cls, features: Tensor) -> FeatureJudge:
        """The judge of `features` [n, F] of unedited generations.

        Covariance `(1 - s) C + s mean(diag C) I` with s = 0.01. The threshold is the 99th percentile of
        distances, each to a fit without the picture's quarter (drawn at random, always alike), so that about
        1 % of new unedited generations pass it.

        Raises:
            ValueError: fewer than 8 pictures, or features that are not finite.
        """
        _check_fit(features)
        features = features.double()
        # Not by position alone: grids list their prompts in a period.
        order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))
        fold = torch.empty(len(features), dtype=torch.int64)
        fold[order] = torch.arange(len(features)) % FOLDS
        held_out = torch.cat(
            [_distances(features[fold == f], *_moments(features[fold != f])) for f in range(FOLDS)]
        )
        return cls(*_moments(features), float(held_out.quantile(QUANTILE)))

    def distances(self, features: Tensor) -> Tensor:
        """float64 [n] of `features` [n, F]; ValueError for another F or values that are not finite."""
        _check_features(features, len(self.mean))
        return _distances(features.double(), self.mean, self.precision)

    def artifacts(self, features: Tensor) -> Tensor:
        """bool [n]: which pictures are artifacts."""
        return self.distances(features) > self.threshold

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file, whole or not at all."""
        from lbdt.runs.files import tensor_bytes, write_files

        path = Path(path)
        tensors = {
            "mean": self.mean,
            "precision": self.precision,
            "threshold": torch.tensor([self.threshold], dtype=torch.float64),
        }
        write_files(path.parent, {path.name: tensor_bytes(tensors, None)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FeatureJudge:
        """The judge in a file of `save`; ValueError naming what is wrong with it."""
        from lbdt.runs.files import read_tensors

        path = Path(path)
        got = read_tensors(
            path, {"mean": (None,), "precision": (None, None), "threshold": (1,)}, torch.float64
        )
        width = len(got["mean"])
        if got["precision"].shape != (width, width):
            raise ValueError(
                f"{path}: tensor precision: expected shape [{width}, {width}], got "
                f"{list(got['precision'].shape)}"
            )
        return cls(got["mean"].double(), got["precision"].double(), float(got["threshold"]))


@dataclass(frozen=True)
class DirectionJudge:
    """Calls a picture an artifact if `direction . features` passes `threshold`: more of what a classifier of faults
    looks for than nearly all unedited generations have. Cleaner pictures than those are none.
    """

    RULE: ClassVar[str] = "what is a fault to the features of"
    direction: Tensor
    """float64 [F]."""
    threshold: float

    @classmethod
    def fit(cls, features: Tensor, direction: Tensor) -> DirectionJudge:
        """The judge whose threshold is the 99th percentile of `features` [n, F] of unedited generations.

        Raises:
            ValueError: fewer than 8 pictures, features or a direction [F] that are not finite.
        """
        _check_fit(features)
        if direction.shape != features.shape[1:] or not torch.isfinite(direction).all():
            raise ValueError(f"direction: expected finite [{features.shape[1]}], got {list(direction.shape)}")
        direction = direction.double()
        return cls(direction, float((features.double() @ direction).quantile(QUANTILE)))

    def artifacts(self, features: Tensor) -> Tensor:
        """The artifacts among pictures of `features` [n, F]: bool [n]. ValueError for another F or values that are not
        finite."""
        _check_features(features, len(self.direction))
        return features.double() @ self.direction > self.threshold

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file, whole or not at all."""
        from lbdt.runs.files import tensor_bytes, write_files

        path = Path(path)
        threshold = torch.tensor([self.threshold], dtype=torch.float64)
        tensors = {"direction": self.direction, "threshold": threshold}
        write_files(path.parent, {path.name: tensor_bytes(tensors, None)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> DirectionJudge:
        """The judge in a file of `save`; ValueError naming what is wrong with it."""
        from lbdt.runs.files import read_tensors

        got = read_tensors(Path(path), {"direction": (None,), "threshold": (1,)}, torch.float64)
        return cls(got["direction"].double(), float(got["threshold"]))


def _check_features(features: Tensor, width: int) -> None:
    if features.dim() != 2 or features.shape[1] != width:
        raise ValueError(f"features: expected [n, {width}], got {list(features.shape)}")
    if not torch.isfinite(features).all():
        raise ValueError("features: expected finite values, got NaN or infinite ones")


def _check_fit(features: Tensor) -> None:
    if features.dim() != 2 or len(features) < SMALLEST or not torch.isfinite(features).all():
        raise ValueError(
            f"features: expected finite [n >= {SMALLEST}, F] of unedited generations, got {list(features.shape)}"
        )


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


class _Given(nn.Module):
    """Stands where torchmetrics expects a network: the features are computed already."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        return features


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    mean = features.mean(0)
    centred = features - mean
    covariance = centred.T @ centred / len(features)
    # Dimensions that never move would have no inverse; if none moves, only equal pictures are near.
    floor = covariance.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny ** 0.5)
    shrunk = (1 - SHRINKAGE) * covariance + SHRINKAGE * floor * torch.eye(
        len(mean), dtype=torch.float64, device=features.device
    )
    return mean, torch.linalg.inv(shrunk)


def _distances(features: Tensor, mean: Tensor, precision: Tensor) -> Tensor:
    centred = features - mean
    return (centred @ precision * centred).sum(1).clamp_min(0).sqrt()
