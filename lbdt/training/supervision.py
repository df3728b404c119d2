"""Labels: one latent per concept and style, taught to fire on images that carry it.

Labels belong to images, and which patches carry a concept is not known. So a loss looks at one number per image and
latent: the mean over the patches, or over those where the latent is largest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lbdt.runs.processes import Processes
from lbdt.sae import SparseAutoencoder
from lbdt.training.sparse import Code, EncoderInput, add_dense_gradient, add_pre_gradient

VARIANTS = ("image", "paper", "released", "sparse-sigmoid")
_TINY = 1e-6
_STEEPNESS = 8.0
SIGMOID_SPAN = 4.0
"""A new topk_sigmoid SAE's pre-activations, from silent (-4) to as large as a TopK SAE's mean activation (0)."""


class BatchLabels(NamedTuple):
    """Labels of a batch's images, which have the same number of patches, image by image."""

    latents: Tensor
    """[A] int64, distinct: the latents of the concepts, then of the styles."""
    styles: int
    """How many of them, at the end, are styles'."""
    present: Tensor
    """[S, A], 1 or 0, of the whole batch's images."""
    patches: int
    """M, of one image."""
    concepts: Tensor | None = None
    """[S] int64, places in the source's concepts, -1: none, of the whole batch's images."""
    styles_of: Tensor | None = None
    """[S] int64, places in the source's styles, -1: none."""


