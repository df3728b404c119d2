"""Labels compared: images of one label are to look alike in the SAE's latents, and unlike those of others.

Which patches of an image carry what its label names is not known here: collection keeps no attention. So an image is,
latent by latent, the mean over those of its patches where that latent is largest. (SAEParate, whose loss this is,
weighs the patches by a map of cross-attention to the concept's word, which its collection keeps.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lbdt.activations.batches import PAIRED
from lbdt.runs.processes import Processes
from lbdt.sae import SparseAutoencoder
from lbdt.training.sparse import Code, EncoderInput, add_dense_gradient
from lbdt.training.supervision import BatchLabels, pooled


@dataclass(frozen=True)
class Contrast:
    """`weight` times the supervised contrastive loss (arXiv 2004.11362) of pooled activations (METHOD.md, 6.8)."""

    by: str = "concepts"
    """What makes two images alike: the same of "concepts" | "styles" | "both"."""
    weight: float = 0.1
    temperature: float = 0.07
    hard: float = 1.0
    """Where `by` is "both": the weight of images that share one of the two among those that one is told from."""
    pool: float = 0.25
    """Share of an image's patches, those with the largest value, that a latent's is the mean of; 1: all, 0: the
    largest."""

    def __post_init__(self) -> None:
        if self.by not in PAIRED:
            raise ValueError(f"by: expected one of {', '.join(PAIRED)}; got {self.by!r}")
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise ValueError(f"weight: expected a finite number >= 0, got {self.weight}")
        for name in ("temperature", "hard"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name}: expected a finite number > 0, got {getattr(self, name)}")
        if not 0 <= self.pool <= 1:
            raise ValueError(f"pool: expected a share in [0, 1], got {self.pool}")

    @property
    def pairs(self) -> str:
        """What the images have in common that batches hold in twos."""
        return self.by

    @property
    def kinds(self) -> tuple[str, ...]:
        """The labels that are needed."""
        return ("concepts", "styles") if self.by == "both" else (self.by,)

    def kept_penalty(self, rows: int) -> float:
        """0: no penalty on kept activations."""
        return 0.0

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
        """Adds the gradient of the loss; returns it as `contrast`, without its weight."""
        v = h.detach().requires_grad_(True)
        images = world.gather(pooled(v.relu(), labelled.patches, self.pool), labelled.present.shape[0])
        loss = self.loss(images, labelled.concepts, labelled.styles_of)
        (dh,) = torch.autograd.grad(self.weight * loss, v)
        add_dense_gradient(sae, read, dh)
        # Every process computes it of the whole batch; the sum over processes is one of them.
        return {"contrast": loss.detach() / world.size}

    def loss(
        self,
        images: Tensor,  # [S, L], S >= 2
        concepts: Tensor,  # [S] int64, -1: none
        styles: Tensor,  # [S] int64, -1: none
    ) -> Tensor:
        """The loss, a scalar: the mean over images with a like one; 0 where none has. One without its label is told
        from the others, and like none."""
        unit = F.normalize(images, dim=1)
        logits = unit @ unit.T / self.temperature
        given = [{"concepts": concepts, "styles": styles}[kind] for kind in self.kinds]
        known = torch.stack([labels >= 0 for labels in given]).all(0)
        same = torch.stack([labels.unsqueeze(0) == labels.unsqueeze(1) for labels in given])
        known = known.unsqueeze(0) & known.unsqueeze(1)
        own = torch.eye(images.shape[0], dtype=torch.bool, device=images.device)
        like = same.all(0) & known & ~own
        if self.by == "both":
            logits = logits + math.log(self.hard) * (same.any(0) & ~same.all(0) & known)
        logits = logits.masked_fill(own, -torch.inf)
        surprise = torch.logsumexp(logits, dim=1, keepdim=True) - logits
        found = like.sum(1)
        mean = surprise.masked_fill(~like, 0).sum(1) / found.clamp(min=1)
        return mean.sum() / (found > 0).sum().clamp(min=1)
