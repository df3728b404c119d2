"""Merging dictionaries of disjoint sets of prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lbdt.dictionary.checks import require_same_bins

if TYPE_CHECKING:
    from lbdt.dictionary.concept_dictionary import ConceptDictionary


def merge(first: ConceptDictionary, second: ConceptDictionary) -> ConceptDictionary:
    """The dictionary over both sets of prompts (which must be disjoint), concepts of either, as a new
    object.

    Histograms merge where both have them for the same concepts and candidates; banks and assignments are joined.
    Means were rounded to float32; to merge parts of one run bit for bit, merge their `ConceptStatistics`.

    Raises:
        ValueError: other timesteps or latents, other latents assigned to a concept, or histograms that do not merge
            (`without_histograms()` drops them).
    """
    require_same_bins(first, second)
    if (first.histograms is None) != (second.histograms is None) or (
        first.histograms is not None and first.concepts != second.concepts
    ):
        raise ValueError(
            "cannot merge: calibrations of other concepts, or of one side only; merge "
            "without_histograms() of both, then calibrate again"
        )
    histograms = None if first.histograms is None else first.histograms.merge(second.histograms)
    concepts = (*first.concepts, *(name for name in second.concepts if name not in first.concepts))
    sums = torch.zeros(len(concepts), *first.mean.shape[1:])
    counts = torch.zeros(len(concepts), first.counts.shape[1], dtype=torch.int64)
    for part in (first, second):
        rows = torch.tensor([concepts.index(name) for name in part.concepts])
        sums[rows] += part.mean * part.counts.unsqueeze(-1)
        counts[rows] += part.counts
    both_fired = first.fired is not None and second.fired is not None
    banks = [part.bank for part in (first, second) if part.bank is not None]
    assigned = (first.assigned or {}) | (second.assigned or {})
    moved = [name for name, latent in (first.assigned or {}).items() if assigned[name] != latent]
    if moved:
        raise ValueError(
            f"cannot merge: other latents are assigned to {', '.join(moved)}; one SAE per dictionary"
        )
    return first.replaced(
        concepts=concepts,
        mean=sums / counts.clamp(min=1).unsqueeze(-1),
        counts=counts,
        histograms=histograms,
        bank=torch.cat(banks, dim=1) if banks else None,
        peak=max(first.peak, second.peak),
        fired=first.fired + second.fired if both_fired else None,
        assigned=assigned,
    )
