"""`lbdt::encode_topk` in Triton: encode and exact top-k in one pass over the dictionary, nothing of size N x L.

Eq.: METHOD.md, 2.4; reference: lbdt/reference/encode_topk.py; SAeUron, arXiv 2501.18052.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lbdt.kernels._common import (
    Config,
    accumulate,
    device_of,
    grid_strides,
    patch_offset,
    precision,
    programs,
    rounded,
)

# Below every key of a number; slots of it stay apart by their own index.
_NOTHING = tl.constexpr(-(2**63))
_TAKEN = tl.constexpr(2**63 - 1)


def part_config(x: Tensor, k: int) -> Config:
    """Tiles by dtype and k: the kept keys of a tile's patches stay in registers."""
    if x.dtype == torch.float32:
        return Config(16, 64, 16, 4, 3)
    return Config(32, 64, 32, 4, 4) if k <= 64 else Config(16, 64, 32, 8, 4)


@triton.jit
def to_key(value, latent):
    """int64 that orders by float32 `value`, then by the lower `latent`; every latent has a key of its own."""
    bits = value.to(tl.int32, bitcast=True)
    # Of either sign: no number is the largest, as for torch.topk.
    bits = tl.where(value == value, bits, 0x7FC00000)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (bits.to(tl.int64) << 32) | (0x7FFFFFFF - latent).to(tl.int64)


@triton.jit
def key_value(key):
    """The float32 value of a key."""
    bits = (key >> 32).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def key_latent(key):
    """The int64 latent of a key."""
    return 0x7FFFFFFF - (key & 0x7FFFFFFF)


@triton.jit
def nothing_kept(k, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr):
    """The keys [BLOCK_P, BLOCK_K] to begin with: k free slots a patch, the others closed."""
    slot = tl.arange(0, BLOCK_K)[None, :]
    keys = tl.where(slot < k, _NOTHING + slot.to(tl.int64), _TAKEN)
    return tl.broadcast_to(keys, [BLOCK_P, BLOCK_K])


@triton.jit
def keep_largest(kept, keys):
    """`kept` [BLOCK_P, BLOCK_K] after each patch's larger `keys` [BLOCK_P, M] have displaced its smallest.

    One round moves a key of every patch that has one to move. After the first tiles few have, so that a tile costs
    about one comparison with the smallest kept key.
    """
    least = tl.min(kept, axis=1)
    largest = tl.max(keys, axis=1)
    while tl.max((largest > least).to(tl.int32), axis=0) > 0:
        moves = (largest > least)[:, None]
        kept = tl.where(moves & (kept == least[:, None]), largest[:, None], kept)
        keys = tl.where(moves & (keys == largest[:, None]), _NOTHING, keys)
        least = tl.min(kept, axis=1)
        largest = tl.max(keys, axis=1)
    return kept


