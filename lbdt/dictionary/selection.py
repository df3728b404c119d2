"""Choice of a concept's latents and of their thresholds, as pure functions of the dictionary's tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lbdt.runs.reading import brief

if TYPE_CHECKING:
    from lbdt.dictionary.concept_dictionary import ConceptDictionary

_EPS = 1e-8


@dataclass(frozen=True)
class Selection:
    """Latents of one concept, with a threshold per timestep bin."""

    latents: Tensor
    """[U] int64, ascending: those selected in at least one bin."""
    thresholds: Tensor
    """[T, U] float32 on ACTIVATIONS: detected iff `z > threshold`; +inf where the latent is not selected in the bin."""
    concept: str
    kind: str
    """published | calibrated."""
    criteria: Mapping[str, Any] | None = None
    """The keywords of `ConceptDictionary.select` that chose it; None: not known."""


class DetectionRates(NamedTuple):
    """Fraction of patches above the threshold, per bin and latent; NaN where not selected or without a histogram."""

    on: Tensor
    """[T, U] float32, over patches of the concept's own prompts."""
    off: Tensor
    """[T, U] float32, over patches of other concepts' prompts."""

    def overall(self) -> tuple[float | None, float | None]:
        """(on, off): the most frequent latent of each bin, mean over bins; None without any rate."""
        return _mean_of_largest(self.on), _mean_of_largest(self.off)


def _mean_of_largest(rates: Tensor) -> float | None:
    best = rates.nan_to_num(-1.0).amax(dim=1)
    best = best[best >= 0]
    return float(best.mean()) if best.numel() else None


def active_mean(dictionary: ConceptDictionary) -> Tensor:
    """The mean of each latent over the patches in which it is active, of all concepts and timesteps, [L] float32; 0
    for one that never was (METHOD.md, 3.1; what sdxl-unbox writes as `mean.pt`). ValueError: these patches were not
    counted."""
    if dictionary.fired is None:
        raise ValueError("dictionary: does not say in how many patches a latent was active; score it again")
    sums = sum(
        mean.t().double() @ counts.double()
        for mean, counts in zip(dictionary.mean, dictionary.counts, strict=True)
    )
    return (sums / dictionary.fired.clamp(min=1)).float()


def check_criteria(
    percentile: float | None = None,
    top_k: int | None = None,
    thresholds: str | None = None,
    false_positive: float = 0.02,
    allow_below_published: bool = False,
    assigned: bool | None = None,
) -> None:
    """ValueError unless these keywords of `ConceptDictionary.select` are of their types and fit each other, whatever
    the dictionary."""
    for name, value in (("percentile", percentile), ("false_positive", false_positive)):
        if isinstance(value, bool) or not isinstance(value, (Real, type(None))):
            raise ValueError(f"{name}: expected a number, got {brief(value)}")
    for name, value in (("allow_below_published", allow_below_published), ("assigned", assigned)):
        if not isinstance(value, (bool, type(None))):
            raise ValueError(f"{name}: expected True or False, got {brief(value)}")
    if percentile is not None and top_k is not None:
        raise ValueError(f"give percentile or top_k, not both (got {percentile} and {top_k})")
    if assigned and not (percentile is None and top_k is None):
        raise ValueError(
            f"give percentile, top_k or assigned, one of them (got {percentile}, {top_k} and True)"
        )
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
        raise ValueError(f"top_k: expected an integer >= 1, got {brief(top_k)}")
    if percentile is not None and not 0 <= percentile < 100:
        raise ValueError(f"percentile: expected a number in [0, 100) such as 99.99, got {percentile}")
    if thresholds not in (None, "published", "calibrated"):
        raise ValueError(f"thresholds: expected 'published' or 'calibrated', got {brief(thresholds)}")
    if false_positive is None or not 0 < false_positive < 1:
        raise ValueError(f"false_positive: expected a rate in (0, 1) such as 0.02, got {false_positive}")


def scores(mean: Tensor, counts: Tensor, concepts: Sequence[int]) -> Tensor:
    """SAeUron's score of some concepts, [len(concepts), T, L]:
    `a / (sum_j a + eps) - o / (sum_j o + eps)`, eps 1e-8 (arXiv 2501.18052).

    `o` is the mean over all patches of the other concepts (weighted by `counts` [C, T]); 0 with a single
    concept.
    """
    total = torch.einsum("ctl,ct->tl", mean, counts.to(mean.dtype))
    all_counts = counts.sum(0)
    result = mean.new_empty(len(concepts), *mean.shape[1:])
    for place, concept in enumerate(concepts):
        own, weight = mean[concept], counts[concept].unsqueeze(-1)
        # The subtraction can leave a small negative sum where no other concept fires.
        other = (total - own * weight).clamp(min=0) / (all_counts.unsqueeze(-1) - weight).clamp(min=1)
        result[place] = own / (own.sum(-1, keepdim=True) + _EPS) - other / (
            other.sum(-1, keepdim=True) + _EPS
        )
    return result


def by_percentile(score: Tensor, percentile: float) -> Tensor:
    """[T, L] bool: scores > 0 above the percentile of their bin's L scores (linear interpolation, as numpy)."""
    limit = torch.quantile(score.double(), percentile / 100, dim=-1, keepdim=True)
    return (score > limit) & (score > 0)


def by_rank(score: Tensor, top_k: int) -> Tensor:
    """[T, L] bool: the `top_k` highest scores of each bin that are > 0.

    A score <= 0 means that the latent fires no more for this concept than for others, so it is never taken.
    """
    chosen = torch.zeros_like(score, dtype=torch.bool)
    chosen.scatter_(-1, score.topk(min(top_k, score.shape[-1]), dim=-1).indices, True)
    return chosen & (score > 0)


def tail_counts(histogram: Tensor) -> Tensor:
    """[..., K] counts -> [..., K + 1]: patches with activation > edges[j]. Bins are (edges[j], edges[j+1]]."""
    tail = histogram.flip(-1).cumsum(-1).flip(-1)
    return torch.cat([tail, tail.new_zeros(*tail.shape[:-1], 1)], dim=-1)


def rates_above(histogram: Tensor, edges: Tensor, thresholds: Tensor, overstate: bool = False) -> Tensor:
    """Fraction of a histogram's patches above `thresholds` [...], with histograms [..., K]: [...] float32,
    NaN without patches.

    Exact for a threshold that is an edge. Inside a bin, the bin's patches count as below it, or with
    `overstate` as above it (but never the first bin's, which are the zeros).
    """
    tail = tail_counts(histogram)
    thresholds = thresholds.contiguous()
    index = (
        torch.bucketize(thresholds, edges, right=True) - 1
        if overstate
        else torch.bucketize(thresholds, edges)
    )
    index = index.clamp(1, edges.numel() - 1)
    above = tail.gather(-1, index.unsqueeze(-1)).squeeze(-1)
    return (above.double() / tail[..., 0].double()).float()


def calibrated(off: Tensor, edges: Tensor, false_positive: float) -> Tensor:
    """The (1 - f) quantile of off-concept activations, zeros counted: [...] float32 from histograms [..., K].

    The smallest edge above which at most a fraction f of the patches lies; +inf where even the last bin holds
    more.
    """
    tail = tail_counts(off)[..., :-1]
    allowed = tail.double() <= false_positive * off.sum(-1, keepdim=True).double()
    # The first bin holds the zeros; its lower edge would pass any activation however small.
    allowed[..., 0] = False
    first = allowed.int().argmax(-1)
    return torch.where(allowed.any(-1), edges[first], torch.inf)
