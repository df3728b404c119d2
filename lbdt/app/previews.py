"""What a picture looks like while it emerges."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

CHEAP = 5_000_000
"""Parameters of a decoder that is run for every preview: EmojiCanvas's has 131,459 (7 ms on two AMD
cores, beside 34 ms for a step), Stable Diffusion's 50 million."""
SIDE = 256
"""The longest side of a preview, pixels."""
_CELLS, _CELL = 8, 4
_MOST_LATENTS = 1 << 20
_MADE: weakref.WeakKeyDictionary[Any, Previews] = weakref.WeakKeyDictionary()


class Previews:
    """Pictures of latents [1, c, h, w]: by the pipeline's decoder where that is cheap, else by a linear map from a
    latent's channels to its colour.

    The map is the least squares fit on a chart of 64 colours that the pipeline's own encoder has read, so it takes
    whatever latents there are. Where the pipeline has no such autoencoder there is none.
    """

    def __init__(self, pipe: Any) -> None:
        """Runs the encoder once, where the decoder is not cheap."""
        self._pipe = weakref.ref(pipe)
        self._map: Tensor | None = None
        vae = getattr(pipe, "vae", None)
        decoder = getattr(vae, "decoder", None)
        self._decodes = decoder is not None and sum(p.numel() for p in decoder.parameters()) <= CHEAP
        if vae is not None and not self._decodes:
            self._map = _fitted(vae)

    @torch.no_grad()
    def of(self, latents: Tensor | None) -> Image.Image | None:
        """The RGB picture of the first latents; None where there is no way to tell."""
        if latents is None or latents.dim() != 4 or latents[0].numel() > _MOST_LATENTS:
            return None
        pipe = self._pipe()
        if self._decodes:
            scale, shift = _scaling(pipe.vae)
            parameter = next(pipe.vae.parameters())
            given = (latents[:1] / scale + shift).to(parameter.device, parameter.dtype)
            pixels = pipe.vae.decode(given, return_dict=False)[0]
        elif self._map is not None and len(self._map) == latents.shape[1] + 1:
            ones = torch.ones_like(latents[:1, :1])
            pixels = torch.einsum(
                "bchw,cr->brhw", torch.cat([latents[:1], ones], 1).float(), self._map.to(latents.device)
            )
        else:
            return None
        values = (pixels[0].float() / 2 + 0.5).nan_to_num(0.5).clamp(0, 1).mul(255).round()
        picture = Image.fromarray(values.permute(1, 2, 0).to("cpu", torch.uint8).numpy())
        picture.thumbnail((SIDE, SIDE))
        return picture


def previews_of(pipe: Any) -> Previews:
    """The previews of a pipeline, fitted once. Call it in the pipeline's turn."""
    if pipe not in _MADE:
        _MADE[pipe] = Previews(pipe)
    return _MADE[pipe]


def _scaling(vae: Any) -> tuple[float, float]:
    """What decoding divides latents by, and adds."""
    config = vae.config
    return getattr(config, "scaling_factor", None) or 1.0, getattr(config, "shift_factor", None) or 0.0


@torch.no_grad()
def _fitted(vae: Any) -> Tensor | None:
    """[c + 1, 3] float32: from a latent's channels, and 1, to its colour in [-1, 1]; None where the encoder does not
    read the chart."""
    parameter = next(vae.parameters())
    colours = torch.rand(1, 3, _CELLS, _CELLS, generator=torch.Generator().manual_seed(0)) * 2 - 1
    factor = 2 ** (len(getattr(vae.config, "block_out_channels", ())) - 1)
    chart = F.interpolate(colours, scale_factor=_CELL * max(1, factor)).to(parameter.device, parameter.dtype)
    try:
        found = vae.encode(chart)
    except (NotImplementedError, RuntimeError, TypeError, ValueError):
        return None
    latents = found.latent_dist.mode() if hasattr(found, "latent_dist") else getattr(found, "latents", None)
    if latents is None or latents.dim() != 4:
        return None
    scale, shift = _scaling(vae)
    latents = (latents.float() - shift) * scale
    seen = F.interpolate(colours.to(latents.device), size=latents.shape[2:])
    rows = latents.flatten(2)[0].t()
    rows = torch.cat([rows, torch.ones_like(rows[:, :1])], 1).double().cpu()
    # The normal equations with a little of a ridge: channels that say nothing of the colour leave it alone.
    square = rows.t() @ rows
    ridge = 1e-6 * square.diagonal().mean() * torch.eye(len(square), dtype=torch.float64)
    fit = torch.linalg.solve(square + ridge, rows.t() @ seen.flatten(2)[0].t().double().cpu()).float()
    return fit.to(latents.device) if bool(fit.isfinite().all()) else None
