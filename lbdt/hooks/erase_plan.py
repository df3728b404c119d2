"""What an attached eraser computes in a UNet call, after the detection."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lbdt import ops
from lbdt.hooks.call_state import Now
from lbdt.hooks.detection_plan import DetectionOptions, DetectionPlan, Gate
from lbdt.hooks.pre_encoder import PreEncoder


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
        *tensors: Tensor,  # of DetectionPlan, in its order
        bank: Tensor | None,  # [T, M, d]
        padding: int,
        source: str,
        target: str,
        gate: Gate | None = None,
        known: KnownLatents | None = None,
        pre: PreEncoder | None = None,
    ) -> None:
        super().__init__(options, *tensors, gate=gate, pre=pre)
        self.known = known
        self.bank, self.padding, self.source, self.target = bank, padding, source, target
        self._exact_bank = bank

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Moves the tensors; `dtype` is that of the activations, which the encoder rows and the bank take."""
        super().to(device, dtype)
        self.bank = None if self._exact_bank is None else self._exact_bank.to(device, dtype)
        self.known = None if self.known is None else KnownLatents(*(t.to(device) for t in self.known))

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
            )
        now.looked = None
        return mask

    def replace(self, x: Tensor, mask: Tensor, height: int, width: int, now: Now) -> tuple[Tensor, Tensor]:
        """`x` with the padded mask replaced, and which patches were; the draws of a row depend on its image only."""
        rows = self.rows(now)
        u = ops.patch_uniform(rows.seeds, now.timesteps, rows.half, mask.shape[1])
        bank = None if self.bank is None else self.bank.index_select(0, rows.bins)
        return ops.replace_patches(x, mask, u, height, width, self.padding, self.source, bank, now.avoid)
