"""First pass over the validation prompts: running sums of activations (METHOD.md, 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lbdt.dictionary.checks import (
    check_place,
    checked_code,
    checked_concepts,
    checked_timesteps,
    require_same,
)

if TYPE_CHECKING:
    from lbdt.dictionary.concept_dictionary import ConceptDictionary
    from lbdt.sae import SparseCode

_UNIT = 2.0**-30
"""Activations are rounded to whole multiples: exact for float32 values from 2^-7 on, 6 digits from 5e-4 on."""
_LIMIT = 2**63
"""The limit of a sum in units: 1e9 patches of mean activation 8.6 in one place, or 1e6 patches of mean 8600."""


class ConceptStatistics:
    """Sums of `z` per (concept, timestep bin, latent): [C, T, L], and patch counts [C, T] int64; `fired` counts the
    patches on which each latent was active, [L] int64; `peak` is the largest activation seen.

    No activations are kept, one pass suffices, and sums of several processes merge. Sums are whole numbers (units of
    2^-30 in int64), so they are the same whatever the order, the batches and the number of processes or threads.
    """

    def __init__(self, concepts: Sequence[str], timesteps: Tensor | Sequence[int], num_latents: int) -> None:
        """`timesteps`: the T timestep values of the bins, strictly descending, as the UNet is called with them."""
        self.concepts = checked_concepts(concepts)
        self.timesteps = checked_timesteps(timesteps)
        if num_latents < 1:
            raise ValueError(f"num_latents: expected an integer >= 1, got {num_latents}")
        place = (len(self.concepts), len(self.timesteps))
        self.units = torch.zeros(*place, num_latents, dtype=torch.int64)
        self.counts = torch.zeros(*place, dtype=torch.int64)
        self.fired = torch.zeros(num_latents, dtype=torch.int64)
        self.peak = 0.0

    @property
    def num_latents(self) -> int:
        return self.units.shape[2]

    @property
    def sums(self) -> Tensor:
        """The sums of `z`, [C, T, L] float32."""
        return torch.stack([(units.double() * _UNIT).float() for units in self.units])

    def add(self, concept: int, bin: int, code: SparseCode) -> None:
        """Adds the patches of `code` (values and indices [B, N, k] or [N, k]) of images of a concept at a
        bin.

        Raises:
            ValueError: bad places, indices or values, or sums beyond 2^33; nothing is added then.
        """
        values, indices, patches = checked_code(code, self.num_latents)
        check_place(concept, bin, self.counts)
        peak = max(self.peak, float(values.max()) if values.numel() else 0.0)
        _require_room(patches, peak)
        units = (values.double() / _UNIT).round().long()
        row = self.units[concept, bin].index_add(0, indices, units)
        _require_unwrapped(row)
        self.units[concept, bin] = row
        self.counts[concept, bin] += patches
        self.fired += torch.bincount(indices[values > 0], minlength=self.num_latents)
        self.peak = peak

    def merge(self, other: ConceptStatistics) -> ConceptStatistics:
        """The statistics of both sets of prompts, as a new object.

        Raises:
            ValueError: other concepts, timesteps or number of latents, or sums beyond 2^33.
        """
        require_same(self, other)
        merged = ConceptStatistics(self.concepts, self.timesteps, self.num_latents)
        merged.units = self.units + other.units
        _require_unwrapped(merged.units)
        merged.counts = self.counts + other.counts
        merged.fired = self.fired + other.fired
        merged.peak = max(self.peak, other.peak)
        return merged

    def build(self) -> ConceptDictionary:
        """The dictionary of means. Places without patches keep a count of 0 and can still be merged in."""
        from lbdt.dictionary.concept_dictionary import ConceptDictionary

        mean = torch.empty(self.units.shape)
        for row, units, counts in zip(mean, self.units, self.counts, strict=True):
            row.copy_(units.double() * _UNIT / counts.clamp(min=1).unsqueeze(-1))
        return ConceptDictionary(
            self.concepts,
            self.timesteps,
            mean,
            self.counts.clone(),
            peak=self.peak,
            fired=self.fired.clone(),
        )


def _require_room(patches: int, peak: float) -> None:
    """One batch must fit, so that a sum wraps at most once and is then negative."""
    if patches * peak / _UNIT >= _LIMIT:
        raise ValueError(
            f"code: {patches} patches with activations up to {peak:.3g} do not fit the sums (below "
            f"{_LIMIT * _UNIT:.3g}); add fewer patches at a time, or check the SAE's scale"
        )


def _require_unwrapped(units: Tensor) -> None:
    if int(units.min()) < 0:
        raise ValueError(
            f"the activations of a concept and timestep add up to more than {_LIMIT * _UNIT:.3g}; use fewer prompts, "
            "or check the SAE's scale"
        )
