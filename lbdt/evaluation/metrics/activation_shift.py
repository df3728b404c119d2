"""How far an edit moves a block's activations from the unedited model's (METHOD.md, 8.5; after the
out-of-distribution figure of arXiv 2606.31699).

Rows are patches of a block's output, as `lbdt.evaluation.block_watch.BlockWatch` keeps them. Sizes: n, m rows, d
dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

PERCENTILES = (0.1, 99.9)
"""Values beyond these of the base, by dimension, are outside."""
SMALLEST_NORM = 2.0**-24
"""Smaller L2 norms, 0 too, count as this one, so that every log2 is finite."""
BINS = 60
"""Bins of the histograms."""
REACH = 2.0
"""How far the bins go beyond the base's range, in such ranges. A strong edit moves values a hundred times as far, and
all others would share one bin."""
_BLOCK = 16  # dimensions at a time, so that no float64 copy of all rows is held


class WatchedRows(NamedTuple):
    """The rows of one setting."""

    method: str
    """ "steering" | "per"."""
    settings: Mapping[str, Any]
    """JSON-like, such as {"strength": -5.0}."""
    rows: Tensor
    """[m, d]"""


@dataclass(frozen=True)
class ActivationShift:
    """Rows [m, d] against a `BaseActivations`."""

    patches: int
    """m."""
    broken: int
    """Rows with NaN or infinity. Such values are outside; such rows are left out of the distances."""
    outside_by_dimension: Tensor
    """float64 [d]: per cent of the values."""
    wasserstein_by_dimension: Tensor
    """float64 [d]: 1-Wasserstein distance in the base's standard deviations of the dimension. NaN where the base is
    constant, and everywhere if all rows are broken."""
    norm_wasserstein: float | None
    """1-Wasserstein distance between the log2 of the rows' L2 norms; None if all rows are broken."""

    @property
    def outside(self) -> float:
        """The percentage of all values that lie beyond the base's `PERCENTILES` of their dimension. The base has about
        0.2."""
        return float(self.outside_by_dimension.mean())

    @property
    def wasserstein(self) -> float | None:
        """Mean of `wasserstein_by_dimension` over the dimensions in which the base varies; None if all rows are
        broken."""
        return None if self.broken == self.patches else float(self.wasserstein_by_dimension.nanmean())

    def to_dict(self) -> dict[str, Any]:
        """ "patches", "outside", "wasserstein" and "norm wasserstein", to 6 decimals."""
        figures = {
            "outside": self.outside,
            "wasserstein": self.wasserstein,
            "norm wasserstein": self.norm_wasserstein,
        }
        # float64 sums differ in the last digits with the number of threads.
        return {"patches": self.patches} | {k: None if v is None else round(v, 6) for k, v in figures.items()}


class BaseActivations:
    """The unedited model's rows, sorted by dimension. Made by `fit`."""

    def __init__(self, base: Tensor) -> None:
        """`base` [n, d], checked."""
        self.rows = len(base)
        self.sorted = base.sort(dim=0).values
        self.low, self.high = (percentile(self.sorted, q) for q in PERCENTILES)
        """float64 [d]."""
        deviation = torch.cat([part.double().std(dim=0, correction=0) for part in self._blocks()])
        self.deviation = torch.where(self.sorted[0] == self.sorted[-1], torch.nan, deviation)
        """float64 [d], of the population; NaN where the base is constant."""
        self.log_norms = log_norms(base).sort().values
        """float64 [n], ascending."""

    def compare(self, x: Tensor) -> ActivationShift:
        """How far the rows `x` [m, d], m >= 1, have moved; their order is of no consequence.

        Raises:
            TypeError: no floating point tensor.
            ValueError: another shape.
        """
        x = _checked("x", x, self.sorted.shape[1])
        whole = x.isfinite().all(dim=1)
        kept = x[whole]
        outside, distances = [], []
        for start in range(0, x.shape[1], _BLOCK):
            part = slice(start, start + _BLOCK)
            outside.append(self._outside(x, part))
            if len(kept):
                distances.append(wasserstein(self.sorted[:, part], kept[:, part].sort(dim=0).values))
            else:
                distances.append(torch.full_like(outside[-1], torch.nan))
        norms = None
        if len(kept):
            moved = log_norms(kept).sort().values
            norms = float(wasserstein(self.log_norms.unsqueeze(1), moved.unsqueeze(1)))
        return ActivationShift(
            patches=len(x),
            broken=len(x) - len(kept),
            outside_by_dimension=torch.cat(outside),
            wasserstein_by_dimension=torch.cat(distances) / self.deviation,
            norm_wasserstein=norms,
        )

    def outside(self, x: Tensor) -> float:
        """`ActivationShift.outside` of the rows `x` [m, d], m >= 1, alone, which costs no distances. Raises as
        `compare`."""
        x = _checked("x", x, self.sorted.shape[1])
        parts = [self._outside(x, slice(at, at + _BLOCK)) for at in range(0, x.shape[1], _BLOCK)]
        return float(torch.cat(parts).mean())

    def _outside(self, x: Tensor, part: slice) -> Tensor:
        """The percentage of the values of some dimensions beyond the percentiles, float64 [k]. NaN is beyond."""
        values = x[:, part].double()
        inside = (values >= self.low[part]) & (values <= self.high[part])
        return 100 * (len(x) - inside.sum(dim=0)).double() / len(x)

    def _blocks(self) -> tuple[Tensor, ...]:
        return self.sorted.split(_BLOCK, dim=1)


