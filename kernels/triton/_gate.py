"""The gate of `lbdt::detect_patches` (METHOD.md, 2.5 and 2.6): what its first launch keeps for it, and its third."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lbdt.kernels._common import device_of

CONCEPTS_A_WORD = 32
"""The kernels say 32."""
_BLOCK = 1024
_QUARTERS = tl.constexpr(4)
_FOUND = tl.constexpr(1 << 40)
_MOST = tl.constexpr(1 << 28)


@triton.jit
def _either(a, b):
    return a | b


@triton.jit
def keep_evidence(
    evidence,  # [W, B * N] int32
    place,  # [P] int64, the patches
    inside,  # [P]
    total,  # B * N
    passing,  # [U, P] bool, of some of the watched latents
    owner,  # [U] int32, their concepts; outside of [0, 32 W): none
    words,
    written,  # [P] bool
):
    """Sets the bits of the concepts whose latents pass; `written`: beside those that are there."""
    for word in range(words):
        mine = passing & (owner // 32 == word)[:, None] & (owner >= 0)[:, None]
        bit = tl.full(owner.shape, 1, tl.int32) << (owner % 32)
        bits = tl.reduce(tl.where(mine, bit[:, None], 0), 0, _either)
        pointers = evidence + word * total + place
        before = tl.load(pointers, mask=written, other=0)
        tl.store(pointers, before | bits, mask=inside)


@triton.jit(do_not_specialize=["bins", "concepts", "least_of", "least_stride_t"])
def detect_patches_gate_kernel(
    mask,  # [B, N] uint8
    evidence,  # [W, B * N] int32
    least,  # [T, C] int64
    timestep_bin,  # [B] int64
    deciding,  # [B] int64, where DECIDED
    kept,  # [B, N] uint8, out
    gated,  # [B] int64, out
    so_far,  # [B, C + 1] int64, in and out, where REMEMBERS
    patches,
    bins,
    concepts,
    least_of,
    least_stride_t,
    least_stride_c,
    bin_stride,
    deciding_stride,
    gated_stride,
    DECIDED: tl.constexpr,
    REMEMBERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The mask of a row without the patches that are evidence for no concept that its deciding row carries.

    A program a row. Reads 1 byte a patch and, in a row where anything is detected (where REMEMBERS, in every row), 5 to
    10 bytes a patch and concept; writes 1 byte a patch and, there, 1 more for each concept that is carried.
    """
    image = tl.program_id(0)
    batch = tl.num_programs(0)
    row = image.to(tl.int64)
    if DECIDED:
        named = tl.load(deciding + image * deciding_stride)
        row = tl.where((named >= 0) & (named < batch), named, row)
    own = image.to(tl.int64) * patches
    total = tl.cast(batch, tl.int64) * patches
    detected = tl.zeros([BLOCK], tl.int32)
    for start in range(0, patches, BLOCK):
        patch = start + tl.arange(0, BLOCK)
        inside = patch < patches
        detected += tl.load(mask + own + patch, mask=inside, other=0).to(tl.int32)
        tl.store(kept + own + patch, tl.zeros([BLOCK], tl.uint8), mask=inside)
    found = tl.sum(detected, axis=0)
    left = tl.zeros([BLOCK], tl.int32)
    calls = tl.full((), 1, tl.int64)
    if REMEMBERS:
        calls += tl.load(so_far + image.to(tl.int64) * (concepts + 1) + concepts)
        tl.debug_barrier()  # before any warp has read it, none may write
        tl.store(so_far + image.to(tl.int64) * (concepts + 1) + concepts, calls)
    if (found > 0) | REMEMBERS:
        time = tl.load(timestep_bin + row * bin_stride)
        known = (time >= 0) & (time < bins)
        for c in range(concepts):
            word = evidence + (c // 32) * total
            counted = tl.zeros([BLOCK], tl.int32)
            for start in range(0, patches, BLOCK):
                patch = start + tl.arange(0, BLOCK)
                set = tl.load(mask + row * patches + patch, mask=patch < patches, other=0) != 0
                bits = tl.load(word + row * patches + patch, mask=set, other=0)
                counted += (bits >> (c % 32)) & 1
            needed = tl.load(least + time * least_stride_t + c * least_stride_c, mask=known, other=0)
            count = tl.sum(counted, axis=0).to(tl.int64)
            carries = needed <= 1
            if REMEMBERS:
                place = so_far + image.to(tl.int64) * (concepts + 1) + c
                count += tl.load(place)
                mean = (
                    tl.minimum(tl.maximum(count, 0), _MOST)
                    * least_of
                    // tl.maximum(patches, 1)
                    * _QUARTERS
                    // tl.maximum(calls, 1)
                )
                carries = carries | (count >= _FOUND) | (mean >= needed)
                tl.debug_barrier()
                tl.store(place, tl.where(carries & (count > 0), tl.full((), _FOUND, tl.int64), count))
            else:
                # Divided, as needed * patches may overflow.
                carries = carries | (count * least_of // patches >= needed)
            if carries:
                for start in range(0, patches, BLOCK):
                    patch = start + tl.arange(0, BLOCK)
                    set = tl.load(mask + own + patch, mask=patch < patches, other=0) != 0
                    bits = tl.load(word + own + patch, mask=set, other=0)
                    tl.debug_barrier()  # what the row's warps have written of it so far
                    before = tl.load(kept + own + patch, mask=set, other=1)
                    more = set & (before == 0) & (((bits >> (c % 32)) & 1) != 0)
                    tl.store(kept + own + patch, tl.full([BLOCK], 1, tl.uint8), mask=more)
                    left += more.to(tl.int32)
    tl.store(gated + image * gated_stride, (found - tl.sum(left, axis=0)).to(tl.int64))


def gate_patches(
    mask: Tensor,  # [B, N]
    evidence: Tensor,  # [W, B * N] int32
    timestep_bin: Tensor,  # [B]
    least: Tensor,  # [T, C]
    least_of: int,
    deciding: Tensor | None,  # [B]
    gated: Tensor | None,  # [B]
    so_far: Tensor | None,  # [B, C + 1]
) -> Tensor:  # [B, N]
    """The `mask` that the gate leaves, in memory of its own: other rows still read the given one."""
    batch, patches = mask.shape
    kept = torch.empty_like(mask)
    gated = torch.empty_like(timestep_bin) if gated is None else gated
    rows = timestep_bin if deciding is None else deciding
    with device_of(mask):
        detect_patches_gate_kernel[(batch,)](
            mask.view(torch.uint8),
            evidence,
            least,
            timestep_bin,
            rows,
            kept.view(torch.uint8),
            gated,
            gated if so_far is None else so_far,
            patches,
            least.shape[0],
            least.shape[1],
            least_of or patches,
            *least.stride(),
            *timestep_bin.stride(),
            *rows.stride(),
            *gated.stride(),
            DECIDED=deciding is not None,
            REMEMBERS=so_far is not None,
            BLOCK=_BLOCK,
            num_warps=4,
            num_stages=1,
        )
    return kept
