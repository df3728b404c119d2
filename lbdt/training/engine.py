"""The training loop: batches, steps, checkpoints that resume bit for bit, metrics."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lbdt.runs.processes import Processes
from lbdt.sae import SAEConfig, SparseAutoencoder
from lbdt.training.objectives import PRECISIONS, Objective, default_objective
from lbdt.training.training_checkpoint import digest, read_checkpoint, write_checkpoint
from lbdt.training.training_metrics import MetricsFile, Writer
from lbdt.training.training_run import BatchSource, Labels, TrainingRun

ADAM_EPS = 6.25e-10
DEAD_ROWS = 10_000_000


def train(
    sae_config: SAEConfig,
    batches: Callable[[int], Tensor] | BatchSource,
    steps: int,
    *,
    objective: Objective | None = None,
    rows: int = 4096,
    start: SparseAutoencoder | None = None,
    labels: Labels | None = None,
    lr: float = 4e-4,
    adam_eps: float = ADAM_EPS,
    auxk_alpha: float = 1 / 32,
    precision: str = "float32",
    seed: int = 0,
    device: torch.device | str | None = None,
    world: Processes | None = None,
    progress: bool = True,
    log: Callable[[int, dict[str, float]], None] | None = None,
    metrics: str | os.PathLike[str] | None = None,
    writers: Sequence[Writer] = (),
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 100,
    dead_after: int | None = None,
    data: dict[str, Any] | None = None,
) -> SparseAutoencoder:
    """Trains an SAE and returns it, without gradients.

    A new SAE has tied weights with unit decoder rows and `b_dec` at the geometric median of the first batch. Then
    Adam, learning rate decaying linearly to 0, gradient norm clipped at 1, and where `normalize_decoder` the decoder's
    gradient kept orthogonal to its rows, which are renormalised (SAeUron's recipe, arXiv 2501.18052;
    METHOD.md, 6.1).

    Activation topk: per-patch TopK or, where `sae_config.batch_topk`, BatchTopK (inference stays per patch, as in
    SAeUron). Activation batch_topk trains with BatchTopK and stores the mean smallest kept activation as threshold.
    Activation topk_sigmoid: a new SAE's weights are scaled so that its first reconstructions are those of a TopK SAE;
    decoder rows carry the data's scale. relu, jumprelu: see `Dense`.

    Differences from the released trainer: the AuxK target is the residual `x - x_hat` (there it has the opposite sign
    and `b_dec` added), and an index kept with value 0 does not count as fired.

    Args:
        batches: `batches(step) -> x [n, d]`, or an object with `rows` and `samples`. Must depend on the step only for
            a resumed run to equal an uninterrupted one. Cast to float32.
        objective: None: the unsupervised one of the activation.
        rows: of a batch, where `batches` is an object; with a supervised objective rows // M whole images.
        start: fine-tune this SAE, which is left as it is; None: a new one from `seed`.
        labels: of a supervised objective.
        precision: "bfloat16" computes the encoder's product so; weights, optimiser and all else stay float32.
        device: None: the batches' own.
        world: the processes that share every batch (see `lbdt.runs.processes.joined`). Each makes the whole batch and
            takes its part; gradients, dead latents and metrics are those of the whole; only BatchTopK ranks within
            a process's own rows.
        log: called after each step with `lr`, `fvu`, `auxk`, `l0` (active latents a row), `dead` (latents) and the
            objective's own terms.
        metrics: a folder for `metrics.jsonl` and `speed.jsonl`.
        checkpoint: a safetensors file, replaced atomically every `checkpoint_every` steps and at the end.
            When it exists the run continues from it, bit for bit as if it had not stopped.
        dead_after: rows without firing after which a latent counts as dead; None: SAeUron's 10 million, or a
            tenth of the run where that is less.
        data: what else identifies the run; a checkpoint with other contents is refused.

    Raises:
        ValueError: settings that contradict each other, a batch of the wrong shape or with NaN, a loss that is not
            finite, a checkpoint of other settings.
    """
    world = world or Processes()
    objective = objective or default_objective(sae_config, auxk_alpha)
    _validate(sae_config, objective, steps, lr, checkpoint_every, precision, start, labels, batches)
    settings = run_settings(
        sae_config,
        objective,
        steps,
        rows=None if callable(batches) else rows,
        lr=lr,
        adam_eps=adam_eps,
        precision=precision,
        seed=seed,
        dead_after=dead_after,
        start=start,
        labels=labels,
        data=data,
    )
    run = TrainingRun(sae_config, objective, precision, world, labels)
    path = None if checkpoint is None else Path(checkpoint)
    saved = None
    if path is not None and path.exists():
        saved = read_checkpoint(path, settings, new_autoencoder(sae_config, seed, None), run.state_shapes())
    world.wait()
    first = 0 if saved is None else int(saved["step"])
    batch = run.fetch(batches, min(first, steps - 1), rows, device)
    run.prepare(new_autoencoder(sae_config, seed, start), batch, adam_eps, start is not None, saved)
    if dead_after is None:
        dead_after = min(DEAD_ROWS, steps * batch[0].shape[0] // 10)

    sinks: list[Any] = []
    file = bar = None
    try:
        if metrics is not None and world.main:
            file = MetricsFile(Path(metrics), first)
        for writer in writers if world.main else ():
            writer.begin(first)
            sinks.append(writer)
        if progress and world.main:
            from tqdm import tqdm

            bar = tqdm(total=steps, initial=first, desc="train SAE", unit="step", file=sys.stderr)
        began, since = time.perf_counter(), first
        for step in range(first, steps):
            if step > first:
                batch = run.fetch(batches, step, rows, device)
            values = run.step(batch, lr * (1 - step / steps), dead_after)
            if file is not None:
                file.log(step, values)
            for sink in sinks:
                sink.log(step, values)
            if log is not None:
                log(step, values)
            speed = (step + 1 - since) * batch[0].shape[0] / max(time.perf_counter() - began, 1e-9)
            if bar is not None:
                bar.set_postfix_str(
                    f"fvu {values['fvu']:.3f}, dead {values['dead']}, {speed:,.0f} rows/s", refresh=False
                )
                bar.update()
            if (step + 1) % checkpoint_every == 0 or step + 1 == steps:
                if file is not None:
                    file.keep(step + 1, speed)
                if path is not None and world.main:
                    write_checkpoint(path, settings, run.sae, run.optimizer, run.state(step + 1))
                began, since = time.perf_counter(), step + 1
    finally:
        for sink in (*sinks, *(each for each in (file, bar) if each is not None)):
            sink.close()
    world.wait()
    if sae_config.activation == "batch_topk":
        run.sae.config = replace(sae_config, threshold=float(run.threshold))
    return run.sae.requires_grad_(False).eval()


def run_settings(
    config: SAEConfig,
    objective: Objective,
    steps: int,
    *,
    rows: int | None,
    lr: float,
    adam_eps: float,
    precision: str,
    seed: int,
    dead_after: int | None,
    start: SparseAutoencoder | None,
    labels: Labels | None,
    data: dict[str, Any] | None,
) -> dict[str, Any]:
    """What the result of `train` follows from, JSON-like; a checkpoint belongs to one such dictionary."""
    return {
        # No site, which the result does not depend on; `data` names the activations'.
        "config": replace(config, site=None).to_json(),
        "objective": {"name": type(objective).__name__, **asdict(objective)},
        "steps": steps,
        "rows": rows,
        "lr": lr,
        "adam_eps": adam_eps,
        "precision": precision,
        "seed": seed,
        "dead_after": dead_after,
        "start": None if start is None else digest(start),
        "labels": None if labels is None else _labels_json(labels),
        "data": data,
    }


def _labels_json(labels: Labels) -> dict[str, Any]:
    if labels.assignment is None:
        return {"concepts": list(labels.concepts), "styles": list(labels.styles)}
    return labels.assignment.to_json()


def _validate(
    config: SAEConfig,
    objective: Objective,
    steps: int,
    lr: float,
    checkpoint_every: int,
    precision: str,
    start: SparseAutoencoder | None,
    labels: Labels | None,
    batches: Callable[[int], Tensor] | BatchSource,
) -> None:
    objective.check(config)
    for name in ("sample_topk", "multi_topk", "encoder_only"):
        if getattr(config, name):
            raise ValueError(f"{name}: true is not supported in training; set it to false")
    if steps < 1 or checkpoint_every < 1 or not 0 < lr < float("inf"):
        raise ValueError(
            f"expected steps >= 1, checkpoint_every >= 1 and lr > 0; got {steps}, {checkpoint_every}, {lr}"
        )
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}; got {precision!r}")
    if start is not None:
        sizes = [
            (each.d_in, each.num_latents, each.activation, each.pre_encoder)
            for each in (start.config, config)
        ]
        if sizes[0] != sizes[1] or start.W_dec is None:
            raise ValueError(
                f"start: expected an SAE with a decoder and (d_in, num_latents, activation, pre_encoder) {sizes[1]}, "
                f"got {sizes[0]}{'' if start.W_dec is not None else ' without a decoder'}"
            )
    supervised = getattr(objective, "supervision", None) is not None
    if supervised != (labels is not None):
        raise ValueError(
            "labels: a supervised objective needs them (concepts, styles and their latents), and no other takes "
            f"them; got {'none' if labels is None else 'labels'} with {type(objective).__name__}"
        )
    if labels is not None:
        if callable(batches):
            raise ValueError("batches: a supervised objective expects an object with samples(step, count)")
        compared = getattr(objective.supervision, "kinds", None)
        if (compared is None) != (labels.assignment is not None):
            raise ValueError(
                "labels: expected a latent for each name, but for a contrast, which assigns none; got "
                f"{'none' if labels.assignment is None else 'latents'} with "
                f"{type(objective.supervision).__name__}"
            )
        missing = [kind for kind in compared or () if not getattr(labels, kind)]
        if missing:
            raise ValueError(
                f"labels: a contrast by {', '.join(compared)} needs {', '.join(missing)}, got none"
            )
        highest = -1 if labels.assignment is None else max(labels.assignment.latents)
        if highest >= config.num_latents:
            raise ValueError(f"labels: expected latents in [0, {config.num_latents}), got {highest}")


def new_autoencoder(config: SAEConfig, seed: int, start: SparseAutoencoder | None) -> SparseAutoencoder:
    """A new SAE of `seed`, or a copy of `start`; the global generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sae = SparseAutoencoder(config)
    if start is not None:
        sae.load_state_dict(start.state_dict())
    return sae
