"""Sizes named after the hookpoints they occur at, and inputs with a chosen share of patches above the
threshold."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lbdt.bench.measured_shares import MeasuredShares

PADDING = 1
THRESHOLD = 0.25  # on pre-activations
BANK = 32
"""Embeddings kept for feature maps without an undetected patch, as in the shipped eraser."""


class Shape(NamedTuple):
    """One call of the hook."""

    name: str
    images: int
    halves: int
    """Guidance halves: 2, or 1 without guidance."""
    width: int
    """d, channels."""
    height: int
    grid_width: int
    latents: int
    """L, of the SAE."""
    k: int
    union: int
    """U, latents of the enabled concepts."""
    update: bool = False
    """The SAE is of the block's output minus its input."""
    target: str = "output"
    """What the hook replaces: the block's output, or its update."""

    @property
    def batch(self) -> int:
        """Rows of the feature map."""
        return self.images * self.halves

    @property
    def patches(self) -> int:
        """Patches of all rows."""
        return self.batch * self.height * self.grid_width


def _sd15(images: int) -> Shape:
    name = f"SD 1.5 unet.up_blocks.1.attentions.1, 512 px, {images} image{'s' * (images > 1)}, guidance"
    return Shape(name, images, 2, 1280, 16, 16, latents=20480, k=32, union=2)


_SDXL = dict(width=1280, latents=5120, k=10, union=2, update=True)
SHAPES = {
    "sd15-b1": _sd15(1),
    "sd15-b4": _sd15(4),
    "sd15-b8": _sd15(8),
    "sdxl-1024": Shape(
        "SDXL unet.up_blocks.0.attentions.1, 1024 px, 1 image, guidance",
        1,
        2,
        height=32,
        grid_width=32,
        **_SDXL,
    ),
    "sdxl-turbo": Shape(
        "SDXL Turbo unet.up_blocks.0.attentions.1, 512 px, 1 image", 1, 1, height=16, grid_width=16, **_SDXL
    ),
    "canvas": Shape(
        "EmojiCanvas unet.up_blocks.0.attentions.1, 128 px, 1 image, guidance",
        *(1, 2, 192, 8, 8),
        latents=1536,
        k=16,
        union=6,
        update=True,
        target="update",
    ),
}
HOST = {"host": Shape("so small that only the host's time counts", 1, 2, 8, 2, 2, latents=16, k=2, union=2)}
QUICK = {"quick": Shape("small sizes, for tests", 1, 2, 64, 8, 8, latents=1024, k=8, union=2)}
SHARES = (0.0, 0.01, 0.1, 0.5, 1.0)

_HIGH, _MIDDLE, _LOW = 8.0, 0.5, -1.0


class Place(NamedTuple):
    """Where the inputs of a case lie, and how they are drawn."""

    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def put(self, x: Tensor) -> Tensor:
        """`x` on the device and, if floating point, in the dtype."""
        return x.to(self.device, self.dtype if x.is_floating_point() else x.dtype)


