"""What is said of each row of a denoiser call: its image and branch, bin, settings, and what its run has counted.

Rows are images, branch by branch. All of it stays on the device: csrc/cpu/call_rows.h says the same on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def images_of(batch: int, images: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The image and the branch of each row, both int64 [B]."""
    row = torch.arange(batch, device=device)
    half = row // images
    return row - half * images, half


def nearest(timesteps: Tensor, values: Tensor) -> Tensor:
    """The place of the nearest of `values` [T] to each of `timesteps` [B] float32, of two the first; int64 [B]."""
    return (timesteps.unsqueeze(-1) - values).abs().argmin(-1)


def in_window(timesteps: Tensor, schedule: Tensor, steps: tuple[int, int]) -> Tensor:
    """Whether the step of the `schedule` at `timesteps` [B] float32 lies in [first, last); bool [B]."""
    # The nearest entry, not equality: a pipeline may round the timesteps to half precision.
    step = nearest(timesteps, schedule.to(torch.float32))
    return (step >= steps[0]) & (step < steps[1])


def seeds_of(seeds: Tensor, image: Tensor, images: int) -> Tensor:
    """The seed of each row [B] by `seeds` [R]: those that follow each of them, image by image."""
    if seeds.shape[0] == 1:
        return seeds + image
    each = images // seeds.shape[0]
    return seeds.index_select(0, image // each) + image % each


def sets_of(enabled: Tensor, image: Tensor, images: int) -> Tensor:
    """The latents that each row's set enables, bool [B, U], by the sets `enabled` [S, U]."""
    if enabled.shape[0] == 1:
        return enabled.expand(image.shape[0], -1)
    return enabled.index_select(0, image // (images // enabled.shape[0]))


def in_branches(half: Tensor, branches: Sequence[int]) -> Tensor:
    """Whether each row's branch `half` [B] is among those that are named; bool [B]."""
    found = half == branches[0]
    for branch in branches[1:]:
        found = found | (half == branch)
    return found


def begin_call(
    sums: Tensor,  # [images, C + 1]
    last: Tensor,  # [images]
    count: Tensor,  # []
    timesteps: Tensor,  # [B] float32
    inside: Tensor | None,  # [B] bool
    whole_calls: bool,
) -> Tensor:
    """`so_far` [B, C + 1] of a call by what a run memory holds (METHOD.md, 2.6), branch by branch; where a run begins
    its sums are 0. Keeps the timestep and how many images there are.

    An image begins a run when its timestep is larger than in the call before (`whole_calls` False: or as large), and
    when there are more or fewer images. `inside`: the rows for which the call belongs to a run (None: all); for others
    one begins after it.
    """
    images = sums.shape[0]
    now = timesteps[:images]
    begins = (now > last if whole_calls else now >= last) | (count != images)
    sums.masked_fill_(begins.unsqueeze(1), 0)
    last.copy_(now if inside is None else now.masked_fill(~inside[:images], -torch.inf))
    count.fill_(images)
    return sums.repeat(timesteps.shape[0] // images, 1)