def fit(base: Tensor) -> BaseActivations:
    """What later rows are compared with: `base` [n, d], rows of the unedited model.

    Raises:
        TypeError: no floating point tensor.
        ValueError: another shape, fewer than two rows, NaN or infinity, or no dimension that varies.
    """
    base = _checked("base", base)
    if len(base) < 2:
        raise ValueError(f"base: expected two rows or more, got {len(base)}; watch more patches or pictures")
    if not bool(base.isfinite().all()):
        broken = int((~base.isfinite().all(dim=1)).sum())
        raise ValueError(
            f"base: {broken} of {len(base)} rows hold NaN or infinity; run the unedited pipeline in bfloat16 or float32"
        )
    if bool((base == base[0]).all()):
        raise ValueError(
            f"base: all {len(base)} rows are equal, so a distance has no unit; watch more pictures"
        )
    return BaseActivations(base)


def compare_settings(base: Tensor, others: Sequence[WatchedRows]) -> list[dict[str, Any]]:
    """The "activations" of values.json: the base first, then `others` in their order, with histograms of one binning.

    "norms": of the log2 of the rows' L2 norms. "dimension": of the one dimension that steering moves most, by the sum
    of its distances under all steering settings (without any: under all settings). Broken rows are in neither.

    Args:
        base: [n, d], rows of the unedited model, best of pictures of all concepts: beside pictures of the erased one
            alone, every other object is out of distribution.
        others: rows under the methods, of any number of pictures.

    Raises:
        TypeError, ValueError: as `fit` and `BaseActivations.compare`.
    """
    reference = fit(base)
    settings = [WatchedRows("base", {}, base), *others]
    statistics = [reference.compare(each.rows) for each in settings]
    steered = [
        s for s, each in zip(statistics, settings, strict=True) if each.method == "steering"
    ] or statistics
    index = int(sum(s.wasserstein_by_dimension.nan_to_num(0.0) for s in steered).argmax())
    whole = [each.rows[each.rows.isfinite().all(dim=1)].detach().cpu() for each in settings]
    found = {
        "norms": [log_norms(rows) for rows in whole],
        "dimension": [rows[:, index].double() for rows in whole],
    }
    edges = {name: edges_of(columns[0], columns[1:], BINS, PERCENTILES) for name, columns in found.items()}
    return [
        {
            "method": each.method,
            "settings": dict(each.settings),
            **statistics[i].to_dict(),
            "norms": histogram(found["norms"][i], edges["norms"]),
            "dimension": {"index": index, **histogram(found["dimension"][i], edges["dimension"])},
        }
        for i, each in enumerate(settings)
    ]


def wasserstein(a: Tensor, b: Tensor) -> Tensor:
    """The exact 1-Wasserstein distance of every column: the mean over u in (0, 1) of |quantile_a(u) - quantile_b(u)|.

    Args:
        a: [n, k], every column ascending.
        b: [m, k], likewise.

    Returns:
        float64 [k]
    """
    n, m = len(a), len(b)
    # Both quantile functions are constant between multiples of 1/n and 1/m; in units of 1/(n m) these are integers.
    ends = torch.cat([torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n]).unique()
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), ends[:-1]])
    gaps = (a[starts // m].double() - b[starts // n].double()).abs()
    return ((ends - starts).double().unsqueeze(1) * gaps).sum(dim=0) / (n * m)


def percentile(ascending: Tensor, q: float) -> Tensor:
    """The percentile q of the columns of `ascending` [n, k], linear between rows as numpy's: float64 [k]."""
    place = q / 100 * (len(ascending) - 1)
    low = int(place)
    below, above = ascending[low].double(), ascending[min(low + 1, len(ascending) - 1)].double()
    return below + (above - below) * (place - low)


def log_norms(x: Tensor) -> Tensor:
    """log2 of the L2 norms of the rows of `x` [n, d], at least log2 of `SMALLEST_NORM`: float64 [n]."""
    return torch.linalg.vector_norm(x, dim=1, dtype=torch.float64).clamp(min=SMALLEST_NORM).log2()


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


def _checked(name: str, x: Any, width: int | None = None) -> Tensor:
    """The rows on the CPU, in float32 or float64."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        given = str(x.dtype) if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name}: expected a floating point tensor [rows, d], got {given}")
    if x.dim() != 2 or 0 in x.shape or width not in (None, x.shape[1]):
        raise ValueError(
            f"{name}: expected [rows, {width or 'd'}] with one row or more, got {list(x.shape)}; compare "
            "rows of one block"
        )
    return x.detach().cpu().to(torch.promote_types(x.dtype, torch.float32))
