"""Reference of `lbdt::encode_topk`: the k largest latents of every patch."""

import torch
from torch import Tensor

# Floats that one block of pre-activations may hold (4 MiB in float32).
_BLOCK = 1 << 20
_ROWS = 1024


def encode_topk(
    x: Tensor,  # [B, d, H, W] or [B, d, N]
    weight: Tensor,  # [L, d]
    bias: Tensor,  # [L]
    k: int,
) -> tuple[Tensor, Tensor]:  # [B, N, k], [B, N, k]
    """`ReLU(TopK_k(weight x + bias))` of every patch, largest first, and the latents' indices.

    Eq. (METHOD.md, 2.4). Blocks of the dictionary are merged into a running
    top-k, so [B, N, L] is never held. Tied latents at the k-th place: any of them.
    """
    x = x.flatten(2)
    batch, width, patches = x.shape
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    values = torch.empty(batch, patches, k, dtype=x.dtype, device=x.device)
    indices = torch.empty(batch, patches, k, dtype=torch.int64, device=x.device)
    for image in range(batch):
        for start in range(0, patches, _ROWS):
            rows = x[image, :, start : start + _ROWS].to(dtype).t()
            best, where = _running_topk(rows, weight, bias, k)
            values[image, start : start + _ROWS] = best.relu().to(x.dtype)
            indices[image, start : start + _ROWS] = where
    return values, indices


def _running_topk(rows: Tensor, weight: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of `rows` [R, d] times the dictionary, sorted, and their indices; [R, k] each."""
    size = max(k, 64, _BLOCK // max(rows.shape[0], rows.shape[1]))
    best = rows.new_empty(rows.shape[0], 0)
    where = torch.empty(rows.shape[0], 0, dtype=torch.int64, device=rows.device)
    for start in range(0, weight.shape[0], size):
        block = weight[start : start + size].to(rows.dtype)
        h = torch.addmm(bias[start : start + size].to(rows.dtype), rows, block.t())
        top, index = h.topk(min(k, h.shape[1]), dim=1)
        best = torch.cat([best, top], dim=1)
        where = torch.cat([where, index + start], dim=1)
        best, order = best.topk(min(k, best.shape[1]), dim=1)
        where = where.gather(1, order)
    return best, where