@dataclass(frozen=True)
class Supervision:
    """`weight * (assignment + decorrelation * correlation) + l1 * L1`, of pooled pre-activations v [S, A].

    Variants (METHOD.md, 6.3 and 6.4; BCE: binary cross-entropy, mean over images and latents):
        image: BCE with logits 8 (v / a - 1 / 2), a the first batch's mean kept pre-activation (for
            topk_sigmoid v + 4 and 4, see `SIGMOID_SPAN`). Ours, the default: where
            a concept is absent its latent goes silent (v <= 0), where present it becomes as large as those kept, so
            that it is kept itself. With `pool` below 1 only a part of an image's patches has to carry what is in it,
            while the most suspicious ones must be silent where it is not.
        paper: -mean log sigmoid(v) over what is present; the correlation is signed.
        released: SAEmnesia v1.6. BCE with logits mean ReLU(h), >= 0, so an absent concept's never gets below log 2;
            L1 is mean ReLU(h) over all latents.
        sparse-sigmoid: G-SAE for diffusion models. BCE of the mean of sigmoid(h) over the patches, 0 where the latent
            is not among the k; a latent that is kept nowhere in an image learns nothing from it.

    The correlation is the mean squared (paper: mean) Pearson correlation over pairs of a concept's and a style's
    latent, over the batch's images. L1 is, but for released, the mean over rows of the summed activations.
    """

    variant: str = "image"
    weight: float = 1.0
    decorrelation: float = 0.1
    l1: float = 0.0
    pool: float = 1.0
    """Share of an image's patches, those with the largest value, that v is the mean of; 1: all, 0: the largest."""
    strength: float = 1.0
    """How many times a, with the variant image, the latent of a present concept becomes."""

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ValueError(
                f"supervision variant: expected one of {', '.join(VARIANTS)}; got {self.variant!r}"
            )
        for name in ("weight", "decorrelation", "l1"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name}: expected a finite number >= 0, got {getattr(self, name)}")
        if not (math.isfinite(self.strength) and self.strength > 0):
            raise ValueError(f"strength: expected a finite number > 0, got {self.strength}")
        if not 0 <= self.pool <= 1:
            raise ValueError(f"pool: expected a share in [0, 1], got {self.pool}")

    def kept_penalty(self, rows: int) -> float:
        """Gradient of the L1 term with respect to every kept activation, of a batch of `rows`."""
        return 0.0 if self.variant == "released" else self.l1 / rows

    def accumulate(
        self,
        sae: SparseAutoencoder,
        read: EncoderInput,
        h: Tensor,  # [n, L] pre-activations
        code: Code,
        labelled: BatchLabels,
        count: int,  # rows of the whole batch
        activation: float,  # a, before the first step
        world: Processes,
    ) -> dict[str, Tensor]:
        """Adds the gradient of the supervised term; returns `assignment`, `correlation` and where used `l1`."""
        latents = labelled.latents
        v = h[:, latents].detach().requires_grad_(True)
        sigmoid = sae.config.activation == "topk_sigmoid"
        own = self._pooled(v, code, labelled, None if sigmoid else activation)
        whole = world.gather(own, labelled.present.shape[0])
        assignment = self._assignment(whole, labelled.present)
        correlation = self._correlation(whole, labelled.styles)
        loss = self.weight * (assignment + self.decorrelation * correlation)
        (dh,) = torch.autograd.grad(loss, v)
        add_pre_gradient(sae, read, latents, dh)
        # Every process computes these of the whole batch; the sum over processes is one of them.
        terms = {
            name: term.detach() / world.size
            for name, term in (("assignment", assignment), ("correlation", correlation))
        }
        if self.l1 and self.variant == "released":
            terms["l1"] = self._all_latents(sae, read, h, count)
        elif self.l1:
            terms["l1"] = code.values.detach().sum() / count
        return terms

    def _pooled(self, v: Tensor, code: Code, labelled: BatchLabels, activation: float | None) -> Tensor:
        """[S', A] of this process's images; no `activation`: topk_sigmoid."""
        if self.variant == "released":
            v = v.relu()
        elif self.variant == "image":
            share = v / SIGMOID_SPAN + 1 if activation is None else v / activation
            v = _STEEPNESS * (share / self.strength - 0.5)
        elif self.variant == "sparse-sigmoid":
            v = v.sigmoid() * _kept(code, labelled.latents, v)
        return pooled(v, labelled.patches, self.pool)

    def _assignment(self, v: Tensor, present: Tensor) -> Tensor:
        if self.variant == "paper":
            return -(F.logsigmoid(v) * present).sum() / present.sum().clamp(min=1)
        if self.variant == "sparse-sigmoid":
            return F.binary_cross_entropy(v.clamp(0, 1), present)
        return F.binary_cross_entropy_with_logits(v, present)

    def _correlation(self, v: Tensor, styles: int) -> Tensor:
        objects = v.shape[1] - styles
        if not (objects and styles and self.decorrelation):
            return v.new_zeros(())
        unit = F.normalize(v - v.mean(0), dim=0, eps=_TINY)
        pairs = unit[:, :objects].T @ unit[:, objects:]
        return pairs.mean() if self.variant == "paper" else pairs.square().mean()

    def _all_latents(self, sae: SparseAutoencoder, read: EncoderInput, h: Tensor, count: int) -> Tensor:
        """Mean ReLU(h) over the whole batch, this process's part; adds its gradient."""
        over = count * h.shape[1]
        add_dense_gradient(sae, read, (h > 0).to(h.dtype) * (self.l1 / over))
        return h.relu().sum() / over


def pooled(v: Tensor, patches: int, share: float) -> Tensor:
    """The mean of every column of `v` [S * patches, A] over the share of an image's patches in which it is largest, one
    patch at least: [S, A]."""
    images, top = v.unflatten(0, (-1, patches)), max(1, math.ceil(share * patches))
    return images.mean(1) if top == patches else images.topk(top, dim=1).values.mean(1)


def _kept(code: Code, latents: Tensor, v: Tensor) -> Tensor:
    """1 where a latent is among a row's active entries, else 0, [n, A]."""
    place = torch.full((1 + max(int(latents.max()), int(code.cols.max())),), -1, device=v.device)
    place[latents] = torch.arange(latents.numel(), device=v.device)
    at = place[code.cols]
    mask = torch.zeros_like(v)
    mask[code.rows[at >= 0], at[at >= 0]] = 1
    return mask
