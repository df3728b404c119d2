"""Reference of `lbdt::detect_patches`: which patches carry a concept, by the rank identity."""

import torch
import torch.nn.functional as F
from torch import Tensor

# Floats that one block of dictionary pre-activations may hold (4 MiB in float32).
_BLOCK = 1 << 20
_ROWS = 1024


def detect_patches(
    x: Tensor,  # [B, d, H, W] or [B, d, N]
    weight: Tensor,  # [L, d]
    bias: Tensor,  # [L]
    latents: Tensor,  # [U]
    thresholds: Tensor,  # [T, U]
    timestep_bin: Tensor,  # [B]
    enabled: Tensor,  # [B, U]
    k: int,
    minus: Tensor | None = None,  # like x
    owners: Tensor | None = None,  # [U]
    least: Tensor | None = None,  # [T, C]
    least_of: int = 0,
    deciding: Tensor | None = None,  # [B]
    gated: Tensor | None = None,  # [B]
) -> Tensor:  # [B, N]
    """Mask of the patches in which an enabled latent is detected, in the rows that carry its concept.

    Eq. (METHOD.md, 2.1 and 2.2): latent u of patch p is detected iff `h_u > mu_u` and, for k > 0,
    `#{j != u : h_j > h_u} < k`, with `h = weight (x - minus) + bias`. Of the latents of a patch above their
    threshold only the largest needs the rank test, and it needs a count, so nothing of size N x L is held.
    arXiv 2606.31699; the identity is ours.

    With `least`, the gate (METHOD.md, 2.5): a detected patch is evidence for the concept of its largest passing latent,
    of tied ones the first. It stays in the mask of row b iff row `deciding[b]` has `count * least_of >= least * N`
    patches of that concept; how many did not stay is written to `gated`.
    """
    # Which patches need the rank test is data: elsewhere than on the CPU, reading it would wait for the device.
    select = x.device.type == "cpu"
    mask, column = _detect(x, weight, bias, latents, thresholds, timestep_bin, enabled, k, minus, select)
    if least is None:
        return mask
    concept = torch.where(mask, owners[column], -1) if latents.numel() else column - 1
    needed = least[timestep_bin]
    kept = mask & _carries(concept, needed, least_of or mask.shape[1], deciding)
    if gated is not None:
        gated.copy_(mask.sum(dim=1) - kept.sum(dim=1))
    return kept


def _carries(concept: Tensor, needed: Tensor, least_of: int, deciding: Tensor | None) -> Tensor:
    """Whether the deciding row carries the `concept` [B, N] (-1: none) of each patch, by the counts `needed` [B, C] on
    maps of `least_of` patches; bool [B, N]."""
    counts = needed.new_zeros(needed.shape[0], needed.shape[1] + 1)
    counts.scatter_add_(1, concept + 1, torch.ones_like(concept))
    # floor(count * least_of / N) >= least, as least * N may overflow.
    carried = counts[:, 1:] * least_of // max(concept.shape[1], 1) >= needed
    if deciding is not None:
        carried = carried.index_select(0, deciding)
    # Column 0 is for patches without a concept.
    return F.pad(carried, (1, 0)).gather(1, concept + 1)


def _detect(
    x, weight, bias, latents, thresholds, timestep_bin, enabled, k, minus, select: bool
) -> tuple[Tensor, Tensor]:
    """The mask before the gate, and the column [B, N] of each patch's largest passing latent (anything without one);
    where `select`, only candidates are counted, and until their count reaches k."""
    x = x.flatten(2)
    minus = None if minus is None else minus.flatten(2)
    batch, width, patches = x.shape
    mask = torch.zeros(batch, patches, dtype=torch.bool, device=x.device)
    column = torch.zeros(batch, patches, dtype=torch.int64, device=x.device)
    if mask.numel() == 0 or latents.numel() == 0:
        return mask, column
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    own_weight = weight[latents].to(dtype)
    own_bias = bias[latents].to(dtype).unsqueeze(1)
    floor = thresholds[timestep_bin].to(dtype).masked_fill(~enabled, torch.inf)

    largest = torch.empty(batch, patches, dtype=dtype, device=x.device)
    for image in range(batch):
        columns = x[image].to(dtype)
        if minus is not None:
            columns = columns - minus[image].to(dtype)
        h = torch.addmm(own_bias, own_weight, columns)  # [U, N]
        h = torch.where(h > floor[image].unsqueeze(1), h, -torch.inf)
        largest[image], column[image] = h.max(dim=0)
    candidate = largest > -torch.inf
    if k == 0:
        return candidate, column
    owner = latents[column]

    if select:
        ranked = candidate.flatten().nonzero().squeeze(1)
    else:
        ranked = torch.arange(batch * patches, device=x.device)
    for start in range(0, ranked.numel(), _ROWS):
        rows = ranked[start : start + _ROWS]
        image, place = rows // patches, rows % patches
        patch = x[image, :, place].to(dtype)
        if minus is not None:
            patch = patch - minus[image, :, place].to(dtype)
        inside = _in_first_k(patch, largest[image, place], owner[image, place], weight, bias, k, select)
        mask[image, place] = inside & candidate[image, place]
    return mask, column


def _in_first_k(patch, value, owner, weight, bias, k: int, select: bool) -> Tensor:
    """Whether fewer than k latents other than `owner` [C] exceed `value` [C] on `patch` [C, d]; bool [C]."""
    total = weight.shape[0]
    inside = torch.zeros(patch.shape[0], dtype=torch.bool, device=patch.device)
    rows = torch.arange(patch.shape[0], device=patch.device)
    count = torch.zeros_like(rows)
    start = 0
    while start < total and rows.numel() > 0:
        # The weight slice is converted too when it is in half precision, so both bound the block.
        size = max(64, _BLOCK // max(rows.numel(), patch.shape[1]))
        stop = min(start + size, total)
        h = torch.addmm(bias[start:stop].to(patch.dtype), patch, weight[start:stop].to(patch.dtype).t())
        # Ones and zeros in h's own dtype: they are summed several times faster than bools.
        larger = h.gt_(value.unsqueeze(1))
        # By index, not by value: the owner's two computations may round differently.
        here = (owner >= start) & (owner < stop)
        own = larger.gather(1, (owner - start).clamp(0, stop - start - 1).unsqueeze(1)).squeeze(1)
        count += (larger.sum(dim=1) - own * here).to(count.dtype)
        if select:
            alive = count < k
            if not bool(alive.all()):
                rows, patch, value, owner, count = (t[alive] for t in (rows, patch, value, owner, count))
        start = stop
    inside[rows] = count < k
    return inside
