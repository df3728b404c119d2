"""`lbdt::patch_uniform` in Triton: one launch.

Eq.: METHOD.md, 4.3; reference: lbdt/reference/patch_uniform.py; Salmon et al., "Parallel random numbers: as
easy as 1, 2, 3", SC 2011.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lbdt.kernels._common import device_of


@triton.jit
def uniform(seed, time, half, patch):
    """The numbers [P] float32 of the patches [P] of an image: Philox4x32-10 with the seed as key and (patch, timestep,
    half, 0) as counter; `time` of any dtype."""
    if time.dtype.is_floating():
        if time.dtype != tl.float64:
            time = time.to(tl.float32)  # exact; the interpreter has no bfloat16 arithmetic
        time = tl.where(tl.abs(time) < 9223372036854775808.0, tl.floor(time), 0.0)
    zero = patch.to(tl.uint32) * 0
    counter = zero + time.to(tl.int64).to(tl.uint32), zero + half.to(tl.uint32)
    word, _, _, _ = tl.philox(seed, patch.to(tl.uint32), counter[0], counter[1], zero)
    return (word >> 8).to(tl.float32) * (1.0 / 16777216.0)


@triton.jit
def patch_uniform_kernel(
    seeds,  # [B] int64
    timesteps,  # [B]
    halves,  # [B] int64
    numbers,  # [B, patches] float32, out
    patches,
    seeds_stride,
    timesteps_stride,
    halves_stride,
    BLOCK: tl.constexpr,
):
    """The numbers of an image's patches; writes 4 bytes a patch."""
    image = tl.program_id(0)
    patch = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    seed = tl.load(seeds + image * seeds_stride)
    time = tl.load(timesteps + image * timesteps_stride)
    half = tl.load(halves + image * halves_stride)
    number = uniform(seed, time, half, patch)
    tl.store(numbers + image.to(tl.int64) * patches + patch, number, mask=patch < patches)


def patch_uniform(
    seeds: Tensor,  # [B]
    timesteps: Tensor,  # [B]
    halves: Tensor,  # [B]
    patches: int,
) -> Tensor:  # [B, patches]
    """`lbdt.reference.patch_uniform`, the same bits."""
    batch = seeds.shape[0]
    numbers = torch.empty(batch, patches, dtype=torch.float32, device=seeds.device)
    if numbers.numel() == 0:
        return numbers
    block = 256
    with device_of(seeds):
        patch_uniform_kernel[(batch, triton.cdiv(patches, block))](
            seeds,
            timesteps,
            halves,
            numbers,
            patches,
            *seeds.stride(),
            *timesteps.stride(),
            *halves.stride(),
            BLOCK=block,
            num_warps=4,
            num_stages=1,
        )
    return numbers
