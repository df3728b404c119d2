"""Activations with planted concepts: known directions in known patches of known images, over a sparse background."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from lbdt.activations import InMemory, Site

D, PATCHES, CONCEPTS, STYLES, BACKGROUND = 24, 16, 4, 2, 12
SITE = Site("unet.mid_block.attentions.0", "update")
CONCEPT_NAMES = tuple(f"concept {i}" for i in range(CONCEPTS))
STYLE_NAMES = tuple(f"style {i}" for i in range(STYLES))
OBJECT_PATCHES = 4


def directions() -> torch.Tensor:
    """[CONCEPTS + STYLES + BACKGROUND, D], unit rows."""
    count = CONCEPTS + STYLES + BACKGROUND
    return F.normalize(torch.randn(count, D, generator=torch.Generator().manual_seed(0)), dim=1)


def source(prompts: int = 96, seed: int = 1, timesteps: int = 2, labelled: bool = True, **kwargs) -> InMemory:
    """Prompt p carries concept p % CONCEPTS in OBJECT_PATCHES random patches and style p % STYLES in all of them.
    `.where` [prompts, T, M] bool: the concept's patches."""
    g = torch.Generator().manual_seed(seed)
    shape = (prompts, timesteps, PATCHES)
    table = directions()
    chosen = torch.rand(*shape, BACKGROUND, generator=g).topk(3).indices
    z = torch.zeros(*shape, len(table))
    z[..., CONCEPTS + STYLES :].scatter_(-1, chosen, torch.rand(*shape, 3, generator=g) + 0.5)
    where = torch.zeros(shape, dtype=torch.bool)
    where.scatter_(-1, torch.rand(shape, generator=g).topk(OBJECT_PATCHES).indices, True)
    concept, style = torch.arange(prompts) % CONCEPTS, torch.arange(prompts) // CONCEPTS % STYLES
    for p in range(prompts):
        z[p, ..., concept[p]] = 1.5 * where[p]
        z[p, ..., CONCEPTS + style[p]] = 0.8
    labels = {"concepts": CONCEPT_NAMES, "concept": concept, "styles": STYLE_NAMES, "style": style}
    made = InMemory(
        z @ table + 1.0,
        site=SITE,
        timesteps=range(timesteps, 0, -1),
        prompts_per_shard=8,
        **(labels if labelled else {}),
        **kwargs,
    )
    made.where = where
    return made
