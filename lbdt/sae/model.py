"""The sparse autoencoder: encoder, activation functions, decoder."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lbdt.sae import sae_checkpoint
from lbdt.sae.config import RANKED_ACTIVATIONS, SAEConfig

_CHUNK_ELEMENTS = 1 << 24
"""Pre-activations encoded at a time: 64 MiB in float32, whatever the batch."""


class SparseCode(NamedTuple):
    """Sparse activations: per patch the kept latents. Entries of value 0 are padding, whatever their index."""

    values: Tensor
    """[..., k] float32, >= 0."""
    indices: Tensor
    """[..., k] int64, in [0, L), distinct within a patch."""


class SparseAutoencoder(nn.Module):
    """`z = act(W_enc (x - b_dec) + b_enc)`, `x_hat = z W_dec + b_dec` (METHOD.md, 1.2 and 2.1; arXiv 2606.31699 and
    SAeUron, arXiv 2501.18052). With `config.pre_encoder` the encoder reads `gelu(W_pre (x - b_dec) + b_pre)` in place
    of `x - b_dec`, with the exact GELU (SAEParate, arXiv 2605.12122).

    Parameters carry the names of SAeUron's file: `encoder.weight [L, d]`, `encoder.bias [L]`, `W_dec [L, d]`,
    `b_dec [d]`, and for jumprelu `theta [L]`; of SAEParate's `pre_encoder.0.weight [d, d]`, `pre_encoder.0.bias [d]`.
    A new autoencoder has tied weights with unit decoder rows, and a pre-encoder the starting values of `nn.Linear`.
    """

    def __init__(self, config: SAEConfig) -> None:
        super().__init__()
        self.config = config
        self.pre_encoder = None
        if config.pre_encoder:
            self.pre_encoder = nn.Sequential(nn.Linear(config.d_in, config.d_in), nn.GELU())
        self.encoder = nn.Linear(config.d_in, config.num_latents)
        nn.init.zeros_(self.encoder.bias)
        weight = self.encoder.weight.detach()
        self.W_dec = None if config.encoder_only else nn.Parameter(F.normalize(weight, dim=1))
        self.b_dec = nn.Parameter(torch.zeros(config.d_in))
        if config.activation == "jumprelu":
            self.theta = nn.Parameter(torch.zeros(config.num_latents))

    @property
    def rank_k(self) -> int:
        """k of the rank test `rank_i < k` for topk kinds, 0 for kinds without one."""
        return self.config.k if self.config.activation in RANKED_ACTIVATIONS else 0

    def folded_bias(self) -> Tensor:
        """The bias of `h = W_enc looked(x) + b'`, [L] float32: `b_enc - W_enc b_dec`, or with a pre-encoder, which has
        the pre-bias before it, `b_enc`."""
        bias = self.encoder.bias.float()
        return bias if self.config.pre_encoder else bias - self.encoder.weight.float() @ self.b_dec.float()

    def folded_pre_encoder(self) -> tuple[Tensor, Tensor] | None:
        """`W_pre` [d, d] in the weights' dtype and `b_pre - W_pre b_dec` [d] float32, of
        `looked(x) = gelu(W_pre x + b)`; None without a pre-encoder."""
        if self.pre_encoder is None:
            return None
        linear = self.pre_encoder[0]
        return linear.weight, linear.bias.float() - linear.weight.float() @ self.b_dec.float()

    def looked(self, x: Tensor) -> Tensor:
        """What the encoder's rows are multiplied with, of `x` ([..., d], any float dtype): `x` itself, or with a
        pre-encoder `gelu(W_pre (x - b_dec) + b_pre)` in float32.

        Raises:
            ValueError: last dimension other than d.
            TypeError: `x` is not a floating-point tensor.
        """
        folded, x = self.folded_pre_encoder(), self._checked(x)
        return x if folded is None else F.gelu(_linear(x, *folded))

    def pre_activations(self, x: Tensor) -> Tensor:
        """h of `x` ([..., d], any float dtype, cast to the weights') -> [..., L] float32."""
        return _linear(self.looked(x), self.encoder.weight, self.folded_bias())

    def encode(self, x: Tensor) -> SparseCode:
        """The sparse code of `x` ([..., d], any float dtype) -> values float32 and indices int64, [..., k].

        For kinds without a rank test the width is that of the patch with most active latents (at least 1);
        the rest is padding of value 0. Works in chunks: pre-activations of more than 64 MiB are never held.

        Raises:
            ValueError: last dimension other than d, or batch_topk without a threshold.
            TypeError: `x` is not a floating-point tensor.
        """
        flat = self._checked(x).reshape(-1, self.config.d_in)
        bias = self.folded_bias()
        rows = max(1, _CHUNK_ELEMENTS // self.config.num_latents)
        chunks = flat.split(rows)
        weight = self.encoder.weight
        parts = [self._encode_rows(_linear(self.looked(chunk), weight, bias)) for chunk in chunks]
        width = max(part.values.shape[1] for part in parts)
        # A patch's indices must stay distinct (a scatter would lose values), so narrow chunks are redone.
        parts = [
            part
            if part.values.shape[1] == width
            else self._encode_rows(_linear(self.looked(chunk), weight, bias), width)
            for chunk, part in zip(chunks, parts, strict=True)
        ]
        values = torch.cat([part.values for part in parts])
        indices = torch.cat([part.indices for part in parts])
        return SparseCode(values.view(*x.shape[:-1], width), indices.view(*x.shape[:-1], width))

    def decode(self, code: SparseCode) -> Tensor:
        """`z W_dec + b_dec` of a code [..., k] -> [..., d] in the decoder's dtype.

        Raises:
            ValueError: this SAE was saved without its decoder.
        """
        if self.W_dec is None:
            raise ValueError(
                "this SAE has no decoder (encoder_only); load the full checkpoint (sae.safetensors with "
                "W_dec) to decode"
            )
        width = code.values.shape[-1]
        out = F.embedding_bag(
            code.indices.reshape(-1, width),
            self.W_dec,
            per_sample_weights=code.values.reshape(-1, width).to(self.W_dec.dtype),
            mode="sum",
        )
        return out.view(*code.values.shape[:-1], self.config.d_in) + self.b_dec

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction of `x` [..., d]."""
        return self.decode(self.encode(x))

    def to_pre_activation(self, thresholds: Tensor, latents: Tensor) -> Tensor:
        """Thresholds on activations, `z_i > mu`, as thresholds on pre-activations (METHOD.md, 2.1).

        `thresholds` [T, U] (any leading shape), +inf where a latent is not selected; `latents` [U] int64.
        Returns float32 of the same shape, +inf staying +inf. For topk kinds the rank test `rank_i < rank_k`
        comes on top.

        Raises:
            ValueError: NaN or negative thresholds (no detection is defined below 0), latents out of range,
            shapes.
        """
        thresholds = torch.as_tensor(thresholds, dtype=torch.float32)
        if thresholds.dim() == 0 or latents.dim() != 1 or thresholds.shape[-1] != latents.shape[0]:
            raise ValueError(
                f"thresholds {tuple(thresholds.shape)} and latents {tuple(latents.shape)}: expected [T, U] "
                f"and [U]"
            )
        if not bool((thresholds >= 0).all()):
            raise ValueError(
                "thresholds: expected values >= 0 and no NaN (detection is z_i > mu_i with mu_i >= 0)"
            )
        if latents.numel() and (int(latents.min()) < 0 or int(latents.max()) >= self.config.num_latents):
            raise ValueError(
                f"latents: expected values in [0, {self.config.num_latents}), got {int(latents.min())} to "
                f"{int(latents.max())}; SAE and dictionary of different sizes?"
            )
        kind = self.config.activation
        if kind == "topk_sigmoid":
            # sigmoid never exceeds 1, so from there on no pre-activation passes.
            return torch.logit(thresholds.double().clamp(max=1.0)).float()
        if kind == "jumprelu":
            return torch.maximum(
                thresholds, self.theta.detach().float()[latents.to(self.theta.device)].to(thresholds)
            )
        if kind == "batch_topk":
            return thresholds.clamp(min=self._threshold())
        return thresholds

    def with_site(self, site: str | None) -> SparseAutoencoder:
        """This SAE, with the same parameters, as one of another site, "HOOKPOINT:kind"; None: of one that is not known,
        so that it may be used at any block of its width.

        Raises:
            ValueError, TypeError: no such name, or one of the other kind than `config.update` says.
        """
        moved = copy.copy(self)
        moved.config = replace(self.config, site=site)
        return moved

    def save_pretrained(
        self, directory: str | os.PathLike[str], encoder_only: bool = False, dtype: torch.dtype | None = None
    ) -> None:
        """Writes `cfg.json` and `sae.safetensors`; see `lbdt.sae.sae_checkpoint.save`."""
        sae_checkpoint.save(self.config, self.state_dict(), directory, encoder_only, dtype)

    @classmethod
    def from_pretrained(
        cls, path_or_repo: str | os.PathLike[str], hookpoint: str | None = None, format: str = "auto"
    ) -> SparseAutoencoder:
        """The SAE in a folder or a Hugging Face repository, in float32, without gradients.

        `hookpoint` names the subfolder where there are several; `format` is "auto", or the name of a project's file
        layout (METHOD.md, 7) to insist on.

        Raises:
            ValueError: anything absent, unreadable, of another shape, NaN or infinite; the text names the file.
        """
        return read_sae(path_or_repo, hookpoint, format).sae

    def _encode_rows(self, h: Tensor, width: int | None = None) -> SparseCode:
        kind = self.config.activation
        if kind in RANKED_ACTIVATIONS:
            values, indices = h.topk(self.config.k, dim=-1)
            return SparseCode(values.relu() if kind == "topk" else values.sigmoid(), indices)
        if kind == "relu":
            z = h.relu()
        else:
            floor = self.theta.float() if kind == "jumprelu" else self._threshold()
            # A negative jump threshold would let negative values through; detection needs z > 0.
            z = torch.where(h > floor, h, 0.0).relu()
        if width is None:
            width = max(1, int((z > 0).sum(-1).amax())) if z.shape[0] else 1
        return SparseCode(*z.topk(width, dim=-1))

    def _threshold(self) -> float:
        if self.config.threshold is None:
            raise ValueError(
                "activation 'batch_topk' has no threshold yet: train it (lbdt.training.train stores one) "
                "or give SAEConfig(threshold=...)"
            )
        return float(self.config.threshold)

    def _checked(self, x: Tensor) -> Tensor:
        if not torch.is_floating_point(x):
            raise TypeError(f"x: expected a floating-point tensor, got {x.dtype}")
        if x.dim() == 0 or x.shape[-1] != self.config.d_in:
            raise ValueError(
                f"x: expected [..., {self.config.d_in}] (the SAE's d_in in the last dimension), got "
                f"{tuple(x.shape)}; for [B, d, H, W] pass x.flatten(2).transpose(1, 2)"
            )
        return x


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`weight x + bias` of [..., d], with a float32 bias -> float32."""
    if weight.dtype == torch.float32:
        return F.linear(x.float(), weight, bias)
    return F.linear(x.to(weight.dtype), weight).float() + bias


@dataclass(frozen=True)
class Checkpoint:
    """An SAE as it was read, and what its files do not say."""

    sae: SparseAutoencoder
    format: str
    """The one of `lbdt.formats.FORMATS` that it was read as; never "auto"."""
    folder: Path
    assumptions: tuple[str, ...]
    """What was taken for granted, one sentence each."""


def read_sae(
    path_or_repo: str | os.PathLike[str],
    hookpoint: str | None = None,
    format: str = "auto",
    update: bool | None = None,
) -> Checkpoint:
    """The SAE in a folder or a Hugging Face repository, which `lbdt.sae.sae_checkpoint.read` reads.

    The weights come back in float32, whatever the file's dtype, without gradients; cast with `.half()` where the
    pipeline is in half precision.
    """
    config, tensors, *about = sae_checkpoint.read(path_or_repo, hookpoint, format, update)
    with torch.device("meta"):
        sae = SparseAutoencoder(config)
    sae.load_state_dict(tensors, assign=True)
    return Checkpoint(sae.float().requires_grad_(False).eval(), *about)
