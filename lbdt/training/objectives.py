"""What a step minimises: reconstruction, AuxK, sparsity, and where labels are given a supervised term.

An objective adds its gradient to the parameters' `.grad` and returns what it measured. With several processes each
works on its own rows, normalised by the whole batch, so that sums over the processes are those of one process.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from lbdt.runs.processes import Processes
from lbdt.sae import SAEConfig, SparseAutoencoder
from lbdt.training.contrast import Contrast
from lbdt.training.sparse import (
    Code,
    EncoderInput,
    add_gradient,
    add_pre_gradient,
    encoded,
    encodes,
    project,
    ranked_code,
    relu_code,
    sigmoid_code,
)
from lbdt.training.supervision import BatchLabels, Supervision

RECONSTRUCTIONS = ("fvu", "mse", "scaled-mse", "relative")
PRECISIONS = ("float32", "bfloat16")
_CHUNK_ELEMENTS = 1 << 24
_RELATIVE_EPS = 1e-2
_SPARSE_BELOW = 16


class Scales(NamedTuple):
    """Sizes of the data, from the first batch; floats so that a step never reads a device for them."""

    variance: float = 1.0
    """Mean squared deviation of an element from its column's mean."""
    activation: float = 1.0
    """Mean positive pre-activation among a row's k largest, before the first step."""
    decoder: float = 1.0
    """Mean norm of a decoder row, before the first step."""


class BatchRows(NamedTuple):
    """This process's rows of a batch, and what all processes know of the whole."""

    x: Tensor
    """[n, d], in the weights' dtype."""
    variance: Tensor
    """Summed squared deviation from the mean row, over the whole batch; scalar."""
    count: int
    """BatchRows of the whole batch."""
    labelled: BatchLabels | None = None


@dataclass
class Context:
    """What a step needs beside parameters and rows."""

    dead: Tensor | None = None
    """[L] bool."""
    dead_count: int = 0
    guess: float = 0.0
    """A guess of the smallest activation that BatchTopK keeps; see `ranked_code`."""
    precision: str = "float32"
    scales: Scales = field(default_factory=Scales)
    world: Processes = field(default_factory=Processes)


class ObjectiveOutcome(NamedTuple):
    """What a step measured, to be summed over the processes."""

    terms: dict[str, Tensor]
    """Scalars: `fvu`, `auxk`, `l0` (active latents a row) and the objective's own."""
    fired: Tensor
    """Latents that were active, int64, repetitions allowed."""
    smallest: Tensor | None = None
    """Smallest activation kept, scalar, 0 where none was; of `Ranked`."""


class Objective(Protocol):
    """Frozen dataclasses, so their fields identify a run."""

    def check(self, config: SAEConfig) -> None:
        """ValueError where an SAE of this configuration cannot be trained so."""

    def accumulate(self, sae: SparseAutoencoder, rows: BatchRows, context: Context) -> ObjectiveOutcome:
        """Adds the gradient of the loss to the parameters' `.grad`."""


