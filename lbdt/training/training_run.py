"""The state of a training run, and one step of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lbdt.runs.processes import Processes
from lbdt.sae import SAEConfig, SparseAutoencoder
from lbdt.training.assignment import Assignment
from lbdt.training.explained_variance import geometric_median
from lbdt.training.objectives import BatchRows, Context, Objective, Scales
from lbdt.training.supervision import SIGMOID_SPAN, BatchLabels
from lbdt.training.training_checkpoint import load_state

CLIP_NORM = 1.0
_THRESHOLD_DECAY = 0.99
_SCALE_ROWS = 4096


class BatchSource(Protocol):
    """`lbdt.activations.batches.Batches` or `Stream`: batches that depend on the step only."""

    patches: int

    def rows(self, step: int, size: int) -> Tensor:
        """[size, d]."""

    def samples(self, step: int, count: int, pairs: str | None = None) -> Any:
        """`Samples`: x [count, M, d], concepts and styles [count], places in the source's names, -1: none; `pairs`: in
        twos of one label."""


@dataclass(frozen=True)
class Labels:
    """What a supervised run is taught: the source's names in its order, and their latents; None: it has labels
    compared, and no latent stands for one."""

    concepts: tuple[str, ...]
    styles: tuple[str, ...]
    assignment: Assignment | None

    def __post_init__(self) -> None:
        if self.assignment is None:
            return
        for kind in ("concepts", "styles"):
            names, given = set(getattr(self, kind)), set(getattr(self.assignment, kind))
            wrong = sorted(names ^ given)
            if wrong:
                raise ValueError(
                    f"labels: expected a latent for each of the activations' {kind} and for no other; "
                    f"{', '.join(wrong)} {'is' if len(wrong) == 1 else 'are'} on one side only"
                )


class TrainingRun:
    """What changes from step to step."""

    def __init__(
        self,
        config: SAEConfig,
        objective: Objective,
        precision: str,
        world: Processes,
        labels: Labels | None,
    ) -> None:
        self.config, self.objective, self.precision, self.world = config, objective, precision, world
        self.labels = labels
        self.batch_topk = config.batch_topk or config.activation == "batch_topk"

    def prepare(
        self,
        sae: SparseAutoencoder,
        batch: tuple[Tensor, BatchLabels | None],
        adam_eps: float,
        fine_tuned: bool,
        saved: dict[str, Tensor] | None,
    ) -> None:
        """Starting values, from the first batch or from a checkpoint."""
        x = batch[0]
        self.sae = sae.to(x.device)
        fused = x.device.type in ("cpu", "cuda")
        self.optimizer = torch.optim.Adam(self._groups(), eps=adam_eps, fused=fused)
        self.idle = torch.zeros(self.config.num_latents, dtype=torch.int64, device=x.device)
        self.threshold = torch.tensor(torch.nan, device=x.device)
        """Running mean of the smallest activation that BatchTopK kept; NaN before the first step."""
        if saved is None:
            self.scales = self._initialise(x, fine_tuned)
            self.world.same_(parameter.data for parameter in self.sae.parameters())
            return
        load_state(self.sae, self.optimizer, saved)
        self.idle.copy_(saved["idle"])
        if float(saved["threshold"]) >= 0:
            self.threshold.copy_(saved["threshold"])
        self.scales = Scales(*saved["scales"].tolist())

    def _groups(self) -> list[dict[str, Any]]:
        sae = self.sae
        if self.config.activation != "topk_sigmoid":
            return [{"params": list(sae.parameters())}]
        return [
            {"params": [sae.W_dec]},
            {"params": [sae.encoder.weight, sae.encoder.bias]},
            {"params": [sae.b_dec, *(() if sae.pre_encoder is None else sae.pre_encoder.parameters())]},
        ]

    def _rates(self) -> list[float]:
        """What each group's learning rate is multiplied by. A step of Adam is as long as the rate, whatever the
        gradient: where the data's scale sits in the decoder, steps of unit rows would be far too short."""
        if self.config.activation != "topk_sigmoid":
            return [1.0]
        return [self.scales.decoder, 2 * SIGMOID_SPAN / self.scales.decoder, 1.0]

    @torch.no_grad()
    def _initialise(self, x: Tensor, fine_tuned: bool) -> Scales:
        sae = self.sae
        if not fine_tuned:
            sae.b_dec.copy_(geometric_median(x))
        h = sae.pre_activations(x[:_SCALE_ROWS])
        top = h.topk(min(self.config.k or 32, h.shape[1]), dim=1).values
        active = float(top.clamp(min=0).sum() / (top > 0).sum().clamp(min=1)) or 1.0
        variance = float((x - x.mean(0)).square().mean()) or 1.0
        if self.config.activation == "topk_sigmoid" and not fine_tuned:
            # sigmoid(4 a / active - 4) * 2 active passes near (0, 0), (active, active) and twice that: so the first
            # reconstructions are those of a TopK SAE.
            sae.encoder.weight *= SIGMOID_SPAN / active
            sae.encoder.bias.fill_(-SIGMOID_SPAN)
            sae.W_dec *= 2 * active
        if self.config.activation == "jumprelu" and not fine_tuned:
            sae.theta.fill_(self.objective.bandwidth * active)
        return Scales(variance, active, float(sae.W_dec.norm(dim=1).mean()))

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors of `state`."""
        return {"step": (), "idle": (self.config.num_latents,), "threshold": (), "scales": (3,)}

    def state(self, step: int) -> dict[str, Tensor]:
        """What a checkpoint holds beside parameters and moments."""
        threshold = self.threshold if self.threshold >= 0 else torch.tensor(-1.0)
        scales = torch.tensor(self.scales, dtype=torch.float64)
        return {"step": torch.tensor(step), "idle": self.idle, "threshold": threshold, "scales": scales}

    def fetch(
        self,
        batches: Callable[[int], Tensor] | BatchSource,
        step: int,
        rows: int,
        device: torch.device | str | None,
    ) -> tuple[Tensor, BatchLabels | None]:
        """The whole batch, [n, d] float32 and finite."""
        labelled = None
        if self.labels is not None:
            pairs = getattr(self.objective.supervision, "pairs", None)
            images = max(2, rows // batches.patches)
            samples = batches.samples(step, images, **({} if pairs is None else {"pairs": pairs}))
            x = samples.x.flatten(0, 1)
            labelled = self._labelled(samples, device or x.device)
        else:
            x = batches(step) if callable(batches) else batches.rows(step, rows)
        if x.dim() != 2 or x.shape[1] != self.config.d_in or x.shape[0] < 2:
            raise ValueError(
                f"batches({step}): expected [n >= 2, {self.config.d_in}] (d_in of the config), got "
                f"{tuple(x.shape)}"
            )
        x = x.detach().to(device or x.device).float()
        if not bool(torch.isfinite(x).all()):
            raise ValueError(
                f"batches({step}): expected finite values, got NaN or infinity; clean the activations"
            )
        return x, labelled

    def _labelled(self, samples: Any, device: torch.device | str) -> BatchLabels:
        labels, assignment = self.labels, self.labels.assignment
        given = {"concepts": samples.concepts.to(device), "styles_of": samples.styles.to(device)}
        if assignment is None:
            images, none = samples.x.shape[:2], torch.zeros(0, dtype=torch.int64, device=device)
            return BatchLabels(none, 0, torch.zeros(images[0], 0, device=device), images[1], **given)
        styles = len(assignment.styles)
        latents = torch.tensor(assignment.latents, device=device)
        present = torch.zeros(samples.x.shape[0], len(assignment.latents), device=device)
        groups = (
            (samples.concepts, labels.concepts, assignment.concepts, 0),
            (samples.styles, labels.styles, assignment.styles, len(assignment.concepts)),
        )
        for places, names, wanted, offset in groups:
            if not wanted:
                continue
            order = list(wanted)
            place = torch.tensor([offset + order.index(name) for name in names])
            image = (places >= 0).nonzero().squeeze(1).cpu()
            present[image.to(device), place[places.cpu()[image]].to(device)] = 1
        return BatchLabels(latents, styles, present, samples.x.shape[1], **given)

    def step(self, batch: tuple[Tensor, BatchLabels | None], lr: float, dead_after: int) -> dict[str, float]:
        """One step of Adam; the metrics of the whole batch."""
        x, labelled = batch
        sae, world = self.sae, self.world
        self.optimizer.zero_grad(set_to_none=True)
        dead = self.idle > dead_after
        dead_count = int(dead.sum())
        expected = float(self.threshold) if self.batch_topk else 0.0
        context = Context(
            dead=dead,
            dead_count=dead_count,
            guess=0.8 * expected if expected > 0 else 0.0,
            precision=self.precision,
            scales=self.scales,
            world=world,
        )
        variance = (x - x.mean(0)).square().sum()
        own = x
        if world.size > 1:
            unit = 1 if labelled is None else labelled.patches
            part = world.part(x.shape[0] // unit)
            own = x[part.start * unit : part.stop * unit]
        outcome = self.objective.accumulate(sae, BatchRows(own, variance, x.shape[0], labelled), context)
        for parameter in sae.parameters():
            world.sum_(parameter.grad)
        terms = world.sum_(torch.stack([term.double() for term in outcome.terms.values()])).tolist()
        values = {"lr": lr, **dict(zip(outcome.terms, terms, strict=True)), "dead": dead_count}
        wrong = [name for name, value in values.items() if not abs(value) < float("inf")]
        if wrong:
            raise ValueError(
                f"training: {', '.join(wrong)} became NaN or infinite; lower lr, or start again with other settings"
            )
        self._descend(lr)
        fired = torch.zeros_like(dead, dtype=torch.int32)
        fired[outcome.fired] = 1
        self.idle += x.shape[0]
        self.idle[world.sum_(fired) > 0] = 0
        smallest = world.sum_(outcome.smallest / world.size) if self.batch_topk else torch.zeros(())
        if smallest > 0:
            known = not torch.isnan(self.threshold)
            self.threshold.copy_(
                torch.lerp(smallest, self.threshold, _THRESHOLD_DECAY) if known else smallest
            )
        return values

    @torch.no_grad()
    def _descend(self, lr: float) -> None:
        torch.nn.utils.clip_grad_norm_(self.sae.parameters(), CLIP_NORM)
        decoder = self.sae.W_dec
        if self.config.normalize_decoder:
            along = torch.linalg.vecdot(decoder.grad, decoder).unsqueeze(1)
            decoder.grad.addcmul_(decoder, along, value=-1)
        for group, rate in zip(self.optimizer.param_groups, self._rates(), strict=True):
            group["lr"] = lr * rate
        self.optimizer.step()
        if self.config.normalize_decoder:
            decoder /= torch.linalg.vector_norm(decoder, dim=1, keepdim=True).clamp_(min=1e-12)
        if self.config.activation == "jumprelu":
            self.sae.theta.clamp_(min=0)
