"""Second pass over the validation prompts: histograms of the candidate latents' activations."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lbdt.dictionary.activation_histograms import Histograms, spaced_edges
from lbdt.dictionary.checks import check_place, checked_code
from lbdt.dictionary.concept_dictionary import ConceptDictionary

if TYPE_CHECKING:
    from lbdt.sae import SparseCode


class Calibration:
    """Histograms of the M best-scoring latents of each concept and bin, over patches of the concept's own
    prompts (`on`) and of all others (`off`): [C, T, M, K] int64, zero activations counted (METHOD.md,
    3.4). A concept's assigned latent is always a candidate: where it scores too low, in place of
    the last.
    """

    def __init__(
        self, dictionary: ConceptDictionary, candidates: int = 4, bins: int = 256, spacing: str = "log"
    ) -> None:
        """`candidates` M and `bins` K per histogram; the first bin holds the zeros, the others are spaced by equal
        ratios ("log") or, for SAEs with a sigmoid, by equal steps of the pre-activation ("logit").

        Raises:
            ValueError: fewer than 2 concepts, sizes out of range, a dictionary with places without patches, or
                "logit" with activations above 1.
        """
        if len(dictionary.concepts) < 2:
            raise ValueError("calibration needs patches of other concepts: expected >= 2 concepts, got 1")
        if not 1 <= candidates <= dictionary.num_latents or bins < 2:
            raise ValueError(
                f"expected 1 <= candidates <= {dictionary.num_latents} and bins >= 2, got {candidates} and "
                f"{bins}"
            )
        if dictionary.peak <= 0:
            raise ValueError(
                "dictionary: its largest activation is 0; add prompts to the statistics, or check the SAE"
            )
        edges = spaced_edges(dictionary.peak, bins, spacing)
        chosen = dictionary.scores().topk(candidates, dim=-1).indices
        for name, latent in (dictionary.assigned or {}).items():
            row = chosen[dictionary.index(name)]
            row[(row != latent).all(-1), -1] = latent
        shape = (*chosen.shape, edges.numel() - 1)
        zeros = torch.zeros(shape, dtype=torch.int64)
        self.dictionary, self.histograms = dictionary, Histograms(chosen, zeros, zeros.clone(), edges)
        self._slots = [latents.unique(return_inverse=True) for latents in chosen.unbind(1)]

    def add(self, concept: int, bin: int, code: SparseCode) -> None:
        """Counts the patches of `code` ([B, N, k] or [N, k]) of images of a concept at a bin."""
        values, indices, patches = checked_code(code, self.dictionary.num_latents)
        on, off = self.histograms.on, self.histograms.off
        check_place(concept, bin, on)
        latents, slots = self._slots[bin]
        counts = self._count(values, indices, latents, patches)[slots]  # [C, M, K]
        on[concept, bin] += counts[concept]
        off[:, bin] += counts
        off[concept, bin] -= counts[concept]

    def _count(self, values: Tensor, indices: Tensor, latents: Tensor, patches: int) -> Tensor:
        """[len(latents), K] histograms of `patches` patches; patches without an entry are zeros."""
        edges = self.histograms.edges
        bins = edges.numel() - 1
        slot_of = torch.full((self.dictionary.num_latents,), -1)
        slot_of[latents] = torch.arange(latents.numel())
        slot = slot_of[indices]
        kept = (slot >= 0) & (values > 0)
        slot = slot[kept]
        bucket = torch.bucketize(values[kept], edges[1:-1])
        counts = torch.bincount(slot * bins + bucket, minlength=latents.numel() * bins).view(-1, bins)
        counts[:, 0] += patches - counts.sum(-1)
        return counts

    def build(self) -> ConceptDictionary:
        """The dictionary with these histograms."""
        return self.dictionary.replaced(histograms=self.histograms.clone())
