"""What happened at each UNet call, kept in fixed tensors on the device; read on the host only on request."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lbdt import ops
from lbdt.ops.record_patches import FIELDS

_ROWS = 1 << 16
_CELLS = 1 << 22
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
    not_finite: int
    """Patches that the SAE looked at and that hold NaN or infinity: nothing is detected in them."""
    gated: int = 0
    """Pictures in which patches were detected and all of them left as too few: conditional, or only, rows."""
    changed: tuple[int, ...] = ()
    """Patches overwritten, after padding, row by row."""


class Row(NamedTuple):
    """One row of a UNet call, as far as the end of a pipeline's call asks for it."""

    timestep: float
    image: int
    not_finite: int
    detected: int
    replaced: int
    gated: bool
    """Whether all that was detected was left by the gate."""


class Recorder:
    """Ring buffers of the last 65536 rows (2.5 MiB on the device, 3 with a gate) and, with `masks`, of the last 4 Mi
    cells (4 MiB).

    Writing is one op on the device: no host sync, no Python state, so it is the same under `torch.compile` and in a
    CUDA graph. What can be worked out of a row's two counts waits for `read`.
    """

    def __init__(self, device: torch.device, masks: bool = False, gated: bool = False) -> None:
        self.masks, self.gated = masks, gated
        self.written = torch.zeros(2, dtype=torch.int64, device=device)  # rows and cells
        self.rows = torch.zeros(_ROWS, FIELDS + 1 + gated, dtype=torch.int64, device=device)
        self.cells = torch.zeros(_CELLS if masks else 0, dtype=torch.uint8, device=device)

    def to(self, device: torch.device) -> None:
        """Moves the buffers, with what they hold."""
        # Copies made in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            for name in ("written", "rows", "cells"):
                setattr(self, name, getattr(self, name).to(device))

    def clear(self) -> None:
        """Forgets what was recorded, in place and without a host sync."""
        with torch.inference_mode(False):
            self.written.zero_()
            self.rows.zero_()

    def add(
        self,
        timesteps: Tensor,  # [B] float32
        mask: Tensor,  # [B, N]
        replaced: Tensor,  # [B, N]
        sums: Tensor,  # [B, N] float32
        height: int,
        width: int,
        halves: int,
        gated: Tensor | None = None,  # [B] int64
    ) -> None:
        """Writes one call. `mask` before padding, `replaced` after it, both bool; `sums`: of what was looked at, over
        its channels; `gated`: the patches that the gate took, iff the recorder is of a gate."""
        sizes = self.sizes(height, width, halves, mask.shape[0])
        ops.record_patches(mask, replaced, timesteps, sizes, self.rows, self.cells, self.written, sums, gated)

    @staticmethod
    def sizes(height: int, width: int, halves: int, batch: int) -> int:
        """What the rows of a call keep of its grid and rows."""
        return ((height * _SIDE + width) * 8 + halves) * _SIDE + batch

    def _gated(self, rows: list[list[int]]) -> int:
        """How many of these rows lost all that was detected to the gate."""
        return sum(row[-1] > 0 and row[0] == 0 for row in rows) if self.gated else 0

    def not_finite(self) -> int:
        """Patches with NaN or infinity among the kept calls. Waits for the device."""
        return int(self.rows[:, FIELDS].sum())

    def since(self, before: Tensor, until: Tensor | None = None) -> list[list[Row]]:
        """The kept calls that were written after `written` was `before` (a clone), newest first, row by row; `until`:
        and before it was that. Waits for the device."""
        first, written = int(before[0]), int(self.written[0])
        end = written if until is None else int(until[0])
        first = 0 if first > end else min(end, max(first, written - _ROWS))
        kept = self.rows[(torch.arange(first, end) % _ROWS).to(self.rows.device)].cpu()
        times = kept[:, 2].to(torch.int32).view(torch.float32).tolist()
        rows, calls = kept.tolist(), []
        while rows:
            sizes, batch = divmod(rows[-1][3], _SIDE)
            if batch > len(rows):
                break  # partly overwritten
            images = batch // (sizes % 8)
            calls.append(
                [
                    Row(time, place % images, row[FIELDS], row[0], row[1], self._gated([row]) > 0)
                    for place, (time, row) in enumerate(zip(times[-batch:], rows[-batch:], strict=True))
                ]
            )
            del rows[-batch:], times[-batch:]
        return calls

    def read(self) -> list[Call]:
        """The kept calls, oldest first. Waits for the device."""
        end, cell = self.written.tolist()
        oldest, first_cell = max(0, end - _ROWS), max(0, cell - _CELLS)
        kept = self.rows.cpu()[torch.arange(oldest, end) % _ROWS]
        times = kept[:, 2].to(torch.int32).view(torch.float32).tolist()
        rows, cells = kept.tolist(), self.cells.cpu()
        calls = []
        end -= oldest
        while end > 0:
            sizes, batch = divmod(rows[end - 1][3], _SIDE)
            sizes, halves = divmod(sizes, 8)
            height, width = divmod(sizes, _SIDE)
            end -= batch
            if end < 0:
                break  # partly overwritten
            counts = [row[:2] for row in rows[end : end + batch]]
            unchanged = [detected > 0 and replaced == 0 for detected, replaced in counts]
            full = [left or row[1] == height * width for left, row in zip(unchanged, counts, strict=True)]
            picture = None
            if self.masks:
                cell -= batch * height * width
                if cell >= first_cell:
                    places = torch.arange(cell, cell + batch * height * width) % _CELLS
                    picture = cells[places].view(batch, height, width)
            detected, replaced = (sum(column) for column in zip(*counts, strict=True))
            calls.append(
                Call(
                    times[end],
                    batch,
                    halves,
                    height,
                    width,
                    detected,
                    replaced,
                    sum(full),
                    sum(unchanged),
                    picture,
                    sum(row[FIELDS] for row in rows[end : end + batch]),
                    self._gated(rows[end + batch - batch // halves : end + batch]),
                    tuple(changed for _, changed in counts),
                )
            )
        return calls[::-1]
