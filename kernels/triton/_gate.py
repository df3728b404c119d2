"""The gate of `lbdt::detect_patches` (METHOD.md, 2.5), its third launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lbdt.kernels._common import device_of

_BLOCK = 1024


@triton.jit(do_not_specialize=["batch", "bins", "concepts", "least_of", "least_stride_t"])
def detect_patches_gate_kernel(
    mask,  # [B, N] uint8
    concept,  # [B * N] int32, where the mask is set
    least,  # [T, C] int64
    timestep_bin,  # [B] int64
    deciding,  # [B] int64, where DECIDED
    kept,  # [B, N] uint8, out
    gated,  # [B] int64, out
    patches,
    batch,
    bins,
    concepts,
    least_of,
    least_stride_t,
    least_stride_c,
    bin_stride,
    deciding_stride,
    gated_stride,
    DECIDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The mask of a row without the concepts that its deciding row does not carry (METHOD.md, 2.5); a program a row.

    Reads 1 byte a patch and, in a row where anything is detected, 5 bytes a patch and concept; writes 1 byte a patch.
    """
    image = tl.program_id(0)
    row = image.to(tl.int64)
    if DECIDED:
        named = tl.load(deciding + image * deciding_stride)
        row = tl.where((named >= 0) & (named < batch), named, row)
    own = image.to(tl.int64) * patches
    detected = tl.zeros([BLOCK], tl.int32)
    for start in range(0, patches, BLOCK):
        patch = start + tl.arange(0, BLOCK)
        found = tl.load(mask + own + patch, mask=patch < patches, other=0)
        tl.store(kept + own + patch, found, mask=patch < patches)
        detected += found.to(tl.int32)
    taken = tl.zeros([BLOCK], tl.int32)
    if tl.sum(detected, axis=0) > 0:
        tl.debug_barrier()  # what is cleared below has been copied by now
        time = tl.load(timestep_bin + row * bin_stride)
        known = (time >= 0) & (time < bins)
        for c in range(concepts):
            evidence = tl.zeros([BLOCK], tl.int32)
            for start in range(0, patches, BLOCK):
                patch = start + tl.arange(0, BLOCK)
                found = tl.load(mask + row * patches + patch, mask=patch < patches, other=0) != 0
                whose = tl.load(concept + row * patches + patch, mask=found, other=-1)
                evidence += (whose == c).to(tl.int32)
            needed = tl.load(least + time * least_stride_t + c * least_stride_c, mask=known, other=0)
            # As count * least_of >= needed * patches, which might overflow.
            if tl.sum(evidence, axis=0).to(tl.int64) * least_of // patches < needed:
                for start in range(0, patches, BLOCK):
                    patch = start + tl.arange(0, BLOCK)
                    found = tl.load(mask + own + patch, mask=patch < patches, other=0) != 0
                    whose = tl.load(concept + own + patch, mask=found, other=-1)
                    tl.store(kept + own + patch, tl.zeros([BLOCK], tl.uint8), mask=whose == c)
                    taken += (whose == c).to(tl.int32)
    tl.store(gated + image * gated_stride, tl.sum(taken, axis=0).to(tl.int64))


def gate_patches(
    mask: Tensor,  # [B, N]
    concept: Tensor,  # [B * N] int32
    timestep_bin: Tensor,  # [B]
    least: Tensor,  # [T, C]
    least_of: int,
    deciding: Tensor | None,  # [B]
    gated: Tensor | None,  # [B]
) -> Tensor:  # [B, N]
    """The `mask` that the gate leaves, in memory of its own: other rows still read the given one."""
    batch, patches = mask.shape
    kept = torch.empty_like(mask)
    gated = torch.empty_like(timestep_bin) if gated is None else gated
    rows = timestep_bin if deciding is None else deciding
    with device_of(mask):
        detect_patches_gate_kernel[(batch,)](
            mask.view(torch.uint8),
            concept,
            least,
            timestep_bin,
            rows,
            kept.view(torch.uint8),
            gated,
            patches,
            batch,
            least.shape[0],
            least.shape[1],
            least_of or patches,
            *least.stride(),
            *timestep_bin.stride(),
            *rows.stride(),
            *gated.stride(),
            DECIDED=deciding is not None,
            BLOCK=_BLOCK,
            num_warps=4,
            num_stages=1,
        )
    return kept
