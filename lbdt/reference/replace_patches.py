"""Reference of `lbdt::replace_patches`: Patch Embedding Replacement on one feature map."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lbdt.donors import MEAN_OF, DonorSource

# Entries that one block of the patch-to-patch distance table may hold (4 MiB in int32).
_BLOCK = 1 << 20


def replace_patches(
    x: Tensor,  # [B, d, H, W] or [B, d, N]
    mask: Tensor,  # [B, N]
    u: Tensor,  # [B, N]
    height: int,
    width: int,
    padding: int = 0,
    source: str = "random",
    bank: Tensor | None = None,  # [B, M, d]
    avoid: Tensor | None = None,  # [B, N]
) -> tuple[Tensor, Tensor]:  # like x, [B, N]
    """`x` with the dilated mask overwritten by patches from outside it; and which were overwritten.

    Eq. (METHOD.md, 4.1, 4.2 and 4.4): the mask grows by Chebyshev distance `padding`;
    then `src = free[floor(u * n_free)]` with `free` the image's patches outside, in order ("random"); or the
    patch of `free` at the smallest Euclidean grid distance ("nearest"), of the same row of the grid where that has one
    ("row"); or the mean of the 5 nearest in float32 ("mean"); ties go to the lowest index. A u outside of [0, 1), NaN
    included, picks an end. Patches of `avoid` leave `free` in the images where others are left in it. An image without
    free patches takes `bank[floor(u * M)]`, or stays as it is when `bank` is None. arXiv 2606.31699.
    """
    out = x.clone()
    replaced = replace_patches_(out, mask, u, height, width, padding, source, bank, avoid)
    return out, replaced


def replace_patches_(
    x: Tensor,  # [B, d, H, W] or [B, d, N]
    mask: Tensor,  # [B, N]
    u: Tensor,  # [B, N]
    height: int,
    width: int,
    padding: int = 0,
    source: str = "random",
    bank: Tensor | None = None,  # [B, M, d]
    avoid: Tensor | None = None,  # [B, N]
) -> Tensor:  # [B, N]
    """`replace_patches` (same Eq.) in place on `x`; returns which patches were overwritten."""
    batch, channels = x.shape[:2]
    if x.numel() == 0:
        return torch.zeros_like(mask)
    masked = dilate(mask, height, width, padding)
    closed = masked  # no donors
    if avoid is not None:
        both = masked | avoid
        closed = torch.where(both.all(dim=1, keepdim=True), masked, both)
    free_count = (~closed).sum(dim=1, keepdim=True)  # [B, 1]
    has_free = free_count > 0
    rows = x.flatten(2)

    if source == DonorSource.random:
        # A stable sort puts the free patches first, in patch order.
        free = closed.to(torch.uint8).argsort(dim=1, stable=True)
        donors = _gather(rows, free.gather(1, _pick(u, free_count.clamp(min=1))))
    else:
        number = MEAN_OF if source == DonorSource.mean else 1
        donors = _near(rows, closed, height, width, number, source == DonorSource.row)
    if bank is None:
        replaced = masked & has_free
    else:
        spare = _gather(bank.to(x.dtype).transpose(1, 2), _pick(u, bank.shape[1]))
        donors = torch.where(has_free.unsqueeze(1), donors, spare)
        replaced = masked
    x.copy_(torch.where(replaced.unsqueeze(1), donors, rows).view_as(x))
    return replaced


def dilate(mask: Tensor, height: int, width: int, padding: int) -> Tensor:
    """`mask` [B, H*W] bool grown by Chebyshev distance `padding` on the grid."""
    padding = min(padding, max(height, width))
    if padding == 0:
        return mask.clone()
    grid = mask.view(-1, 1, height, width).to(torch.float32)
    grown = F.max_pool2d(F.pad(grid, (padding,) * 4), 2 * padding + 1, stride=1)
    return grown.view_as(mask) > 0


def _pick(u: Tensor, count: Tensor | int) -> Tensor:
    """`floor(u * count)` [B, N], NaN and negative u as 0; the product of float32 numbers may round up to `count`."""
    count = torch.as_tensor(count, device=u.device)
    scaled = torch.where(u > 0, u * count, 0.0).minimum(count.to(u.dtype))
    return torch.minimum(scaled.to(torch.int64), count - 1)


def _gather(rows: Tensor, index: Tensor) -> Tensor:
    """Columns `index` [B, N] of `rows` [B, d, M] -> [B, d, N]."""
    return rows.gather(2, index.unsqueeze(1).expand(-1, rows.shape[1], -1))


def _near(rows: Tensor, closed: Tensor, height: int, width: int, number: int, beside: bool) -> Tensor:
    """Mean of the up to `number` nearest patches outside of `closed` of every patch, summed nearest first; [B, d, N].

    `beside`: those of the same row of the grid come before all others.
    """
    batch, channels, patches = rows.shape
    place = torch.arange(patches, device=rows.device)
    y, x = place // width, place % width
    number = min(number, patches)
    never = torch.iinfo(torch.int64).max
    out = torch.empty_like(rows)
    dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
    size = max(1, _BLOCK // max(1, batch * patches))
    for start in range(0, patches, size):
        part = slice(start, start + size)
        distance = (y[part, None] - y) ** 2 + (x[part, None] - x) ** 2  # [P, N]
        if beside:
            # Within a row squared distances stay below the width's square.
            distance = distance + (y[part, None] != y) * width**2
        # The index in the low digits makes every key unique and breaks ties to the lowest.
        key = (distance * patches + place).expand(batch, -1, -1)
        key, index = key.masked_fill(closed.unsqueeze(1), never).topk(
            number, dim=2, largest=False, sorted=True
        )
        valid = (key != never).to(dtype).unsqueeze(1)  # [B, 1, P, number]
        # From the first donor on, not from 0.0, which would turn a donor's -0.0 into 0.0.
        total = _gather(rows, index[:, :, 0]).to(dtype)
        for rank in range(1, number):
            donor = _gather(rows, index[:, :, rank]).to(dtype)
            total = torch.where(valid[..., rank] > 0, total + donor, total)
        out[:, :, part] = (total / valid.sum(dim=3).clamp(min=1)).to(rows.dtype)
    return out
