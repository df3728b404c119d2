"""Ranked codes with written-out gradients.

An activation is nonzero for k of L latents, so every product but the encoder's has n * k * d terms and not n * L * d.
On a CPU core a step at n 4096, d 256, L 4096, k 32 takes as long as the encoder's product and its top-k.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lbdt import ops
from lbdt.sae import SparseAutoencoder


class EncoderInput:
    """What the encoder reads of a batch's rows, and the gradient of the losses with respect to it.

    That is `x - b_dec`, or what a pre-encoder makes of it; then the gradients of all losses are added up first, and
    pass through it at once.
    """

    def __init__(self, sae: SparseAutoencoder, x: Tensor) -> None:  # x [n, d]
        with torch.set_grad_enabled(sae.pre_encoder is not None):
            centred = x - sae.b_dec
            self._made = None if sae.pre_encoder is None else sae.pre_encoder(centred)
        self.centred = centred.detach()
        """[n, d], `x - b_dec`."""
        self.values = self.centred if self._made is None else self._made.detach()
        """[n, d], what the encoder's rows are multiplied with."""
        self._gradient: Tensor | None = None

    @property
    def mapped(self) -> bool:
        """Whether there is a pre-encoder."""
        return self._made is not None

    def add(self, gradient: Tensor) -> None:
        """Adds a loss's gradient with respect to `values`, [n, d], of an SAE with a pre-encoder; keeps it."""
        self._gradient = gradient if self._gradient is None else self._gradient.add_(gradient)

    def backward(self) -> None:
        """Adds what was added to the gradients of the pre-encoder and of `b_dec` before it; call it last."""
        if self._made is not None:
            self._made.backward(torch.zeros_like(self._made) if self._gradient is None else self._gradient)


class Code:
    """Active entries of a batch in row order: `rows`, `cols` int64 and `values`, [E], and row offsets [n].

    `slope` [E] is the derivative of an entry's activation with respect to its pre-activation; None: 1.
    """

    def __init__(
        self, rows: Tensor, cols: Tensor, values: Tensor, n: int, slope: Tensor | None = None
    ) -> None:
        self.rows, self.cols, self.n, self.slope = rows, cols, n, slope
        self.values = values.detach().requires_grad_(True)
        self.offsets = _offsets(rows, n)

    def decode(self, weight: Tensor) -> Tensor:
        """`z weight`, [n, d] of `weight` [L, d]; differentiable in `values`."""
        return F.embedding_bag(self.cols, weight, self.offsets, per_sample_weights=self.values, mode="sum")

    def backward(
        self,
        sae: SparseAutoencoder,
        read: EncoderInput,
        decoded: Tensor,  # [n, d], of `decode`
        gradient: Tensor,  # [n, d], of the loss with respect to `decoded`
        penalty: float = 0.0,  # added to the gradient of every entry
    ) -> None:
        """Adds to the parameters' gradients, that of `b_dec` through the encoder only."""
        (dz,) = torch.autograd.grad(decoded, self.values, gradient)
        if penalty:
            dz = dz + penalty
        dh = dz if self.slope is None else dz * self.slope
        order = self.cols.int().argsort(stable=True)
        rows, offsets = self.rows[order], _offsets(self.cols, sae.config.num_latents)

        def transposed_product(table: Tensor, weights: Tensor) -> Tensor:
            return F.embedding_bag(rows, table, offsets, per_sample_weights=weights[order], mode="sum")

        with torch.no_grad():
            add_gradient(sae.W_dec, transposed_product(gradient, self.values.detach()))
            add_gradient(sae.encoder.weight, transposed_product(read.values, dh))
            summed = torch.zeros_like(sae.encoder.bias).index_add_(0, self.cols, dh)
            add_gradient(sae.encoder.bias, summed)
            weight = sae.encoder.weight
            if read.mapped:
                read.add(F.embedding_bag(self.cols, weight, self.offsets, per_sample_weights=dh, mode="sum"))
            else:
                add_gradient(sae.b_dec, -(summed @ weight))


def add_gradient(parameter: Tensor, value: Tensor) -> None:
    """`parameter.grad += value`, without a pass over zeros where there is none yet; keeps `value`."""
    if parameter.grad is None:
        parameter.grad = value
    else:
        parameter.grad += value


