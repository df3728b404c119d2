"""What happened at each UNet call, kept in fixed tensors on the device; read on the host only on request."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_CALLS = 4096
_CELLS = 1 << 22
_FIELDS = 6
_SIDE = 1 << 16


class Call(NamedTuple):
    """One UNet call; counts are over its rows, which are images times guidance halves."""

    timestep: float
    rows: int
    halves: int
    height: int
    width: int
    detected: int
    """Patches of all rows in which a concept was detected, before padding."""
    replaced: int
    """Patches overwritten, after padding."""
    full: int
    """Rows without any undetected patch."""
    unchanged: int
    """Rows of `full` that were left as they were, as there is no bank."""
    cells: Tensor | None
    """uint8 [rows, H, W]: bit 0 detected, bit 1 replaced; None where not kept."""


class Recorder:
    """Ring buffers of the last 4096 calls and, with `masks`, of the last 4 Mi cells (4 MiB).

    Writing is tensor arithmetic on the device: no host sync, no Python state, so it is the same under
    `torch.compile`.
    """

    def __init__(self, device: torch.device, masks: bool = False) -> None:
        self.masks = masks
        self.calls = torch.zeros(1, dtype=torch.int64, device=device)
        self.written = torch.zeros(1, dtype=torch.int64, device=device)
        self.counts = torch.zeros(_CALLS, _FIELDS, dtype=torch.int64, device=device)
        self.times = torch.zeros(_CALLS, dtype=torch.float32, device=device)
        self.cells = torch.zeros(_CELLS if masks else 0, dtype=torch.uint8, device=device)

    def to(self, device: torch.device) -> None:
        """Moves the buffers, with what they hold."""
        # Copies made in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            for name in ("calls", "written", "counts", "times", "cells"):
                setattr(self, name, getattr(self, name).to(device))

    def add(
        self,
        timesteps: Tensor,  # [B]
        mask: Tensor,  # [B, N]
        replaced: Tensor,  # [B, N]
        height: int,
        width: int,
        halves: int,
    ) -> None:
        """Writes one call. `mask` before padding, `replaced` after it, both bool."""
        rows = mask.shape[0]
        touched = replaced.any(dim=1)
        unchanged = mask.any(dim=1) & ~touched
        full = unchanged | replaced.all(dim=1)
        # One number for the sizes, as every fill is a kernel launch.
        sizes = torch.full_like(self.written, ((height * _SIDE + width) * 8 + halves) * _SIDE + rows)
        row = torch.cat(
            [
                sizes,
                torch.stack([mask.sum(), replaced.sum(), full.sum(), unchanged.sum()]),
                self.written,
            ]
        )
        slot = self.calls % _CALLS
        self.counts.index_copy_(0, slot, row.unsqueeze(0))
        self.times.index_copy_(0, slot, timesteps[:1].to(torch.float32))
        self.calls.add_(1)
        if self.masks:
            cells = (mask.to(torch.uint8) + 2 * replaced.to(torch.uint8)).flatten()
            places = torch.arange(cells.shape[0], device=cells.device)
            self.cells.index_copy_(0, (self.written + places) % _CELLS, cells)
            self.written.add_(cells.shape[0])

    def read(self) -> list[Call]:
        """The kept calls, oldest first. Waits for the device."""
        total, written = int(self.calls), int(self.written)
        counts, times, cells = self.counts.cpu(), self.times.cpu(), self.cells.cpu()
        calls = []
        for number in range(max(0, total - _CALLS), total):
            sizes, detected, replaced, full, unchanged, start = counts[number % _CALLS].tolist()
            sizes, rows = divmod(sizes, _SIDE)
            sizes, halves = divmod(sizes, 8)
            height, width = divmod(sizes, _SIDE)
            picture = None
            if self.masks and written - start <= _CELLS:
                places = (start + torch.arange(rows * height * width)) % _CELLS
                picture = cells[places].view(rows, height, width)
            time = float(times[number % _CALLS])
            calls.append(
                Call(time, rows, halves, height, width, detected, replaced, full, unchanged, picture)
            )
        return calls
