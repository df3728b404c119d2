"""First pass over the validation prompts: running sums of activations (method.md, "Concept-latent
dictionary")."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lbdt.dictionary.concepts import ConceptDictionary
    from lbdt.sae import SparseCode


class ConceptStatistics:
    """Sums of `z` per (concept, timestep bin, latent): [C, T, L] float32, and patch counts [C, T] int64;
    `fired` counts the patches on which each latent was active, [L] int64; `peak` is the largest activation seen.

    No activations are kept, one pass suffices, and sums of several processes merge.
    """

    def __init__(self, concepts: Sequence[str], timesteps: Tensor | Sequence[int], num_latents: int) -> None:
        """`timesteps`: the T timestep values of the bins, strictly descending, as the UNet is called with
        them."""
        self.concepts = checked_concepts(concepts)
        self.timesteps = checked_timesteps(timesteps)
        if num_latents < 1:
            raise ValueError(f"num_latents: expected an integer >= 1, got {num_latents}")
        self.sums = torch.zeros(len(self.concepts), len(self.timesteps), num_latents)
        self.counts = torch.zeros(len(self.concepts), len(self.timesteps), dtype=torch.int64)
        self.fired = torch.zeros(num_latents, dtype=torch.int64)
        self.peak = 0.0

    @property
    def num_latents(self) -> int:
        return self.sums.shape[2]

    def add(self, concept: int, bin: int, code: SparseCode) -> None:
        """Adds the patches of `code` (values and indices [B, N, k] or [N, k]) of images of a concept at a
        bin."""
        values, indices, patches = checked_code(code, self.num_latents)
        check_place(concept, bin, self.counts)
        # Summed over the batch first: a long float32 running sum would lose the small addends.
        batch = torch.zeros(self.num_latents).index_add_(0, indices, values)
        self.sums[concept, bin] += batch
        self.counts[concept, bin] += patches
        self.fired += torch.bincount(indices[values > 0], minlength=self.num_latents)
        self.peak = max(self.peak, float(values.max()) if values.numel() else 0.0)

    def merge(self, other: ConceptStatistics) -> ConceptStatistics:
        """The statistics of both sets of prompts, as a new object.

        Raises:
            ValueError: other concepts, timesteps or number of latents.
        """
        require_same(self, other)
        merged = ConceptStatistics(self.concepts, self.timesteps, self.num_latents)
        merged.sums = self.sums + other.sums
        merged.counts = self.counts + other.counts
        merged.fired = self.fired + other.fired
        merged.peak = max(self.peak, other.peak)
        return merged

    def build(self) -> ConceptDictionary:
        """The dictionary of means. Places without patches keep a count of 0 and can still be merged in."""
        from lbdt.dictionary.concepts import ConceptDictionary

        mean = self.sums / self.counts.clamp(min=1).unsqueeze(-1)
        return ConceptDictionary(
            self.concepts,
            self.timesteps,
            mean,
            self.counts.clone(),
            peak=self.peak,
            fired=self.fired.clone(),
        )


def checked_concepts(concepts: Sequence[str]) -> tuple[str, ...]:
    """Distinct, non-empty names."""
    if isinstance(concepts, str):
        raise TypeError(f"concepts: expected a sequence of names, got the string {concepts!r}")
    names = tuple(concepts)
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"concepts: expected one or more non-empty names, got {names!r}")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"concepts: expected distinct names, got {', '.join(repeated)} more than once")
    return names


def checked_timesteps(timesteps: Tensor | Sequence[int]) -> Tensor:
    """[T] int64 on the CPU, strictly descending."""
    given = torch.as_tensor(timesteps).cpu()
    values = given.to(torch.int64)
    if given.dim() != 1 or not given.numel():
        raise ValueError(f"timesteps: expected a non-empty list [T], got shape {tuple(given.shape)}")
    if not bool((given == values).all()):
        raise ValueError(f"timesteps: expected whole numbers, got {given.tolist()}; round them for the bins")
    if not bool((values[1:] < values[:-1]).all()):
        raise ValueError(f"timesteps: expected strictly descending values, got {values.tolist()}")
    return values.clone()


def checked_code(code: SparseCode, num_latents: int) -> tuple[Tensor, Tensor, int]:
    """The entries of `code`, flat on the CPU (float32, int64), and its number of patches."""
    values, indices = code
    if values.shape != indices.shape or values.dim() < 2:
        raise ValueError(
            f"code: expected values and indices of one shape [B, N, k], got {tuple(values.shape)} and "
            f"{tuple(indices.shape)}"
        )
    patches = values[..., 0].numel() if values.shape[-1] else 0
    values, indices = values.detach().reshape(-1).float().cpu(), indices.reshape(-1).long().cpu()
    if indices.numel() and (int(indices.min()) < 0 or int(indices.max()) >= num_latents):
        raise ValueError(
            f"code: expected indices in [0, {num_latents}), got {int(indices.min())} to "
            f"{int(indices.max())}; the SAE is not the one that these statistics were made for"
        )
    if not bool((values >= 0).all()) or not bool(torch.isfinite(values).all()):
        raise ValueError("code: expected finite activations >= 0, got negative, infinite or NaN values")
    return values, indices, patches


def check_place(concept: int, bin: int, counts: Tensor) -> None:
    """Negative numbers would silently count from the end."""
    if not 0 <= concept < counts.shape[0] or not 0 <= bin < counts.shape[1]:
        raise ValueError(
            f"expected concept in [0, {counts.shape[0]}) and bin in [0, {counts.shape[1]}), got {concept} "
            f"and {bin}"
        )


def require_same(first, second) -> None:
    """Both have the same concepts, timesteps and number of latents."""
    if first.concepts != second.concepts:
        raise ValueError(f"cannot merge: concepts {first.concepts} and {second.concepts} differ")
    require_same_bins(first, second)


def require_same_bins(first, second) -> None:
    """Both have the same timesteps and number of latents."""
    if not torch.equal(first.timesteps, second.timesteps):
        raise ValueError(
            f"cannot merge: timesteps {first.timesteps.tolist()} and {second.timesteps.tolist()} differ; "
            f"collect both with the same scheduler and number of steps"
        )
    if first.num_latents != second.num_latents:
        raise ValueError(
            f"cannot merge: {first.num_latents} and {second.num_latents} latents; one SAE per dictionary"
        )
