"""What an attached steering baseline computes in a UNet call. No host sync, no shape that depends on data.

Sizes: x [B, d, H, W] or [B, d, N]; U columns (a concept's latents), V distinct latents, T timestep bins.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lbdt import ops
from lbdt.hooks.call_state import Now
from lbdt.hooks.detection_plan import DetectionOptions, EditPlan
from lbdt.hooks.pre_encoder import PreEncoder

_BLOCK = 4096  # latents decoded at a time where there is no top-k: [B, N, L] is never held


class SteerPlan(EditPlan):
    """What all rules have in common: every column's factor and decoder row, and which of two owners edits a latent."""

    EXCHANGED = (*EditPlan.EXCHANGED, "factors", "directions", "rivals")

    def __init__(
        self,
        options: DetectionOptions,
        *tensors: Tensor | None,  # of DetectionPlan, in its order
        factors: Tensor,  # [T, U] float32, 0 where a latent is not selected in a bin
        directions: Tensor,  # [U, d] float32
        pre: PreEncoder | None = None,
    ) -> None:
        super().__init__(options, *tensors, pre=pre)
        self.factors, self.directions = factors, directions
        self.rivals = _rivals(self.latents, factors)

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Moves the tensors; edits are computed in float32, or in float64 for float64 activations."""
        super().to(device, dtype)
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.factors = self.factors.to(device, self.wide)
        self.directions = self.directions.to(device, self.wide)
        self.rivals = None if self.rivals is None else self.rivals.to(device)

    def take(self, other: SteerPlan) -> None:
        other.to(self.weight.device, self.weight.dtype)
        super().take(other)

    def _winners(self, on: Tensor, bins: Tensor) -> Tensor:
        """`on` [B, U, M] bool without the columns whose latent another column edits more strongly."""
        if self.rivals is None:
            return on
        lost = torch.bmm(self.rivals.index_select(0, bins), on.to(torch.float32)) > 0
        return on & ~lost

    def _looked_at(self, x: Tensor, given: Tensor | None) -> Tensor:
        """The SAE's input, [B, d, N] in the edit's dtype."""
        looked = x.flatten(2).to(self.wide)
        return looked if given is None else looked - given.flatten(2).to(self.wide)


class LatentPlan(SteerPlan):
    """SAeUron's rule: where `z_i > mu_i(t)`, `z_i <- z_i * strength * a[c, t, i]`, and back by the decoder."""

    EXCHANGED = (*SteerPlan.EXCHANGED, "columns", "slots", "distinct", "own_weight", "own_bias")

    def __init__(self, *tensors, sigmoid: bool, decoder: Decoder | None, **columns) -> None:
        """`sigmoid`: z = sigmoid(h) instead of h. `decoder`: for the released sign of the error; None: corrected."""
        super().__init__(*tensors, **columns)
        self.sigmoid, self.decoder = sigmoid, decoder
        distinct, self.columns = self.latents.unique(return_inverse=True)  # [V], [U]
        self.slots = torch.full((self.weight.shape[0],), len(distinct))  # [L]; V: no column reads it
        self.slots[distinct] = torch.arange(len(distinct))
        self.distinct = len(distinct)

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Moves the tensors, and gathers the rows of the columns' own latents."""
        super().to(device, dtype)
        self.columns, self.slots = self.columns.to(device), self.slots.to(device)
        # From the cast rows, as detection reads them.
        self.own_weight = self.weight.index_select(0, self.latents).to(self.wide)
        self.own_bias = self.bias.index_select(0, self.latents).to(self.wide).unsqueeze(1)
        if self.decoder is not None:
            self.decoder.to(device, dtype)

    def edit(self, x: Tensor, given: Tensor | None, now: Now) -> tuple[Tensor, Tensor, Tensor]:
        rows, enabled = self.rows(now), self.enabled_in(now)
        looked = self._looked_at(x, given)
        read = looked if self.pre is None else self.looked(x, given, now)[0].to(self.wide)
        h = torch.matmul(self.own_weight, read) + self.own_bias  # [B, U, N]
        floor = self.thresholds.index_select(0, rows.bins).masked_fill(~enabled, torch.inf)
        fires = h > floor.unsqueeze(2)
        code = None
        if self.options.k:
            source, minus = self.looked(x, given, now)
            source = source if minus is None else source - minus
            # Which latents are kept has no gradient; their values' comes by h.
            source = source.detach() if self.decoder is None else source
            code = ops.encode_topk(source, self.weight, self.bias, self.options.k)
            fires = fires & self._kept(code[1])
        z = h.sigmoid() if self.sigmoid else h
        factor = self.factors.index_select(0, rows.bins).unsqueeze(2)
        # Per latent first: z * 1 - z is exactly 0, so an identity edit leaves every bit.
        change = torch.where(self._winners(fires, rows.bins), z * factor - z, 0)
        edit = torch.matmul(self.directions.t(), change)  # [B, d, N]
        detected = fires.any(1)
        if self.decoder is None:
            return _added(x, edit, (change != 0).any(1)), detected, (change != 0).any(1)
        # dec(z') + (dec(z) - u) = u + 2 (dec(z) - u) + (z' - z) W_dec, and x = given + u.
        decoded = self.decoder.decode(code, read, self.weight, self.bias)
        changed = enabled.any(1, keepdim=True).expand_as(detected)
        return _added(x, edit + 2 * (decoded - looked), changed), detected, changed

    def _kept(self, indices: Tensor) -> Tensor:
        """The columns whose latents are among the kept ones `indices` [B, N, k]: [B, U, N] bool."""
        batch, patches, _ = indices.shape
        kept = torch.zeros(batch, patches, self.distinct + 1, dtype=torch.bool, device=indices.device)
        kept = kept.scatter(2, self.slots[indices], True)
        return kept.index_select(2, self.columns).transpose(1, 2)