def add_pre_gradient(
    sae: SparseAutoencoder,
    read: EncoderInput,
    latents: Tensor,  # [A] int64, distinct
    dh: Tensor,  # [n, A]
) -> None:
    """Adds the gradient of a loss on the pre-activations of some latents."""
    with torch.no_grad():
        summed = dh.sum(0)
        for parameter in (sae.encoder.weight, sae.encoder.bias, sae.b_dec):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        sae.encoder.weight.grad.index_add_(0, latents, dh.T @ read.values)
        sae.encoder.bias.grad.index_add_(0, latents, summed)
        if read.mapped:
            read.add(dh @ sae.encoder.weight[latents])
        else:
            sae.b_dec.grad -= summed @ sae.encoder.weight[latents]


def add_dense_gradient(sae: SparseAutoencoder, read: EncoderInput, dh: Tensor) -> None:  # dh [n, L]
    """Adds the gradient of a loss on the pre-activations of all latents."""
    with torch.no_grad():
        summed = dh.sum(0)
        add_gradient(sae.encoder.weight, dh.T @ read.values)
        add_gradient(sae.encoder.bias, summed)
        if read.mapped:
            read.add(dh @ sae.encoder.weight)
        else:
            add_gradient(sae.b_dec, -(summed @ sae.encoder.weight))


def project(sae: SparseAutoencoder, read: Tensor, precision: str) -> Tensor:
    """Pre-activations [n, L] of what the encoder reads [n, d]; the product in bfloat16 where `precision` says so."""
    weight, bias = sae.encoder.weight.detach(), sae.encoder.bias.detach()
    if precision == "bfloat16":
        return F.linear(read.bfloat16(), weight.bfloat16()).to(bias.dtype).add_(bias)
    return F.linear(read, weight, bias)


def encodes(read: Tensor, precision: str) -> bool:
    """Whether `encoded` is the quicker way: the op's product and top-k in one pass are for a CPU's float32."""
    return read.device.type == "cpu" and read.dtype == torch.float32 and precision == "float32"


def encoded(
    sae: SparseAutoencoder, read: Tensor, k: int, latents: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The k largest pre-activations of a row, 0 in place of negative ones, and their places in `latents` (None: all):
    [n, k] each, without holding [n, L]."""
    weight, bias = sae.encoder.weight.detach(), sae.encoder.bias.detach()
    if latents is not None:
        weight, bias = weight[latents], bias[latents]
    values, cols = ops.encode_topk(read.T.unsqueeze(0), weight, bias, k)
    return values[0], cols[0]


def ranked_code(h: Tensor, k: int, *, batch_topk: bool = False, guess: float = 0.0) -> Code:
    """The kept positive entries of pre-activations `h` [n, L]: k a row, or the n * k largest of the batch.

    `guess` > 0, a little below the expected smallest kept value, spares sorting the whole of `h`.
    """
    n, width = h.shape
    if batch_topk:
        flat = h.reshape(-1)
        entries = None
        if guess > 0:
            entries = (flat > guess).nonzero().squeeze(1)
            if entries.numel() < n * k:
                entries = None
        candidates = flat if entries is None else flat[entries]
        values, kept = candidates.topk(n * k, sorted=False)
        positions = kept if entries is None else entries[kept]
        positions, order = positions.sort()
        values = values[order]
        rows, cols = positions // width, positions % width
        return _positive(rows, cols, values, n)
    return relu_code(*h.topk(k, dim=1, sorted=False))


def relu_code(values: Tensor, cols: Tensor) -> Code:
    """The positive ones of some entries of each row, [n, k]."""
    return _positive(*_flat(values, cols), len(values))


def sigmoid_code(values: Tensor, cols: Tensor) -> Code:
    """`sigmoid(TopK(h))` of the k largest of each row, [n, k]: all of them, whatever their sign (METHOD.md, 6.4)."""
    rows, cols, flat = _flat(values, cols)
    z = flat.sigmoid()
    return Code(rows, cols, z, len(values), z * (1 - z))


def _flat(values: Tensor, cols: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows = torch.arange(len(cols), device=cols.device).repeat_interleave(cols.shape[1])
    return rows, cols.reshape(-1), values.reshape(-1)


def _positive(rows: Tensor, cols: Tensor, values: Tensor, n: int) -> Code:
    positive = values > 0
    return Code(rows[positive], cols[positive], values[positive], n)


def _offsets(keys: Tensor, size: int) -> Tensor:
    counts = torch.bincount(keys, minlength=size)
    return counts.cumsum(0) - counts