# The draws are made on the CPU, so every device and dtype gets the same ones. What is kept here may be asked
# for in inference mode first, and must then still serve outside of it.
@functools.lru_cache(maxsize=1)
@torch.inference_mode(False)
def _encoder(width: int, latents: int, union: int, seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(latents, width, generator=g) / width**0.5
    return weight, torch.randperm(latents, generator=g)[:union].sort().values


@functools.lru_cache(maxsize=1)
@torch.inference_mode(False)
def _placed_encoder(width: int, latents: int, union: int, place: Place) -> tuple[Tensor, Tensor]:
    weight, own = _encoder(width, latents, union, place.seed)
    return place.put(weight), place.put(own)


def detection(
    shape: Shape,
    share: float,
    inside: bool = True,
    place: Place | None = None,
    measured: MeasuredShares | None = None,
    alike: bool = False,
) -> dict[str, Any]:
    """Arguments of `detect_patches` with exactly `round(share * N)` patches above the threshold.

    Where `inside`, these patches' pre-activation is above all others (8, the others are N(0, 1)), so all are
    detected and the count has to read the whole dictionary: the dearest case. Otherwise it is 0.5: above the
    threshold, but not among the k largest, and the count may stop early. With `measured`, its shares of the patches are
    are of either kind, those that are refuted as deep in the dictionary as it says.

    Where `alike`, all rows of the dictionary are nearly the same, and so all pre-activations of a patch, those above
    the threshold 0.5: no bound tells them apart.
    """
    place = place or Place()
    weight, own = _encoder(shape.width, shape.latents, shape.union, place.seed)
    if alike:
        weight = weight[own[:1]] + weight / 1024
    g = torch.Generator().manual_seed(place.seed + 1)
    rows = torch.randn(shape.patches, shape.width, generator=g)
    wanted = torch.full((shape.patches, shape.union), _LOW)
    above = chosen(shape, share if measured is None else measured.candidates, g)
    wanted[above, 0] = _HIGH if inside else _MIDDLE
    if measured is not None:
        refuted = above[round(measured.detected * shape.patches) :]
        values = measured.values(shape.k, shape.latents)
        wanted[refuted, 0] = values[torch.arange(len(refuted)) * len(values) // max(len(refuted), 1)]
    adjusted = own
    if alike:
        wanted, adjusted = wanted[:, :1].clamp(max=_MIDDLE), own[:1]
    # The smallest change of x that gives the own latents these pre-activations.
    rows += (wanted - rows @ weight[adjusted].t()) @ torch.linalg.pinv(weight[adjusted]).t()
    x, minus = feature_map(shape, rows), None
    if shape.update:
        minus = torch.randn(x.shape, generator=g)
        x = x + minus
    placed_weight, placed_own = _placed_encoder(shape.width, shape.latents, shape.union, place)
    if alike:
        placed_weight = place.put(weight)
    return {
        "x": place.put(x),
        "weight": placed_weight,
        "bias": torch.zeros(shape.latents, device=place.device),
        "latents": placed_own,
        "thresholds": torch.full((1, shape.union), THRESHOLD, device=place.device),
        "timestep_bin": torch.zeros(shape.batch, dtype=torch.int64, device=place.device),
        "enabled": torch.ones(shape.batch, shape.union, dtype=torch.bool, device=place.device),
        "k": shape.k,
        "minus": None if minus is None else place.put(minus),
    }


def replacement(
    shape: Shape,
    share: float,
    layout: torch.memory_format = torch.contiguous_format,
    place: Place | None = None,
) -> dict[str, Any]:
    """Arguments of `replace_patches_` with exactly `round(share * N)` patches in the mask, before padding."""
    place = place or Place()
    g = torch.Generator().manual_seed(place.seed + 1)
    x = feature_map(shape, torch.randn(shape.patches, shape.width, generator=g))
    mask = torch.zeros(shape.patches, dtype=torch.bool)
    mask[chosen(shape, share, g)] = True
    return {
        "x": place.put(x).to(memory_format=layout),
        "mask": place.put(mask.view(shape.batch, -1)),
        "u": torch.rand(shape.batch, shape.patches // shape.batch, generator=g).to(place.device),
        "height": shape.height,
        "width": shape.grid_width,
        "padding": PADDING,
        "bank": place.put(bank(shape, place.seed).expand(shape.batch, -1, -1)),
    }


def bank(shape: Shape, seed: int) -> Tensor:
    """[1, M, d] embeddings."""
    return torch.randn(1, BANK, shape.width, generator=torch.Generator().manual_seed(seed + 2))


def chosen(shape: Shape, share: float, generator: torch.Generator) -> Tensor:
    """`round(share * N)` distinct patches of all rows."""
    return torch.randperm(shape.patches, generator=generator)[: round(share * shape.patches)]


def feature_map(shape: Shape, rows: Tensor) -> Tensor:
    """Rows [B * N, d] as a contiguous [B, d, H, W]."""
    x = rows.view(shape.batch, shape.height, shape.grid_width, shape.width)
    return x.permute(0, 3, 1, 2).contiguous()