class VectorPlan(SteerPlan):
    """The rules that add decoder rows: `x <- x + scale * sum_i factor_i D_i`, scale 1 (SDXL) or the patch's norm
    (G-SAE, whose D_i have unit norm here)."""

    def __init__(self, *tensors, by_norm: bool, only_detected: bool, **columns) -> None:
        super().__init__(*tensors, **columns)
        self.by_norm, self.only_detected = by_norm, only_detected

    def edit(self, x: Tensor, given: Tensor | None, now: Now) -> tuple[Tensor, Tensor, Tensor]:
        rows, enabled = self.rows(now), self.enabled_in(now)
        detected = self.detect(x, given, now)
        on = self._winners(enabled.unsqueeze(2), rows.bins).squeeze(2)
        factor = torch.where(on, self.factors.index_select(0, rows.bins), 0)
        vector = torch.matmul(factor, self.directions).unsqueeze(2)  # [B, d, 1]
        if self.by_norm:
            edit = vector * torch.linalg.vector_norm(self._looked_at(x, given), dim=1, keepdim=True)
        else:
            edit = vector.expand(-1, -1, detected.shape[1])
        changed = (edit != 0).any(1)
        if self.only_detected:
            changed = changed & detected
        return _added(x, edit, changed), detected, changed


class Decoder:
    """The whole decoder, for the released sign of the reconstruction error."""

    def __init__(self, weight: Tensor, bias: Tensor, floors: Tensor) -> None:
        """`weight` [L, d] and `floors` [L] in the order of the plan's encoder rows, `bias` [d]. Kinds without a top-k:
        z = h where h is above `floors`, else 0."""
        self._exact_weight = weight
        self.weight, self.bias, self.floors = weight, bias, floors

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        self.weight = self._exact_weight.to(device, dtype)
        self.bias, self.floors = self.bias.to(device), self.floors.to(device)

    def decode(
        self,
        code: tuple[Tensor, Tensor] | None,  # [B, N, k] values >= 0 and indices; None: of `looked`
        looked: Tensor,  # [B, d, N], what the encoder reads
        encoder: Tensor,  # [L, d]
        encoder_bias: Tensor,  # [L]
    ) -> Tensor:  # [B, d, N]
        """`z W_dec + b_dec`, in the dtype of `looked`."""
        if code is not None:
            values, indices = code
            kept = values.shape[2]
            out = F.embedding_bag(
                indices.reshape(-1, kept),
                self.weight,
                per_sample_weights=values.reshape(-1, kept),
                mode="sum",
            )
            out = out.view(values.shape[0], values.shape[1], -1).transpose(1, 2).to(looked.dtype)
        else:
            out = torch.zeros_like(looked)
            for start in range(0, len(encoder), _BLOCK):
                part = slice(start, start + _BLOCK)
                bias = encoder_bias[part].to(looked.dtype).unsqueeze(1)
                h = torch.matmul(encoder[part].to(looked.dtype), looked) + bias
                z = torch.where(h > self.floors[part].to(looked.dtype).unsqueeze(1), h, 0)
                out = out + torch.matmul(self.weight[part].to(looked.dtype).t(), z)
        return out + self.bias.to(looked.dtype).unsqueeze(1)


def _added(x: Tensor, edit: Tensor, changed: Tensor) -> Tensor:
    """`x` plus `edit` [B, d, N] in the patches `changed` [B, N]; the others keep their bits."""
    out = (x.to(edit.dtype) + edit.reshape(x.shape)).to(x.dtype)
    return out.where(changed.reshape(x.shape[0], 1, *x.shape[2:]), x)


def _rivals(latents: Tensor, factors: Tensor) -> Tensor | None:
    """[T, U, U] float32, 1 where column w edits the latent of column u instead of it: the same latent, and the larger
    factor (of equal ones, the earlier column); None where no latent comes twice."""
    same = latents.unsqueeze(1) == latents.unsqueeze(0)
    same.fill_diagonal_(False)
    if not bool(same.any()):
        return None
    size = factors.abs()
    mine, other = size.unsqueeze(2), size.unsqueeze(1)
    place = torch.arange(len(latents))
    earlier = place.unsqueeze(0) < place.unsqueeze(1)
    return (same & ((other > mine) | ((other == mine) & earlier))).float()
