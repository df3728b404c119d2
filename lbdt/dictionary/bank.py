"""The bank: embeddings of undetected patches, for feature maps in which every patch is detected."""

from __future__ import annotations

import torch
from torch import Tensor

from lbdt.activations.shuffle import mix

EMPTY = 2**63 - 1


class Bank:
    """The M patches of lowest priority seen so far per bin: a uniform draw without replacement, in memory of M patches.

    A patch's priority is a hash of (seed, prompt, timestep, patch), so the draw is the same in any order and merges.
    """

    def __init__(self, bins: int, size: int, width: int) -> None:
        self.priorities = torch.full((bins, size), EMPTY, dtype=torch.int64)
        self.rows = torch.zeros(bins, size, width)

    def add(self, bin: int, priorities: Tensor, rows: Tensor) -> None:
        """Offers patches: priorities [n] int64, rows [n, d], any float dtype and device."""
        size = self.priorities.shape[1]
        priorities, order = priorities.sort()
        # Rows are gathered only where they can be among the M.
        order = order[:size][priorities[:size] < self.priorities[bin].max()]
        kept = torch.cat([self.priorities[bin], priorities[: len(order)]])
        joined = torch.cat([self.rows[bin], rows[order.to(rows.device)].float().cpu()])
        best = kept.argsort(stable=True)[:size]
        self.priorities[bin], self.rows[bin] = kept[best], joined[best]

    def build(self) -> Tensor | None:
        """[T, m, d] float32 with m <= M, as many as every bin has; None where a bin has none."""
        found = int((self.priorities < EMPTY).sum(1).min())
        return self.rows[:, :found].clone() if found else None


def priorities(seed: int, first: int, timestep: int, patches: Tensor) -> Tensor:
    """[P, M] int64 in [0, 2^63): of the patches [P, M] of prompts `first`, `first` + 1, ..., at a timestep."""
    prompts = torch.arange(first, first + len(patches)).unsqueeze(1)
    high, low = (mix(seed, part, prompts, timestep, patches.long().cpu()) for part in (0, 1))
    return high << 31 | low >> 1
