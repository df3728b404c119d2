"""What the gate has counted in the denoiser calls of a run, between them."""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS = 64
"""Rows that there is room for from the start: compiled code must find the tensors that it will write."""


class RunMemory:
    """`so_far` of `lbdt.ops.detect_patches`, for the rows of one run after another.

    A row begins a run when its timestep is larger than in the call before (`whole_calls` False: or as large, as in
    loops of one step), when there are more or fewer rows, and when it is told to. All of it is decided on the device.
    """

    def __init__(self, concepts: int, device: torch.device, whole_calls: bool) -> None:
        """`whole_calls`: whether runs are announced, so that a timestep may come twice in one."""
        self.concepts, self.whole_calls = concepts, whole_calls
        self._batch = 0
        self._allocate(_ROWS, concepts + 1, device)

    def begin(self) -> None:
        """The next call begins a run, in all rows."""
        self._last.fill_(-torch.inf)

    def rows(self, timesteps: Tensor, counts: Tensor | None) -> Tensor:
        """`so_far` [B, C + 1] of a call at `timesteps` [B] float32; what it was is forgotten where a run begins.

        `counts` [B] bool: the rows for which this call belongs to a run (None: all); for others one begins after it.
        """
        batch = timesteps.shape[0]
        if batch > self._sums.shape[0] or self._sums.device != timesteps.device:
            self._allocate(max(batch, self._sums.shape[0]), self._sums.shape[1], timesteps.device)
        if batch != self._batch:
            self.begin()
            self._batch = batch
        sums, last = self._sums[:batch], self._last[:batch]
        begins = timesteps > last if self.whole_calls else timesteps >= last
        sums.masked_fill_(begins.unsqueeze(1), 0)
        last.copy_(timesteps if counts is None else timesteps.masked_fill(~counts, -torch.inf))
        return sums

    def _allocate(self, rows: int, columns: int, device: torch.device) -> None:
        # Tensors made in inference mode could not be written outside of it.
        with torch.inference_mode(False), torch.no_grad():
            self._sums = torch.zeros(rows, columns, dtype=torch.int64, device=device)
            self._last = torch.full((rows,), -torch.inf, device=device)
