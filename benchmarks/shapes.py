"""Sizes named after the hookpoints they occur at, and inputs with a chosen share of patches above the threshold."""

from typing import NamedTuple

import torch
from torch import Tensor


class Shape(NamedTuple):
    """One call of the hook."""

    batch: int  # guidance halves counted
    width: int
    height: int
    grid_width: int
    latents: int  # of the SAE
    k: int
    union: int  # latents of the enabled concepts

    @property
    def patches(self) -> int:
        return self.batch * self.height * self.grid_width


SD15 = Shape(batch=2, width=1280, height=16, grid_width=16, latents=20480, k=32, union=2)
CANVAS = Shape(batch=2, width=192, height=8, grid_width=8, latents=1536, k=16, union=6)
QUICK = Shape(batch=2, width=64, height=8, grid_width=8, latents=1024, k=8, union=2)

SHAPES = {
    "SD 1.5 unet.up_blocks.1.attentions.1, 512 px, guidance": SD15,
    "EmojiCanvas 8x8 level, guidance": CANVAS,
}

_HIGH, _MIDDLE, _LOW = 8.0, 0.5, -1.0


def detection(shape: Shape, share: float, inside: bool = True, seed: int = 0) -> dict[str, Tensor | int]:
    """Arguments of `detect_patches` with exactly `round(share * N)` patches above the threshold, which is 0.

    Where `inside`, these patches' pre-activation is above all others (8, the others are N(0, 1)), so all are
    detected and the count has to read the whole dictionary: the dearest case. Otherwise it is 0.5: above the
    threshold, but not among the k largest, and the count may stop early.
    """
    g = torch.Generator().manual_seed(seed)
    rows = torch.randn(shape.patches, shape.width, generator=g)
    weight = torch.randn(shape.latents, shape.width, generator=g) / shape.width**0.5
    own = torch.randperm(shape.latents, generator=g)[: shape.union].sort().values
    wanted = torch.full((shape.patches, shape.union), _LOW)
    chosen = torch.randperm(shape.patches, generator=g)[: round(share * shape.patches)]
    wanted[chosen, 0] = _HIGH if inside else _MIDDLE
    # The smallest change of x that gives the own latents these pre-activations.
    rows += (wanted - rows @ weight[own].t()) @ torch.linalg.pinv(weight[own]).t()
    grid = (shape.batch, shape.height * shape.grid_width, shape.width)
    x = rows.view(grid).transpose(1, 2).reshape(shape.batch, shape.width, shape.height, shape.grid_width)
    return {
        "x": x.contiguous(),
        "weight": weight,
        "bias": torch.zeros(shape.latents),
        "latents": own,
        "thresholds": torch.zeros(1, shape.union),
        "timestep_bin": torch.zeros(shape.batch, dtype=torch.int64),
        "enabled": torch.ones(shape.batch, shape.union, dtype=torch.bool),
        "k": shape.k,
    }


def literal(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    latents: Tensor,
    thresholds: Tensor,
    timestep_bin: Tensor,
    enabled: Tensor,
    k: int,
) -> Tensor:
    """The published tools' way: encode everything, top-k, scatter into zeros [B, N, L], compare."""
    rows = x.flatten(2).transpose(1, 2)
    h = torch.nn.functional.linear(rows, weight, bias)
    values, indices = h.topk(k, dim=-1, sorted=False)
    z = torch.zeros_like(h).scatter_(-1, indices, values.relu())
    floor = thresholds[timestep_bin].masked_fill(~enabled, torch.inf).unsqueeze(1)
    return (z[..., latents] > floor).any(dim=-1)


def replacement(shape: Shape, share: float, layout: torch.memory_format, seed: int = 0) -> dict:
    """Arguments of `replace_patches_` with a random mask."""
    g = torch.Generator().manual_seed(seed)
    patches = shape.height * shape.grid_width
    x = torch.randn(shape.batch, shape.width, shape.height, shape.grid_width, generator=g)
    return {
        "x": x.to(memory_format=layout),
        "mask": torch.rand(shape.batch, patches, generator=g) < share,
        "u": torch.rand(shape.batch, patches, generator=g),
        "height": shape.height,
        "width": shape.grid_width,
    }