@dataclass(frozen=True)
class Ranked:
    """topk, batch_topk and topk_sigmoid: `reconstruction + auxk_alpha * AuxK + supervision`.

    Reconstruction, of the error e = x_hat - x:
        fvu: sum e^2 / squared deviation of the batch (SAeUron; METHOD.md, 6.2).
        mse: mean e^2 (SAEmnesia v1.6).
        scaled-mse: mean e^2 / variance of the first batch, as sdxl-unbox's trainer scales it.
        relative: mean e^2 / (x^2 + 0.01 variance of the first batch), G-SAE's (its epsilon is not known).

    AuxK (arXiv 2406.04093, appendix A.2): the most active dead latents predict the residual x - x_hat, a constant;
    squared error over the batch's squared deviation, times min(dead / auxk, 1). With scaled-mse it is over the
    residual's own squared deviation, without that factor, as sdxl-unbox normalises it.
    """

    reconstruction: str = "fvu"
    auxk_alpha: float = 1 / 32
    auxk: int | None = None
    """Latents that AuxK uses; None: d / 2."""
    supervision: Supervision | Contrast | None = None

    def check(self, config: SAEConfig) -> None:
        if self.reconstruction not in RECONSTRUCTIONS:
            raise ValueError(
                f"reconstruction: expected one of {', '.join(RECONSTRUCTIONS)}; got {self.reconstruction!r}"
            )
        if config.activation not in ("topk", "batch_topk", "topk_sigmoid"):
            raise ValueError(
                f"activation {config.activation!r}: this objective trains topk, batch_topk or topk_sigmoid; "
                f"train relu and jumprelu with lbdt.training.objectives.Dense"
            )
        if config.activation == "topk_sigmoid" and (config.normalize_decoder or config.batch_topk):
            raise ValueError(
                "activation 'topk_sigmoid': expected normalize_decoder false (its activations lie below 1, so the "
                "decoder's rows carry the data's scale) and batch_topk false"
            )

    def accumulate(self, sae: SparseAutoencoder, rows: BatchRows, context: Context) -> ObjectiveOutcome:
        config, x = sae.config, rows.x
        read = EncoderInput(sae, x)
        batch_topk = config.batch_topk or config.activation == "batch_topk"
        per_row = config.activation == "topk" and not batch_topk
        h = None
        with torch.no_grad():
            if per_row and self.supervision is None and encodes(read.values, context.precision):
                code = relu_code(*encoded(sae, read.values, config.k))
            else:
                h = project(sae, read.values, context.precision)
        if config.activation == "topk_sigmoid":
            code = sigmoid_code(*h.topk(config.k, dim=1, sorted=False))
        elif h is not None:
            code = ranked_code(h, config.k, batch_topk=batch_topk, guess=context.guess)
        decoded = code.decode(sae.W_dec.detach())
        error = decoded.detach() - read.centred
        gradient, loss = _reconstruction(self.reconstruction, error, rows, context.scales)
        supervision = self.supervision
        penalty = 0.0 if supervision is None else supervision.kept_penalty(rows.count)
        code.backward(sae, read, decoded, gradient, penalty)
        add_gradient(sae.b_dec, gradient.sum(0))
        fvu = error.square().sum() / rows.variance
        terms = {
            "fvu": fvu,
            "auxk": torch.zeros_like(fvu),
            "l0": fvu.new_tensor(code.cols.numel() / rows.count),
        }
        if self.reconstruction != "fvu":
            terms["loss"] = loss
        if context.dead_count and self.auxk_alpha > 0:
            terms["auxk"] = self._auxk(sae, read, h, error, rows, context)
        if supervision is not None:
            terms |= supervision.accumulate(
                sae, read, h, code, rows.labelled, rows.count, context.scales.activation, context.world
            )
        read.backward()
        smallest = code.values.detach().min() if code.cols.numel() else x.new_zeros(())
        return ObjectiveOutcome(terms, code.cols, smallest)

    def _auxk(
        self, sae, read: EncoderInput, h: Tensor | None, error: Tensor, rows: BatchRows, context: Context
    ) -> Tensor:
        own = self.reconstruction == "scaled-mse"
        if own:
            moments = torch.stack([error.double().sum(0), error.double().square().sum(0)])
            first, second = context.world.sum_(moments)
            over = (second - first.square() / rows.count).sum().to(error.dtype)
        else:
            over = rows.variance
        return auxk(sae, read, h, error, over, self.auxk_alpha, self.auxk, context, scaled=not own)


