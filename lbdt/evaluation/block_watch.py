"""What a block of a running pipeline returns, edits included: a fixed sample of its patches."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lbdt import ops
from lbdt.activations.capture import DENOISERS, Schedule, capture, choose
from lbdt.activations.shuffle import mix
from lbdt.activations.sites import Site
from lbdt.editors.attachment import check_hookpoint, seed_values


class BlockWatch:
    """Keeps, while inside, patches of one block's output in one pipeline call: what the later layers see.

    Of guidance's halves the conditional one is watched, or the only one. Which patches are kept follows from the
    picture's seed and the timestep alone (`lbdt.ops.patch_uniform`), so edited and unedited runs of a picture are read
    at the same patches, in any batch. An eraser or a steering baseline changes a module's forward, and this is a
    PyTorch forward hook: it sees their edit whichever of them was put on first. After it the block is as it was.

        with eraser.attach(pipe, ["Cats"], seed=seeds), BlockWatch(pipe, eraser.hookpoint, seeds) as watch:
            pictures = pipe(...)
        rows = watch.rows()
    """

    def __init__(
        self,
        pipe: Any,
        hookpoint: str,
        seeds: Sequence[int],
        *,
        patches: int | None = 8,
        timesteps: Sequence[int] | int | None = None,
    ) -> None:
        """
        Args:
            pipe: a diffusers pipeline with a UNet or transformer.
            hookpoint: the block, e.g. `eraser.hookpoint`. Its output is kept, also where an SAE reads its update.
            seeds: the seed of each picture of the pipeline call, in its order.
            patches: M patches of each picture and timestep, drawn without replacement; None, or more than there are:
                all N of them.
            timesteps: which of the schedule's, by value, or so many spread evenly over it; None: all.

        Raises:
            TypeError: not a pipeline; a hookpoint or seeds of another type.
            ValueError: an unknown hookpoint, or one outside of the denoiser; no seeds; `patches` < 1. At the pipeline's
                call: timesteps that the schedule lacks, another number of pictures.
        """
        check_hookpoint("hookpoint", hookpoint)
        if hookpoint.partition(".")[0] not in DENOISERS:
            raise ValueError(
                f"hookpoint: expected a block of the {' or '.join(DENOISERS)}, as others have no timesteps; "
                f"got {hookpoint!r}"
            )
        if patches is not None and patches < 1:
            raise ValueError(f"patches: expected an integer >= 1, or None for all, got {patches}")
        self._seeds = torch.tensor(seed_values(seeds)[0], dtype=torch.int64)
        self._pipe, self._site = pipe, Site(hookpoint)
        self._patches, self._timesteps = patches, timesteps
        self._inside = contextlib.ExitStack()
        self._forget()

    def __enter__(self) -> BlockWatch:
        self._forget()
        self._inside.enter_context(capture(self._pipe, [self._site], len(self._seeds), self))
        return self

    def __exit__(self, *exception: object) -> None:
        self._inside.close()

    def rows(self) -> Tensor:
        """float32 [P * T * M, d] on the CPU: by picture, then timestep (descending), then patch (ascending).

        The rows of two batches, put together, are those of one batch of all their pictures.

        Raises:
            ValueError: no pipeline call has run to its end inside.
        """
        if not self._kept or len(self._kept) < len(self._wanted):
            raise ValueError(
                f"watch: {self._site.hookpoint} ran at {len(self._kept)} of the {len(self._wanted)} timesteps; run one "
                "whole pipeline call inside the with block"
            )
        x = torch.stack([self._kept[timestep] for timestep in self._wanted], dim=1)
        return x.flatten(0, 2).cpu()

    @property
    def timesteps(self) -> tuple[int, ...]:
        """Those of `rows`, descending; none before a pipeline call."""
        return self._wanted

    def begin(self, timestep: float) -> bool:
        """A step of `lbdt.activations.capture.Receiver`; of calls at one timestep the first one counts."""
        if self._schedule is None:
            self._schedule = Schedule.of(self._pipe.scheduler.timesteps.tolist(), timestep)
            self._wanted = choose(self._schedule.values, self._timesteps)
        now = self._schedule.nearest(timestep)
        if self._now is not None and now > self._now:
            raise ValueError(
                f"watch: timestep {now} came after {self._now}, so a second pipeline call began; make a "
                "BlockWatch for each"
            )
        fresh = now in self._wanted and now not in self._kept
        self._now = now
        return fresh

    def take(self, site: Site, x: Tensor, sample: Tensor) -> None:
        """A step of `Receiver`: `x` [P, N, d]."""
        if self._now in self._kept:
            raise ValueError(
                f"hookpoint: {site.hookpoint} ran twice in one call of the denoiser; watch another block"
            )
        count = x.shape[1]
        if self._patches is not None and self._patches < count:
            times = torch.full_like(self._seeds, self._now)
            u = ops.patch_uniform(mix(0, self._seeds), times, torch.zeros_like(times), count)
            drawn = u.argsort(dim=1, stable=True)[:, : self._patches].sort(dim=1).values
            x = x.gather(1, drawn.to(x.device).unsqueeze(2).expand(-1, -1, x.shape[2]))
        # A copy: a later layer may write into the block's output.
        self._kept[self._now] = x.detach().to(torch.float32, copy=True)

    def end(self) -> None:
        """The last step of `Receiver`; nothing is left to do."""

    def _forget(self) -> None:
        self._schedule: Schedule | None = None
        self._now: int | None = None
        self._wanted: tuple[int, ...] = ()
        self._kept: dict[int, Tensor] = {}
