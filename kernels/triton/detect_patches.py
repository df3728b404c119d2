"""`lbdt::detect_patches` in Triton: two launches, three with the gate, no host sync, nothing of size N x L.

Eq.: METHOD.md, 2.2; reference: lbdt/reference/detect_patches.py; arXiv 2606.31699.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lbdt.kernels._common import (
    Config,
    accumulate,
    capability,
    device_of,
    grid_strides,
    patch_offset,
    precision,
    programs,
)
from lbdt.kernels._gate import CONCEPTS_A_WORD, gate_patches, keep_evidence

_FEW_ROWS = 1024


def candidates_config(x: Tensor, gated: bool) -> Config:
    """Tiles of the first launch: little work, so many small programs, each with its loads well ahead."""
    if x.dtype == torch.float32:
        return Config(16, 16, 32, 4, 3)
    # With the gate larger steps spill registers.
    return Config(16, 16, 64 if gated else 128, 4, 4)


def count_config(x: Tensor, rows: int, update: bool) -> Config:
    """Tiles of the second launch: few rows are bound by reading the dictionary, many by the products.

    A tile has more than 32 candidates, or the warps of a program would decide on copies of `count` of their own.
    """
    if x.dtype == torch.float32:
        return Config(64, 64, 16, 4, 3)
    # Larger steps and tiles spill registers with a second operand, and before Hopper.
    old = capability(x.device) < (9, 0)
    if update:
        return Config(64, 64 if old else 128, 32, 4, 4)
    step = 32 if old else 64
    return Config(64, 128, step, 4, 4) if rows <= _FEW_ROWS else Config(128, 128, step, 8, 4)


@triton.jit(
    do_not_specialize=["union", "total_latents", "bins", "thresholds_stride_t", "enabled_stride_b", "words"]
)
def detect_patches_candidates_kernel(
    x,  # [B, d, H, W] by its strides
    minus,  # like x
    weight,  # [L, d]
    bias,  # [L] float32
    latents,  # [U] int64
    thresholds,  # [T, U] float32
    timestep_bin,  # [B] int64
    enabled,  # [B, U] uint8
    mask,  # [B, N] uint8, out
    total,  # [1] int32, zero: number of candidates, out
    value,  # [B * N] float32, out: of each candidate its largest passing pre-activation,
    owner,  # [B * N] int32, out: the latent it belongs to,
    row,  # [B * N] int32, out: the patch b * N + p,
    count,  # [B * N] int32, out: zero
    owners,  # [U] int64, where GATED
    evidence,  # [W, B * N] int32, where GATED, out: bit c of a patch: whether a latent of concept c passes
    words,
    patches,
    union,
    total_latents,
    bins,
    width,
    x_stride_b,
    x_stride_d,
    x_stride_h,
    x_stride_w,
    minus_stride_b,
    minus_stride_d,
    minus_stride_h,
    minus_stride_w,
    weight_stride_l,
    weight_stride_d,
    bias_stride,
    latents_stride,
    thresholds_stride_t,
    thresholds_stride_u,
    bin_stride,
    enabled_stride_b,
    enabled_stride_u,
    owners_stride,
    D: tl.constexpr,
    FLAT: tl.constexpr,
    HAS_MINUS: tl.constexpr,
    RANKED: tl.constexpr,
    GATED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """`max{ h_u : h_u > mu_u }` of each patch, and a list of those that have one (items 1 and 2 of the identity).

    Reads x, the U encoder rows once per BLOCK_P patches, and their thresholds; writes N bytes and 16 bytes a
    candidate. The list's order is that in which programs arrive; no result depends on it.
    """
    image = tl.program_id(0)
    patch = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = patch < patches
    x_pointers = (
        x + image.to(tl.int64) * x_stride_b + patch_offset(patch, width, x_stride_h, x_stride_w, FLAT)
    )
    minus_pointers = x_pointers
    if HAS_MINUS:
        minus_pointers = minus + image.to(tl.int64) * minus_stride_b
        minus_pointers += patch_offset(patch, width, minus_stride_h, minus_stride_w, FLAT)
    # The host does not read these values, so one that is no position counts as a latent that is not selected.
    time = tl.load(timestep_bin + image * bin_stride)
    selected = tl.where((time >= 0) & (time < bins), union, 0)
    bin_offset = time * thresholds_stride_t

    largest = tl.full([BLOCK_P], float("-inf"), tl.float32)
    own = tl.zeros([BLOCK_P], tl.int32)
    place = image.to(tl.int64) * patches + patch
    for start in range(0, union, BLOCK_U):
        u = start + tl.arange(0, BLOCK_U)
        known = u < selected
        latent = tl.load(latents + u * latents_stride, mask=known, other=0)
        known = known & (latent >= 0) & (latent < total_latents)
        latent = tl.where(known, latent, 0)
        h = accumulate(
            tl.zeros([BLOCK_U, BLOCK_P], tl.float32),
            weight + latent[:, None] * weight_stride_l,
            weight_stride_d,
            x_pointers[None, :],
            x_stride_d,
            minus_pointers[None, :],
            minus_stride_d,
            inside[None, :],
            D,
            BLOCK_D,
            HAS_MINUS,
            False,
            PRECISION,
        )
        h += tl.load(bias + latent * bias_stride, mask=known, other=0.0)[:, None]
        on = tl.load(enabled + image * enabled_stride_b + u * enabled_stride_u, mask=known, other=0) != 0
        mu = tl.load(thresholds + bin_offset + u * thresholds_stride_u, mask=known, other=float("inf"))
        passing = (h > mu[:, None]) & on[:, None]
        h = tl.where(passing, h, float("-inf"))
        best = tl.max(h, axis=0)
        # Of tied latents any serves: what is counted lies strictly above.
        who = tl.max(tl.where(h == best[None, :], latent[:, None].to(tl.int32), -1), axis=0)
        own = tl.where(best > largest, who, own)
        if GATED:
            keep_evidence(
                evidence,
                place,
                inside,
                tl.num_programs(0).to(tl.int64) * patches,
                passing,
                tl.load(owners + u * owners_stride, mask=known, other=-1).to(tl.int32),
                words,
                start == 0,
            )
        largest = tl.maximum(largest, best)

    candidate = (largest > float("-inf")) & inside
    tl.store(mask + place, candidate.to(tl.uint8), mask=inside)
    if RANKED:
        flag = candidate.to(tl.int32)
        found = tl.sum(flag, axis=0)
        if found > 0:
            slot = tl.atomic_add(total, found) + tl.cumsum(flag, axis=0) - 1
            tl.store(value + slot, largest, mask=candidate)
            tl.store(owner + slot, own, mask=candidate)
            tl.store(row + slot, place.to(tl.int32), mask=candidate)
            tl.store(count + slot, 0, mask=candidate)


@triton.jit(do_not_specialize=["latents", "k"])
def detect_patches_count_kernel(
    x,  # [B, d, H, W] by its strides
    minus,  # like x
    weight,  # [L, d]
    bias,  # [L] float32
    mask,  # [B, N] uint8, in and out: cleared where a candidate is refuted
    total,  # [1] int32
    value,  # [total] float32
    owner,  # [total] int32
    row,  # [total] int32
    count,  # [total] int32, in and out
    patches,
    latents,
    k,
    width,
    x_stride_b,
    x_stride_d,
    x_stride_h,
    x_stride_w,
    minus_stride_b,
    minus_stride_d,
    minus_stride_h,
    minus_stride_w,
    weight_stride_l,
    weight_stride_d,
    bias_stride,
    D: tl.constexpr,
    FLAT: tl.constexpr,
    HAS_MINUS: tl.constexpr,
    GATHERED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """`#{ j != owner : h_j > value }` of each candidate, until it reaches k (items 3 and 5 of the identity).

    A grid of fixed size walks over the tiles of BLOCK_L latents x BLOCK_P candidates, latents slowest, so that
    later tiles find the counts of earlier ones and are skipped where all their candidates are refuted. Reads the
    dictionary once per BLOCK_P candidates and a candidate's column once per tile of latents, mostly from L2; writes
    a counter a candidate and tile.
    """
    candidates = tl.load(total)
    across = tl.cdiv(candidates, BLOCK_P)
    for tile in range(tl.program_id(0), across * tl.cdiv(latents, BLOCK_L), tl.num_programs(0)):
        slot = tile % across * BLOCK_P + tl.arange(0, BLOCK_P)
        listed = slot < candidates
        # Volatile, as other programs add to it. An old value only means work that could have been spared; nothing
        # else may depend on it, as the compiler can repeat the load and get another one.
        counted = tl.load(count + slot, mask=listed, other=k, volatile=True)
        if tl.min(counted, axis=0) < k:
            place = tl.load(row + slot, mask=listed, other=0)
            limit = tl.load(value + slot, mask=listed, other=float("inf"))
            own = tl.load(owner + slot, mask=listed, other=-1)
            image, patch = (place // patches).to(tl.int64), place % patches
            x_pointers = x + image * x_stride_b + patch_offset(patch, width, x_stride_h, x_stride_w, FLAT)
            minus_pointers = x_pointers
            if HAS_MINUS:
                minus_pointers = minus + image * minus_stride_b
                minus_pointers += patch_offset(patch, width, minus_stride_h, minus_stride_w, FLAT)
            latent = tile // across * BLOCK_L + tl.arange(0, BLOCK_L)
            known = latent < latents
            # Past the end of a list its first or last member is computed on, and dropped by `known` and `limit`.
            rows = tl.minimum(latent, latents - 1).to(tl.int64)
            h = accumulate(
                tl.zeros([BLOCK_L, BLOCK_P], tl.float32),
                weight + rows[:, None] * weight_stride_l,
                weight_stride_d,
                x_pointers[None, :],
                x_stride_d,
                minus_pointers[None, :],
                minus_stride_d,
                None,
                D,
                BLOCK_D,
                HAS_MINUS,
                GATHERED,
                PRECISION,
            )
            h += tl.load(bias + latent * bias_stride, mask=known, other=0.0)[:, None]
            # By index, not by value: the owner's two computations may round differently.
            above = (h > limit[None, :]) & (latent[:, None] != own[None, :]) & known[:, None]
            more = tl.sum(above.to(tl.int32), axis=0)
            before = tl.atomic_add(count + slot, more, mask=listed)
            tl.store(mask + place, tl.zeros([BLOCK_P], tl.uint8), mask=listed & (before + more >= k))


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
    so_far: Tensor | None = None,  # [B, C + 1]
    codes: Tensor | None = None,  # [L, d or a few more]
    bounds: Tensor | None = None,  # [6, L]
    centre: Tensor | None = None,  # [d]
) -> Tensor:  # [B, N]
    """`lbdt.reference.detect_patches` in two launches, three with the gate. Scratch from torch's allocator: 16 bytes a
    patch; with the gate 1 more, and 4 for each 32 concepts."""
    batch, channels = x.shape[:2]
    patches = x.shape[2:].numel()
    mask = torch.empty(batch, patches, dtype=torch.bool, device=x.device)
    if mask.numel() == 0 or latents.numel() == 0 or weight.shape[0] == 0:
        if gated is not None:
            gated.zero_()
        if so_far is not None and batch:
            words = triton.cdiv(least.shape[1], CONCEPTS_A_WORD)
            nothing = torch.zeros(words, mask.numel(), dtype=torch.int32, device=x.device)
            gate_patches(mask.zero_(), nothing, timestep_bin, least, least_of, deciding, gated, so_far)
        return mask.zero_()
    rows = mask.numel()
    total = torch.zeros(1, dtype=torch.int32, device=x.device)
    value = owner = row = count = total  # of a call without rank test, which has no list
    if k > 0:
        value = torch.empty(rows, dtype=torch.float32, device=x.device)
        owner, row, count = torch.empty(3, rows, dtype=torch.int32, device=x.device)
    words = 0 if least is None else triton.cdiv(least.shape[1], CONCEPTS_A_WORD)
    evidence = total if least is None else torch.empty(words, rows, dtype=torch.int32, device=x.device)

    width, stride_h, stride_w, flat = grid_strides(x)
    other = x if minus is None else minus
    _, other_h, other_w, other_flat = grid_strides(other)
    places = (
        x.stride(0),
        x.stride(1),
        stride_h,
        stride_w,
        other.stride(0),
        other.stride(1),
        other_h,
        other_w,
    )
    flags = {
        "D": channels,
        "FLAT": flat and other_flat,
        "HAS_MINUS": minus is not None,
        "PRECISION": precision(x.dtype),
    }
    bias, thresholds = bias.float(), thresholds.float()
    # Triton has no kernel arguments of torch.bool.
    mask_bytes, enabled_bytes = mask.view(torch.uint8), enabled.view(torch.uint8)
    with device_of(x):
        config = candidates_config(x, least is not None)
        detect_patches_candidates_kernel[(batch, triton.cdiv(patches, config.block_p))](
            x,
            other,
            weight,
            bias,
            latents,
            thresholds,
            timestep_bin,
            enabled_bytes,
            mask_bytes,
            total,
            value,
            owner,
            row,
            count,
            latents if owners is None else owners,
            evidence,
            words,
            patches,
            latents.shape[0],
            weight.shape[0],
            thresholds.shape[0],
            width,
            *places,
            *weight.stride(),
            *bias.stride(),
            *latents.stride(),
            *thresholds.stride(),
            *timestep_bin.stride(),
            *enabled_bytes.stride(),
            *(latents if owners is None else owners).stride(),
            **flags,
            RANKED=k > 0,
            GATED=least is not None,
            BLOCK_P=config.block_p,
            BLOCK_U=config.block_l,
            BLOCK_D=config.block_d,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        if k > 0:
            config = count_config(x, rows, minus is not None)
            tiles = triton.cdiv(rows, config.block_p) * triton.cdiv(weight.shape[0], config.block_l)
            detect_patches_count_kernel[(min(tiles, programs(x.device, 2)),)](
                x,
                other,
                weight,
                bias,
                mask_bytes,
                total,
                value,
                owner,
                row,
                count,
                patches,
                weight.shape[0],
                k,
                width,
                *places,
                *weight.stride(),
                *bias.stride(),
                **flags,
                GATHERED=x.stride(1) != 1 or other.stride(1) != 1,
                BLOCK_P=config.block_p,
                BLOCK_L=config.block_l,
                BLOCK_D=config.block_d,
                num_warps=config.num_warps,
                num_stages=config.num_stages,
            )
    if least is None:
        return mask
    return gate_patches(mask, evidence, timestep_bin, least, least_of, deciding, gated, so_far)