def auxk(
    sae: SparseAutoencoder,
    read: EncoderInput,
    h: Tensor | None,  # [n, L] pre-activations; None: those of the dead latents are computed
    error: Tensor,  # [n, d], x_hat - x
    over: Tensor,  # scalar, what the squared error is divided by
    alpha: float,
    wanted: int | None,
    context: Context,
    scaled: bool = True,
) -> Tensor:
    """Adds the gradient of `alpha` times the AuxK loss (see `Ranked`); returns the loss, a scalar."""
    wanted = max(1, error.shape[1] // 2) if wanted is None else wanted
    scale = min(context.dead_count / wanted, 1.0) if scaled else 1.0
    latents = context.dead.nonzero().squeeze(1)
    take = min(wanted, latents.numel())
    sigmoid = sae.config.activation == "topk_sigmoid"
    if sigmoid:
        take = min(take, sae.config.k)
    if h is None:
        values, cols = encoded(sae, read.values, take, latents)
    else:
        values, cols = h[:, latents].topk(take, dim=1, sorted=False)
    weight = 2 * alpha * scale / over
    if take * _SPARSE_BELOW >= latents.numel():
        miss = _dense_auxk(sae, read, values, cols, error, latents, weight, sigmoid)
    else:
        part = (sigmoid_code if sigmoid else relu_code)(values, cols)
        code = Code(part.rows, latents[part.cols], part.values, part.n, part.slope)
        predicted = code.decode(sae.W_dec.detach())
        miss = predicted.detach() + error
        code.backward(sae, read, predicted, miss * weight)
    return scale * miss.square().sum() / over


@torch.no_grad()
def _dense_auxk(
    sae: SparseAutoencoder,
    read: EncoderInput,
    values: Tensor,  # [n, take] pre-activations of the dead latents that are taken
    cols: Tensor,  # [n, take], places in `latents`
    error: Tensor,  # [n, d]
    latents: Tensor,  # [D]
    weight: Tensor,  # scalar
    sigmoid: bool,
) -> Tensor:
    """The same by dense products over the dead latents, quicker where many of them are taken; the miss, [n, d]."""
    values = values.sigmoid() if sigmoid else values.relu()
    z = values.new_zeros(len(values), latents.numel()).scatter_(1, cols, values)
    decoder = sae.W_dec[latents]
    miss = (z @ decoder).add_(error)
    gradient = miss * weight
    sae.W_dec.grad.index_add_(0, latents, z.T @ gradient)
    add_pre_gradient(sae, read, latents, (gradient @ decoder.T).mul_(z * (1 - z) if sigmoid else z > 0))
    return miss


def _reconstruction(kind: str, error: Tensor, rows: BatchRows, scales: Scales) -> tuple[Tensor, Tensor]:
    """Gradient with respect to x_hat [n, d], and the loss."""
    elements = rows.count * error.shape[1]
    if kind == "fvu":
        weight = 1 / rows.variance
    elif kind == "mse":
        weight = 1 / elements
    elif kind == "scaled-mse":
        weight = 1 / (elements * scales.variance)
    else:
        weight = 1 / (elements * (rows.x.square() + _RELATIVE_EPS * scales.variance))
    gradient = error * (2 * weight)
    return gradient, (gradient * error).sum() / 2


@dataclass(frozen=True)
class Dense:
    """relu and jumprelu: `FVU + sparsity * penalty + auxk_alpha * AuxK`, by autograd in chunks of rows.

    The penalty of relu is the L1 norm of a row's activations, each times its decoder row's norm, over the root mean
    squared deviation of a row, so that it does not depend on the data's scale. That of jumprelu is L0 through a
    straight-through rectangle kernel of the given bandwidth (the pseudo-derivatives of arXiv 2407.14435; thresholds
    start at the bandwidth and stay >= 0), in units of the first batch's mean activation; no warm-up of `sparsity`.
    """

    sparsity: float = 5e-3
    bandwidth: float = 0.2
    auxk_alpha: float = 1 / 32
    auxk: int | None = None

    def check(self, config: SAEConfig) -> None:
        if config.activation not in ("relu", "jumprelu"):
            raise ValueError(f"activation {config.activation!r}: this objective trains relu or jumprelu")
        if not self.sparsity >= 0 or not self.bandwidth > 0:
            raise ValueError(
                f"expected sparsity >= 0 and bandwidth > 0; got {self.sparsity}, {self.bandwidth}"
            )

    def accumulate(self, sae: SparseAutoencoder, rows: BatchRows, context: Context) -> ObjectiveOutcome:
        chunk = max(1, _CHUNK_ELEMENTS // 4 // sae.config.num_latents)
        fired = torch.zeros(sae.config.num_latents, dtype=torch.bool, device=rows.x.device)
        sums = [rows.x.new_zeros(()) for _ in range(4)]
        for x in rows.x.split(chunk):
            parts = self._chunk(sae, x, rows, context, fired)
            sums = [total + part for total, part in zip(sums, parts, strict=True)]
        return ObjectiveOutcome(
            dict(zip(("fvu", "auxk", "l0", "sparsity"), sums, strict=True)), fired.nonzero().squeeze(1)
        )

    def _chunk(self, sae, x: Tensor, rows: BatchRows, context: Context, fired: Tensor) -> tuple[Tensor, ...]:
        read = x - sae.b_dec
        if sae.pre_encoder is not None:
            read = sae.pre_encoder(read)
        if context.precision == "bfloat16":
            h = F.linear(read.bfloat16(), sae.encoder.weight.bfloat16()).to(x.dtype) + sae.encoder.bias
        else:
            h = F.linear(read, sae.encoder.weight, sae.encoder.bias)
        if sae.config.activation == "relu":
            z = h.relu()
            norms = z @ sae.W_dec.norm(dim=1)
            penalty = norms.sum() / (rows.count * (rows.variance / rows.count).sqrt())
        else:
            width = self.bandwidth * context.scales.activation
            z = _Jump.apply(h, sae.theta, width)
            penalty = _Step.apply(h, sae.theta, width).sum() / rows.count
        error = z @ sae.W_dec + sae.b_dec - x
        fvu = error.square().sum() / rows.variance
        # The dead latents' graph must not hold on to this one.
        (fvu + self.sparsity * penalty).backward()
        with torch.no_grad():
            active = z > 0
            fired |= active.any(0)
            l0 = active.sum() / rows.count
        aux = torch.zeros_like(fvu)
        if context.dead_count and self.auxk_alpha > 0:
            again = EncoderInput(sae, x)
            aux = auxk(
                sae,
                again,
                h.detach(),
                error.detach(),
                rows.variance,
                self.auxk_alpha,
                self.auxk,
                context,
            )
            again.backward()
        return fvu.detach(), aux, l0, penalty.detach()


class _Jump(torch.autograd.Function):
    """`h` where it exceeds `theta` (and 0), else 0; d/dtheta = -(theta / width) [|h - theta| < width / 2]."""

    @staticmethod
    def forward(ctx, h: Tensor, theta: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(h, theta)
        ctx.width = width
        return torch.where((h > theta) & (h > 0), h, 0.0)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        h, theta = ctx.saved_tensors
        near = (h - theta).abs() < ctx.width / 2
        slope = -(theta / ctx.width) * (gradient * near).sum(0)
        return gradient * ((h > theta) & (h > 0)), slope, None


class _Step(torch.autograd.Function):
    """1 where `h` exceeds `theta` (and 0), else 0; d/dtheta = -(1 / width) [|h - theta| < width / 2]."""

    @staticmethod
    def forward(ctx, h: Tensor, theta: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(h, theta)
        ctx.width = width
        return ((h > theta) & (h > 0)).to(h.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[None, Tensor, None]:
        h, theta = ctx.saved_tensors
        near = (h - theta).abs() < ctx.width / 2
        return None, -(gradient * near).sum(0) / ctx.width, None


def default_objective(config: SAEConfig, auxk_alpha: float = 1 / 32) -> Objective:
    """The unsupervised objective of an activation."""
    if config.activation in ("relu", "jumprelu"):
        return Dense(auxk_alpha=auxk_alpha)
    return Ranked(auxk_alpha=auxk_alpha)
