"""What an attached eraser computes in a UNet call, after the detection."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lbdt import ops
from lbdt.donors import SOURCES
from lbdt.hooks.call_state import Now
from lbdt.hooks.detection_plan import DetectionOptions, DetectionPlan, Gate
from lbdt.hooks.pre_encoder import PreEncoder
from lbdt.hooks.recorder import Recorder
from lbdt.ops.erase_step import erase_step_or_none, serves


class KnownLatents(NamedTuple):
    """What detects every concept that a dictionary knows: on its patches there is no donor (METHOD.md, 4.2)."""

    latents: Tensor
    """[V] int64, each once."""
    thresholds: Tensor
    """[T, V] float32, on pre-activations: the lowest of its concepts'."""

    @classmethod
    def of(cls, latents: Tensor, thresholds: Tensor) -> KnownLatents:
        """Made from columns [V'] and [T, V'], in which a latent may come twice."""
        own, place = latents.unique(return_inverse=True)
        lowest = thresholds.new_full((thresholds.shape[0], own.shape[0]), torch.inf)
        # A patch passes one of several thresholds iff it passes the lowest.
        lowest.scatter_reduce_(1, place.expand_as(thresholds), thresholds, "amin")
        return cls(own, lowest)


class ErasePlan(DetectionPlan):
    """The plan of an eraser: with what it overwrites patches by."""

    def __init__(
        self,
        options: DetectionOptions,
        *tensors: Tensor | None,  # of DetectionPlan, in its order
        bank: Tensor | None,  # [T, M, d]
        padding: int,
        source: str,
        target: str,
        gate: Gate | None = None,
        known: KnownLatents | None = None,
        pre: PreEncoder | None = None,
        centre: Tensor | None = None,  # [d] float32
    ) -> None:
        super().__init__(options, *tensors, gate=gate, pre=pre, centre=centre)
        self.known = known
        # Contiguous, as `step` takes it.
        self._exact_bank = None if bank is None else bank.contiguous()
        self.bank, self.padding, self.source, self.target = self._exact_bank, padding, source, target
        self._source = SOURCES.index(source)

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Moves the tensors; `dtype` is that of the activations, which the encoder rows and the bank take."""
        super().to(device, dtype)
        self.bank = None if self._exact_bank is None else self._exact_bank.to(device, dtype)
        self.known = None if self.known is None else KnownLatents(*(t.to(device) for t in self.known))

    def serves(self, x: Tensor) -> bool:
        """Whether `step` may stand for `detect`, `replace` and what records them."""
        return self.pre is None and self.target == "output" and serves(x, self.bank)

    def step(
        self, x: Tensor, minus: Tensor | None, height: int, width: int, now: Now, recorder: Recorder
    ) -> Tensor | None:
        """`x` with what was detected replaced, and recorded, in one op; None where nothing was."""
        branches, options, gate, known = now.branches, self.options, self.gate, self.known
        prompted = branches.of_the_prompt if options.rows == "cond" else ()
        cond = -1 if gate is None else branches.cond
        run = None, None, None, False
        if gate is not None and gate.over_run:
            images = x.shape[0] if cond < 0 else branches.images
            run = *now.memory.tensors(images, x.device), now.memory.whole_calls
        return erase_step_or_none(
            x,
            now.timesteps,
            self.weight,
            self.bias,
            self.latents,
            self.thresholds,
            self.timesteps,
            self.enabled,
            self.seeds,
            options.k,
            branches.images,
            height,
            width,
            recorder.sizes(height, width, branches.count, x.shape[0]),
            recorder.rows,
            recorder.cells,
            recorder.written,
            minus,
            self.bank,
            *((None, None) if known is None else known),
            self.padding,
            self._source,
            *((None, None, 0) if gate is None else gate[:3]),
            cond,
            sum(1 << place for place in prompted) if prompted else -1,
            *((None, 0, 0) if options.steps is None else (now.schedule.to(x.device), *options.steps)),
            *run,
            *self.screen,
        )

    def detect(self, x: Tensor, minus: Tensor | None, now: Now) -> Tensor:
        """What `DetectionPlan.detect` does; where patches of known concepts are no donors, it keeps which they are."""
        mask = super().detect(x, minus, now)
        if self.known is not None:
            # Without a patch to replace a row needs no donor: with no latent enabled it has no candidate to rank.
            enabled = mask.any(1, keepdim=True).expand(-1, self.known.latents.shape[0])
            looked, minus = self.looked(x, minus, now)
            now.avoid = ops.detect_patches(
                looked,
                self.weight,
                self.bias,
                self.known.latents,
                self.known.thresholds,
                self.rows(now).bins,
                enabled,
                self.options.k,
                minus,
                **self.screened_by(),
            )
        now.looked = None
        return mask

    def replace(self, x: Tensor, mask: Tensor, height: int, width: int, now: Now) -> tuple[Tensor, Tensor]:
        """`x` with the padded mask replaced, and which patches were; the draws of a row depend on its image only."""
        rows = self.rows(now)
        u = ops.patch_uniform(rows.seeds, now.timesteps, rows.half, mask.shape[1])
        bank = None if self.bank is None else self.bank.index_select(0, rows.bins)
        return ops.replace_patches(x, mask, u, height, width, self.padding, self.source, bank, now.avoid)
