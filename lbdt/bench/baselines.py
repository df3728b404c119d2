"""What lbdt is compared with: the literal formula, the same compiled, and the published hooks' way.

Written from descriptions of the published tools (METHOD.md, 4; Cassano et al., arXiv 2606.31699; Cywinski and
Deja, arXiv 2501.18052), not from their code.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def literal(
    x: Tensor,  # [B, d, H, W]
    weight: Tensor,  # [L, d]
    bias: Tensor,  # [L]
    latents: Tensor,  # [U]
    thresholds: Tensor,  # [T, U]
    timestep_bin: Tensor,  # [B]
    enabled: Tensor,  # [B, U]
    k: int,
    minus: Tensor | None = None,  # like x
) -> Tensor:  # [B, N]
    """`detect_patches` as its formula reads: encode everything, top-k, scatter into zeros [B, N, L],
    compare."""
    z = _dense_code(x if minus is None else x - minus, weight, bias, k)
    return _detected(z, latents, thresholds, timestep_bin, enabled)


def literal_topk(x: Tensor, weight: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`encode_topk` by way of all pre-activations [B, N, L]."""
    values, indices = _pre_activations(x, weight, bias).topk(k, dim=-1)
    return values.relu(), indices


class LiteralInt8:
    """`literal` with products of bytes by torch's own int8 matrix product: rows and patches are coded with a scale
    each, and what rounding makes of the answer is let be."""

    def __init__(self, weight: Tensor) -> None:
        self.codes, self.scale = _coded(weight)

    def __call__(
        self, x: Tensor, weight: Tensor, bias: Tensor, k: int, minus: Tensor | None = None, **named: Tensor
    ) -> Tensor:
        """The mask [B, N], by and large; arguments are those of `literal`."""
        codes, scale = _coded((x if minus is None else x - minus).flatten(2).transpose(1, 2).flatten(0, 1))
        h = torch._int_mm(codes, self.codes.t()).float().mul_(scale).mul_(self.scale.t()).add_(bias)
        return _detected(_kept(h, k).view(x.shape[0], -1, h.shape[1]), **named)


class LiteralBfloat16:
    """`literal` in bfloat16, as it is; the rows are cast beforehand."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight.bfloat16()

    def __call__(self, x: Tensor, weight: Tensor, minus: Tensor | None = None, **named: Any) -> Tensor:
        """The mask [B, N], by and large; arguments are those of `literal`."""
        return literal((x if minus is None else x - minus).bfloat16(), self.weight, **named)


def _coded(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [N, d] int8 and scales [N, 1]."""
    scale = rows.abs().amax(1, keepdim=True) / 127
    return (rows / scale).round().to(torch.int8), scale


@functools.cache
def compiled(function: Callable) -> Callable:
    """`function` under `torch.compile`, specialised to the shapes of its calls; compiled at the first of
    them."""
    return torch.compile(function, dynamic=False, fullgraph=True)


def _pre_activations(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x.flatten(2).transpose(1, 2), weight, bias.to(x.dtype))


def _dense_code(x: Tensor, weight: Tensor, bias: Tensor, k: int) -> Tensor:
    return _kept(_pre_activations(x, weight, bias), k)


def _kept(h: Tensor, k: int) -> Tensor:
    values, indices = h.topk(k, dim=-1, sorted=False)
    return torch.zeros_like(h).scatter_(-1, indices, values.relu())


def _detected(
    z: Tensor, latents: Tensor, thresholds: Tensor, timestep_bin: Tensor, enabled: Tensor
) -> Tensor:
    floor = thresholds[timestep_bin].masked_fill(~enabled, torch.inf).unsqueeze(1)
    return (z[..., latents] > floor).any(dim=-1)


class PublishedHook:
    """A forward hook that detects and replaces the way the published prototypes do.

    All patches are encoded, kept by top-k and scattered into zeros [B, N, L]; the selected latents are
    compared with the thresholds of the step's index; the mask grows by a max-pool; then each image has its
    turn: its masked and free patches are listed, donors are drawn by the global generator, and written into
    a clone. An image without a free patch gets Gaussian noise. `step` is set from outside; the prototypes
    count their calls.
    """

    def __init__(
        self,
        weight: Tensor,  # [L, d]
        bias: Tensor,  # [L]
        latents: Tensor,  # [U]
        thresholds: Tensor,  # [T, U]
        k: int,
        padding: int,
        on_update: bool = False,
        noise_scale: float = 1.0,
    ) -> None:
        self.weight, self.bias, self.latents, self.thresholds = weight, bias, latents, thresholds
        self.k, self.padding, self.on_update, self.noise_scale = k, padding, on_update, noise_scale
        self.step = 0
        self.mask: Tensor | None = None  # [B, N], of the last call, grown

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        x = output[0]
        detected = self.detect(x - args[0] if self.on_update else x)
        self.mask = grow(detected, x.shape[2], x.shape[3], self.padding)
        return (replace_in_turn(x, self.mask, self.noise_scale), *output[1:])

    def detect(self, x: Tensor) -> Tensor:
        """Mask [B, N] of `x` [B, d, H, W] at the current step."""
        z = _dense_code(x, self.weight, self.bias, self.k)
        return (z[..., self.latents] > self.thresholds[self.step]).any(dim=-1)


def grow(mask: Tensor, height: int, width: int, padding: int) -> Tensor:
    """The mask [B, N] after a max-pool over squares of side 2 * padding + 1."""
    grid = mask.view(-1, 1, height, width).float()
    return F.max_pool2d(grid, 2 * padding + 1, stride=1, padding=padding).flatten(1) > 0


def replace_in_turn(x: Tensor, mask: Tensor, noise_scale: float = 1.0) -> Tensor:
    """A clone of `x` [B, d, H, W] whose masked patches took embeddings of free ones, image by image."""
    out = x.clone()
    rows, written = x.flatten(2), out.flatten(2)
    for image in range(x.shape[0]):
        masked, free = torch.where(mask[image])[0], torch.where(~mask[image])[0]
        if masked.numel() == 0:
            continue
        if free.numel() == 0:
            written[image] = noise_scale * torch.randn_like(rows[image])
            continue
        donors = free[torch.randint(free.numel(), (masked.numel(),), device=x.device)]
        written[image, :, masked] = rows[image, :, donors]
    return out
