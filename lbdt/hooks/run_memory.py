"""What the gate has counted in the denoiser calls of a run, between them."""

from __future__ import annotations

import torch
from torch import Tensor

from lbdt import call_rows

_IMAGES = 64
"""Images that there is room for from the start: compiled code must find the tensors that it will write."""


class RunMemory:
    """`so_far` of `lbdt.ops.detect_patches`, for the images of one run after another.

    An image begins a run when its timestep is larger than in the call before (`whole_calls` False: or as large, as in
    loops of one step), when there are more or fewer images, and when it is told to. All of it is decided on the device.
    Guidance branches of an image share its sums, so that they may come and go within a run.
    """

    def __init__(self, concepts: int, device: torch.device, whole_calls: bool) -> None:
        """`whole_calls`: whether runs are announced, so that a timestep may come twice in one."""
        self.concepts, self.whole_calls = concepts, whole_calls
        self.epoch = 0
        """The last `CallState.begin_run` that it has heard of."""
        self._allocate(_IMAGES, device)

    def begin(self) -> None:
        """The next call begins a run, in all images."""
        self._last.fill_(-torch.inf)

    def rows(self, timesteps: Tensor, inside: Tensor | None, images: int) -> Tensor:
        """`so_far` [B, C + 1] of a call with `timesteps` [B] float32, branch by branch, to be given to `keep` after
        it; what it was is forgotten where a run begins.

        `inside` [B] bool: the rows for which this call belongs to a run (None: all); for others one begins after it.
        """
        sums, last, count = self.tensors(images, timesteps.device)
        return call_rows.begin_call(sums[:images], last[:images], count, timesteps, inside, self.whole_calls)

    def tensors(self, images: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """`run_sums`, `run_last` and `run_count` of `lbdt.ops.erase_step`, with room for so many images."""
        if images > self._sums.shape[0] or self._sums.device != device:
            self._allocate(max(images, self._sums.shape[0]), device)
        return self._sums, self._last, self._count

    def keep(self, so_far: Tensor, images: int) -> None:
        """Keeps what a call has made of `rows`: the same in every branch, as one row decides for all of an image."""
        self._sums[:images].copy_(so_far[:images])

    def _allocate(self, images: int, device: torch.device) -> None:
        # Tensors made in inference mode could not be written outside of it.
        with torch.inference_mode(False), torch.no_grad():
            self._sums = torch.zeros(images, self.concepts + 1, dtype=torch.int64, device=device)
            self._last = torch.full((images,), -torch.inf, device=device)
            self._count = torch.zeros((), dtype=torch.int64, device=device)
