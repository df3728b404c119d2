"""`lbdt::detect_patches` in Triton: two launches, five with an int8 screen, one more with the gate, no host sync,
nothing of size N x L but bits of a screen.

Eq.: METHOD.md, 2.2; reference: lbdt/reference/detect_patches.py; arXiv 2606.31699.
"""

import torch
import triton
from torch import Tensor

from lbdt.kernels._candidates import candidates_config, detect_patches_candidates_kernel, prefix_rows
from lbdt.kernels._common import capability, device_of, grid_strides, precision, programs
from lbdt.kernels._count import count_config, detect_patches_count_kernel
from lbdt.kernels._gate import CONCEPTS_A_WORD, gate_patches
from lbdt.kernels._screen import Survivors, fits_screen, screen_survivors


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
    order: Tensor | None = None,  # [L]
) -> Tensor:  # [B, N]
    """`lbdt.reference.detect_patches` in two launches, of many rows in half precision with a screen in five, with the
    gate in one more.

    Scratch from torch's allocator: a copy of x, of an update in half precision two, and 20 to 48 bytes a patch; with
    the gate 1 more, and 4 for each 32 concepts; with a screen a byte a channel and a bit a latent of a patch, and 24.
    """
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
    rows, total_latents = mask.numel(), weight.shape[0]
    prefix = min(prefix_rows(total_latents, k), total_latents) if k > 0 else 0
    able = capability(x.device)
    first, second = (
        candidates_config(x, minus is not None, able),
        count_config(x, total_latents - prefix, able),
    )
    blocks, step = triton.cdiv(patches, first.block_p), second.many.block_d
    room = triton.cdiv(channels, step) * step
    copies = 2 if minus is not None and x.dtype != torch.float32 else 1
    # As many programs a block of patches as there are idle multiprocessors, or tiles of latents.
    most = max(1, programs(x.device, 1) // (batch * blocks))
    parts = max(1, min(most, triton.cdiv(prefix, first.block_l)))
    screened = codes is not None and k > 0 and fits_screen(x, total_latents, prefix, able)
    # Whole 16 bytes, so that what follows is as aligned as memory of its own.
    counters = triton.cdiv(1 + batch * blocks, 4) * 4 if screened else 1 + batch * blocks
    total = torch.zeros(counters + 3 * rows * screened, dtype=torch.int32, device=x.device)
    value = survivors = packed = total  # of a call without rank test, which has no list
    if k > 0:
        survivors = torch.empty(3 + parts, rows, dtype=torch.int32, device=x.device)
        value = torch.empty(rows, dtype=torch.float32, device=x.device)
        packed = torch.empty(rows, copies * room, dtype=x.dtype, device=x.device)
    words = 0 if least is None else triton.cdiv(least.shape[1], CONCEPTS_A_WORD)
    evidence = total if least is None else torch.empty(words, rows, dtype=torch.int32, device=x.device)

    width, stride_h, stride_w, flat = grid_strides(x)
    other = x if minus is None else minus
    _, other_h, other_w, other_flat = grid_strides(other)
    bias, thresholds = bias.float(), thresholds.float()
    # Triton has no kernel arguments of torch.bool.
    mask_bytes, enabled_bytes = mask.view(torch.uint8), enabled.view(torch.uint8)
    owned = latents if owners is None else owners
    with device_of(x):
        detect_patches_candidates_kernel[(batch, blocks, parts)](
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
            packed,
            value,
            survivors,
            owned,
            evidence,
            words,
            patches,
            latents.shape[0],
            total_latents,
            thresholds.shape[0],
            prefix,
            k,
            room,
            width,
            x.stride(0),
            x.stride(1),
            stride_h,
            stride_w,
            other.stride(0),
            other.stride(1),
            other_h,
            other_w,
            *weight.stride(),
            *bias.stride(),
            *latents.stride(),
            *thresholds.stride(),
            *timestep_bin.stride(),
            *enabled_bytes.stride(),
            *owned.stride(),
            D=channels,
            FLAT=flat and other_flat,
            HAS_MINUS=minus is not None,
            PARTS=copies,
            RANKED=k > 0,
            GATED=least is not None,
            PRECISION=precision(x.dtype),
            BLOCK_P=first.block_p,
            BLOCK_U=16 if latents.shape[0] <= 16 else first.block_l,
            BLOCK_L=first.block_l,
            BLOCK_D=first.block_d,
            num_warps=first.num_warps,
            num_stages=first.num_stages,
        )
        if screened:
            states = total[counters:].view(3, rows)
            screen_survivors(
                Survivors(packed, mask_bytes, total, value, survivors, states),
                (codes, bounds, centre),
                *(weight, bias, prefix, k, second, able),
            )
        elif k > 0 and prefix < total_latents:
            tiles = triton.cdiv(rows, second.few.block_p) * triton.cdiv(
                total_latents - prefix, second.few.block_l
            )
            detect_patches_count_kernel[(min(tiles, programs(x.device, 1)),)](
                packed,
                weight,
                bias,
                mask_bytes,
                total,
                value,
                survivors,
                survivors,  # in place of what a screen has found
                rows,
                prefix,
                total_latents,
                k,
                0,
                0,
                room,
                *weight.stride(),
                *bias.stride(),
                D=channels,
                PARTS=copies,
                PRECISION=precision(x.dtype),
                MANY_P=second.many.block_p,
                MANY_L=second.many.block_l,
                FEW_P=second.few.block_p,
                FEW_L=second.few.block_l,
                BLOCK_D=step,
                SCREENED=False,
                num_warps=second.many.num_warps,
                num_stages=second.many.num_stages,
            )
    if least is None:
        return mask
    return gate_patches(mask, evidence, timestep_bin, least, least_of, deciding, gated, so_far)