@triton.jit(do_not_specialize=["latents", "k", "tiles"])
def encode_topk_part_kernel(
    x,  # [B, d, H, W] by its strides
    weight,  # [L, d]
    bias,  # [L] float32
    keys,  # [B, N, S, BLOCK_K] int64, out
    patches,
    latents,
    k,
    width,
    tiles,
    x_stride_b,
    x_stride_d,
    x_stride_h,
    x_stride_w,
    weight_stride_l,
    weight_stride_d,
    bias_stride,
    D: tl.constexpr,
    FLAT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The k largest latents of BLOCK_P patches within one of S slices of the dictionary (`tiles` tiles each).

    Reads the dictionary once per BLOCK_P patches, and their columns once per tile of latents; writes
    8 * S * BLOCK_K bytes a patch.
    """
    image, part = tl.program_id(0).to(tl.int64), tl.program_id(2)
    patch = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = patch < patches
    x_pointers = x + image * x_stride_b + patch_offset(patch, width, x_stride_h, x_stride_w, FLAT)
    kept = nothing_kept(k, BLOCK_P, BLOCK_K)
    for tile in range(part * tiles, tl.minimum((part + 1) * tiles, tl.cdiv(latents, BLOCK_L))):
        latent = tile * BLOCK_L + tl.arange(0, BLOCK_L)
        known = latent < latents
        h = accumulate(
            tl.zeros([BLOCK_L, BLOCK_P], tl.float32),
            weight + tl.minimum(latent, latents - 1).to(tl.int64)[:, None] * weight_stride_l,
            weight_stride_d,
            x_pointers[None, :],
            x_stride_d,
            x_pointers[None, :],
            x_stride_d,
            inside[None, :],
            D,
            BLOCK_D,
            False,
            PRECISION,
        )
        h += tl.load(bias + latent * bias_stride, mask=known, other=0.0)[:, None]
        found = tl.where(known[:, None], to_key(h, latent[:, None]), _NOTHING)
        kept = keep_largest(kept, tl.trans(found))
    slot = tl.arange(0, BLOCK_K)[None, :]
    place = ((image * patches + patch)[:, None] * tl.num_programs(2) + part) * BLOCK_K + slot
    # A slot that stayed free holds no key: of its own kind they would meet again in the merge.
    kept = tl.where((slot < k) & (kept >= _NOTHING + BLOCK_K), kept, _NOTHING)
    tl.store(keys + place, kept, mask=inside[:, None])


@triton.jit(do_not_specialize=["rows", "parts", "k"])
def encode_topk_merge_kernel(
    keys,  # [B, N, S, BLOCK_K] int64
    values,  # [B, N, k], out
    indices,  # [B, N, k] int64, out
    rows,
    parts,
    k,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The k largest of the slices' keys, largest first, as `ReLU(value)` and latent."""
    row = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    slot = tl.arange(0, BLOCK_K)[None, :]
    inside = (row < rows)[:, None]
    kept = nothing_kept(k, BLOCK_P, BLOCK_K)
    for part in range(parts):
        place = (row.to(tl.int64)[:, None] * parts + part) * BLOCK_K + slot
        kept = keep_largest(kept, tl.load(keys + place, mask=inside, other=_NOTHING))
    kept = tl.where(slot < k, kept, _NOTHING)
    kept = tl.sort(kept, dim=1, descending=True)
    place = row.to(tl.int64)[:, None] * k + slot
    written = inside & (slot < k)
    value = key_value(kept)
    value = tl.where(value < 0.0, 0.0, value)  # and no number stays none
    tl.store(values + place, rounded(value, values.dtype.element_ty), mask=written)
    tl.store(indices + place, key_latent(kept), mask=written)


def encode_topk(
    x: Tensor,  # [B, d, H, W] or [B, d, N]
    weight: Tensor,  # [L, d]
    bias: Tensor,  # [L]
    k: int,
) -> tuple[Tensor, Tensor]:  # [B, N, k], [B, N, k]
    """`lbdt.reference.encode_topk`; of latents tied at the k-th place those with the lowest index.

    The dictionary is cut into as many slices as it takes to keep the device busy. Scratch: 8 bytes a patch, slice
    and kept latent.
    """
    batch, channels = x.shape[:2]
    patches = x.shape[2:].numel()
    rows, latents = batch * patches, weight.shape[0]
    values = torch.empty(batch, patches, k, dtype=x.dtype, device=x.device)
    indices = torch.empty(batch, patches, k, dtype=torch.int64, device=x.device)
    if rows == 0:
        return values, indices
    config, block_k = part_config(x, k), max(16, triton.next_power_of_2(k))
    across = triton.cdiv(patches, config.block_p)
    tiles = triton.cdiv(latents, config.block_l)
    parts = max(1, min(tiles, programs(x.device, 2) // (across * batch)))
    tiles = triton.cdiv(tiles, parts)  # of each part
    parts = triton.cdiv(latents, tiles * config.block_l)
    keys = torch.empty(rows, parts, block_k, dtype=torch.int64, device=x.device)
    bias = bias.float()
    width, stride_h, stride_w, flat = grid_strides(x)
    with device_of(x):
        encode_topk_part_kernel[(batch, across, parts)](
            x,
            weight,
            bias,
            keys,
            patches,
            latents,
            k,
            width,
            tiles,
            x.stride(0),
            x.stride(1),
            stride_h,
            stride_w,
            *weight.stride(),
            *bias.stride(),
            D=channels,
            FLAT=flat,
            PRECISION=precision(x.dtype),
            BLOCK_P=config.block_p,
            BLOCK_L=config.block_l,
            BLOCK_D=config.block_d,
            BLOCK_K=block_k,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        encode_topk_merge_kernel[(triton.cdiv(rows, 16),)](
            keys, values, indices, rows, parts, k, BLOCK_P=16, BLOCK_K=block_k, num_warps=4, num_stages=1
        )
    return values, indices
