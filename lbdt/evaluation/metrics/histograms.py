"""Histograms of several samples over common bins."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BINS = 60
REACH = 2.0
"""How far the bins go beyond the base's range, in such ranges. A strong edit moves values a hundred times as far, and
all others would share one bin."""


def edges_of(base: Tensor, others: Sequence[Tensor], bins: int, percentiles: tuple[float, float]) -> Tensor:
    """Equal bins from the smallest lower to the largest upper percentile of all samples (nearest row), but at most
    `REACH` times the base's range beyond the base's.

    Args:
        base: [n], n >= 1, finite.
        others: each [m]; empty ones are skipped.
        bins: >= 1.
        percentiles: (lower, upper).

    Returns:
        float64 [bins + 1], strictly ascending.

    Raises:
        ValueError: fewer than one bin, or an empty base.
    """
    if bins < 1:
        raise ValueError(f"bins: expected an integer >= 1, got {bins}")
    if not len(base):
        raise ValueError("base: expected one value or more, got none")
    low, high = _range(base, percentiles)
    # A base that is constant still needs a bin with a width.
    reach = max(REACH * (high - low), 2.0**-10 * max(abs(low), abs(high), 1.0))
    ranges = [_range(sample, percentiles) for sample in others if len(sample)]
    lowest = max(low - reach, min([low, *(r[0] for r in ranges)]))
    highest = min(high + reach, max([high, *(r[1] for r in ranges)]))
    if lowest == highest:
        lowest, highest = low - reach, high + reach
    return torch.linspace(lowest, highest, bins + 1, dtype=torch.float64)


def histogram(sample: Tensor, edges: Tensor) -> dict[str, list[float]]:
    """ "edges" and "share": the fraction of `sample` [n] in each bin [edge, next edge). Values beyond all edges are
    in the outer bins, so the shares' sum is 1 (0 for an empty sample)."""
    places = torch.bucketize(sample.double(), edges[1:-1].contiguous(), right=True)
    counts = torch.bincount(places, minlength=len(edges) - 1)
    return {"edges": edges.tolist(), "share": (counts.double() / max(len(sample), 1)).tolist()}


def _range(sample: Tensor, percentiles: tuple[float, float]) -> tuple[float, float]:
    ordered = sample.double().sort().values
    low, high = (float(ordered[round(q / 100 * (len(sample) - 1))]) for q in percentiles)
    return low, high
