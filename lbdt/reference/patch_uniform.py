"""Reference of `lbdt::patch_uniform`: counter-based uniform numbers, the same in any batch."""

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def patch_uniform(
    seeds: Tensor,  # [B]
    timesteps: Tensor,  # [B]
    halves: Tensor,  # [B]
    patches: int,
) -> Tensor:  # [B, patches]
    """Uniform float32 numbers in [0, 1), one a patch, from (seed, floor(timestep), half, patch) alone.

    Eq. (METHOD.md, 4.3): the first word of Philox4x32-10 with the seed's
    low and high words as key and (patch, timestep, half, 0) as counter; its upper 24 bits are the number.
    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    if timesteps.is_floating_point():
        # What is no int64 (NaN, infinity) counts as 0: its conversion would depend on the processor.
        timesteps = torch.where(timesteps.abs() < 2.0**63, timesteps.floor(), 0.0)
    patch = torch.arange(patches, dtype=torch.int64, device=seeds.device).expand(seeds.shape[0], patches)
    time = timesteps.to(torch.int64).unsqueeze(1).expand_as(patch)
    half = halves.to(torch.int64).unsqueeze(1).expand_as(patch)
    key = seeds.to(torch.int64).unsqueeze(1)
    counter = (patch & _WORD, time & _WORD, half & _WORD, torch.zeros_like(patch))
    word = philox4x32(counter, (key & _WORD, (key >> 32) & _WORD))[0]
    return (word >> 8).to(torch.float32) * 2.0**-24


def philox4x32(
    counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor], rounds: int = 10
) -> tuple[Tensor, ...]:
    """Philox4x32 on int64 tensors that hold 32-bit words: four counters and two key words -> four words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low word of a 32 x 32 bit product; in 16-bit halves, as the whole would overflow int64."""
    low = (a & 0xFFFF) * b
    high = (a >> 16) * b + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)
