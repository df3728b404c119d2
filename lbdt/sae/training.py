"""Training of TopK and BatchTopK sparse autoencoders by SAeUron's recipe (protocols.md 3.1, arXiv
2501.18052).

Loss: `FVU + auxk_alpha * AuxK`. The gradients are written out instead of left to autograd: an activation is
nonzero for k of L latents, so every product but the encoder's has n * k * d terms and not n * L * d. On a CPU
core a step at n 4096, d 256, L 4096, k 32 takes as long as the encoder's product and its top-k.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torch.nn import functional as F

from lbdt.files import read_tensors, write_files
from lbdt.sae.config import SAEConfig
from lbdt.sae.model import SparseAutoencoder

_ADAM_EPS = 6.25e-10
_CLIP_NORM = 1.0
_DEAD_ROWS = 10_000_000
_THRESHOLD_DECAY = 0.99


def train(
    sae_config: SAEConfig,
    batches: Callable[[int], Tensor],
    steps: int,
    *,
    lr: float = 4e-4,
    auxk_alpha: float = 1 / 32,
    seed: int = 0,
    progress: bool = True,
    log: Callable[[int, dict[str, float]], None] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 100,
    dead_after: int | None = None,
) -> SparseAutoencoder:
    """Trains an SAE on `batches(step) -> x [n, d]` (cast to float32) and returns it on the batches' device.

    Activation topk, with per-patch TopK or, where `sae_config.batch_topk`, BatchTopK (inference stays per
    patch, as in SAeUron); activation batch_topk trains with BatchTopK and stores the mean smallest kept
    activation as threshold. Tied init with unit decoder rows, `b_dec` at the geometric median of the first
    batch, Adam, linear decay to 0, gradient norm clipped at 1, decoder gradient kept orthogonal to the rows,
    rows renormalised.

    Differences from the released trainer: the AuxK target is the residual `x - x_hat` (there it has the
    opposite sign and `b_dec` added), and an index kept with value 0 does not count as fired.

    Args:
        batches: must depend on the step only for a resumed run to equal an uninterrupted one.
        log: called after each step with `fvu`, `auxk`, `l0` (active latents a row) and `dead` (latents).
        checkpoint: a safetensors file, replaced atomically every `checkpoint_every` steps and at the end.
            When it exists the run continues from it, bit for bit as if it had not stopped.
        dead_after: rows without firing after which a latent counts as dead; None: SAeUron's 10 million, or a
            tenth of the run where that is less.

    Raises:
        ValueError: an activation without a recipe, a batch of the wrong shape or with NaN, a checkpoint of
            other settings.
    """
    _validate(sae_config, steps, lr, checkpoint_every)
    settings = {
        "config": sae_config.to_json(),
        "steps": steps,
        "lr": lr,
        "auxk_alpha": auxk_alpha,
        "seed": seed,
        "dead_after": dead_after,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sae = SparseAutoencoder(sae_config)
    path = None if checkpoint is None else Path(checkpoint)
    saved = _read_checkpoint(path, settings, sae) if path is not None and path.exists() else None
    start = 0 if saved is None else int(saved["step"])
    x = _batch(batches, min(start, steps - 1), sae_config.d_in)
    sae.to(x.device)
    state = _State.create(sae)
    if saved is None:
        sae.b_dec.data.copy_(geometric_median(x))
    else:
        state.load(saved, sae)
    if dead_after is None:
        dead_after = min(_DEAD_ROWS, steps * x.shape[0] // 10)

    bar = None
    if progress:
        from tqdm import tqdm

        bar = tqdm(total=steps, initial=start, desc="train SAE", unit="step")
    try:
        for step in range(start, steps):
            if step > start:
                x = _batch(batches, step, sae_config.d_in)
            metrics = _step(sae, state, x, lr * (1 - step / steps), auxk_alpha, dead_after)
            if bar is not None:
                bar.update()
                bar.set_postfix(fvu=f"{metrics['fvu']:.3f}", dead=int(metrics["dead"]), refresh=False)
            if log is not None:
                log(step, metrics)
            if path is not None and ((step + 1) % checkpoint_every == 0 or step + 1 == steps):
                _write_checkpoint(path, settings, sae, state, step + 1)
    finally:
        if bar is not None:
            bar.close()
    if sae_config.activation == "batch_topk":
        sae.config = replace(sae_config, threshold=float(state.threshold))
    return sae.requires_grad_(False).eval()


@torch.no_grad()
def explain_variance(sae: SparseAutoencoder, x: Tensor) -> dict[str, float]:
    """How well `sae` explains `x` [n, d] at inference: `fvu` (squared error over squared deviation from the
    mean row), `l0` (active latents a row), `dead` (latents that fire on no row)."""
    x = x.reshape(-1, x.shape[-1]).float()
    fired = torch.zeros(sae.config.num_latents, dtype=torch.bool, device=x.device)
    error = active = 0.0
    for part in x.split(4096):
        code = sae.encode(part)
        error += float((sae.decode(code).float() - part).double().square().sum())
        active += int((code.values > 0).sum())
        fired[code.indices[code.values > 0]] = True
    variance = float((x - x.mean(0)).double().square().sum())
    return {"fvu": error / variance, "l0": active / x.shape[0], "dead": int((~fired).sum())}


def geometric_median(x: Tensor, iterations: int = 100, tolerance: float = 1e-5) -> Tensor:
    """The point [d] with the least summed distance to the rows of `x` [n, d], by Weiszfeld's iteration."""
    guess = x.mean(0)
    for _ in range(iterations):
        weights = 1 / (x - guess).norm(dim=1).clamp(min=1e-10)
        previous, guess = guess, (weights @ x) / weights.sum()
        if float((guess - previous).norm()) <= tolerance * float(guess.norm()):
            break
    return guess


@dataclass
class _State:
    optimizer: torch.optim.Adam
    idle: Tensor
    """Rows since each latent last fired, [L] int64."""
    threshold: Tensor
    """Running mean of the smallest activation that BatchTopK kept, scalar float32; NaN before the first
    step."""

    @classmethod
    def create(cls, sae: SparseAutoencoder) -> _State:
        device = sae.b_dec.device
        optimizer = torch.optim.Adam(sae.parameters(), eps=_ADAM_EPS, fused=device.type in ("cpu", "cuda"))
        idle = torch.zeros(sae.config.num_latents, dtype=torch.int64, device=device)
        return cls(optimizer, idle, torch.tensor(torch.nan, device=device))

    def load(self, saved: dict[str, Tensor], sae: SparseAutoencoder) -> None:
        for name, parameter in sae.named_parameters():
            parameter.data.copy_(saved[name])
            self.optimizer.state[parameter] = {
                "step": saved["step"].float().to(parameter.device),
                "exp_avg": saved[f"exp_avg.{name}"].to(parameter.device),
                "exp_avg_sq": saved[f"exp_avg_sq.{name}"].to(parameter.device),
            }
        self.idle.copy_(saved["idle"])
        if float(saved["threshold"]) >= 0:
            self.threshold.copy_(saved["threshold"])


class _Code:
    """Active entries of a batch in row order: `rows`, `cols` int64 and `values` float32, [E], and row offsets
    [n]."""

    def __init__(self, rows: Tensor, cols: Tensor, values: Tensor, n: int) -> None:
        self.rows, self.cols, self.n = rows, cols, n
        self.values = values.detach().requires_grad_(True)
        self.offsets = _offsets(rows, n)

    def decode(self, weight: Tensor) -> Tensor:
        return F.embedding_bag(self.cols, weight, self.offsets, per_sample_weights=self.values, mode="sum")

    def backward(self, sae: SparseAutoencoder, centred: Tensor, decoded: Tensor, gradient: Tensor) -> None:
        """Adds to the parameters' gradients, given that of the decoded rows (without `b_dec`), [n, d]."""
        (dz,) = torch.autograd.grad(decoded, self.values, gradient)
        order = self.cols.int().argsort(stable=True)
        rows, offsets = self.rows[order], _offsets(self.cols, sae.config.num_latents)

        def transposed_product(table: Tensor, weights: Tensor) -> Tensor:
            return F.embedding_bag(rows, table, offsets, per_sample_weights=weights[order], mode="sum")

        with torch.no_grad():
            sae.W_dec.grad += transposed_product(gradient, self.values.detach())
            sae.encoder.weight.grad += transposed_product(centred, dz)
            summed = torch.zeros_like(sae.encoder.bias).index_add_(0, self.cols, dz)
            sae.encoder.bias.grad += summed
            sae.b_dec.grad -= summed @ sae.encoder.weight


def _offsets(keys: Tensor, size: int) -> Tensor:
    counts = torch.bincount(keys, minlength=size)
    return counts.cumsum(0) - counts


def _code(h: Tensor, k: int, batch_topk: bool, guess: float) -> _Code:
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
    else:
        values, cols = h.topk(k, dim=1, sorted=False)
        rows = torch.arange(n, device=h.device).repeat_interleave(k)
        values, cols = values.reshape(-1), cols.reshape(-1)
    positive = values > 0
    return _Code(rows[positive], cols[positive], values[positive], n)


def accumulate_gradients(
    sae: SparseAutoencoder,
    x: Tensor,  # [n, d] float32
    *,
    batch_topk: bool,
    auxk_alpha: float,
    dead: Tensor | None = None,  # [L] bool
    guess: float = 0.0,
) -> tuple[dict[str, float], _Code]:
    """Adds the gradient of `FVU + auxk_alpha * AuxK` to the parameters' `.grad`; returns the losses and the
    code.

    AuxK (arXiv 2406.04093, appendix A.2): the d/2 most active dead latents predict the residual, which is a
    constant; scaled by min(dead / (d/2), 1).
    """
    for parameter in sae.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    with torch.no_grad():
        centred = x - sae.b_dec
        h = F.linear(centred, sae.encoder.weight, sae.encoder.bias)
        variance = (x - x.mean(0)).square().sum()
    weight = sae.W_dec.detach()
    code = _code(h, sae.config.k, batch_topk, guess)
    decoded = code.decode(weight)
    error = decoded.detach() - centred
    gradient = error * (2 / variance)
    code.backward(sae, centred, decoded, gradient)
    sae.b_dec.grad += gradient.sum(0)
    fvu = error.square().sum() / variance

    auxk = 0.0
    count = 0 if dead is None else int(dead.sum())
    if count and auxk_alpha > 0:
        wanted = max(1, x.shape[1] // 2)
        scale = min(count / wanted, 1.0)
        latents = dead.nonzero().squeeze(1)
        part = _code(h[:, latents], min(wanted, count), False, 0.0)
        aux = _Code(part.rows, latents[part.cols], part.values, part.n)
        predicted = aux.decode(weight)
        miss = predicted.detach() + error
        aux.backward(sae, centred, predicted, miss * (2 * auxk_alpha * scale / variance))
        auxk = float(scale * miss.square().sum() / variance)
    return {"fvu": float(fvu), "auxk": auxk, "l0": code.cols.numel() / code.n, "dead": count}, code


def _step(
    sae: SparseAutoencoder, state: _State, x: Tensor, lr: float, auxk_alpha: float, dead_after: int
) -> dict[str, float]:
    state.optimizer.zero_grad(set_to_none=False)
    batch_topk = sae.config.batch_topk or sae.config.activation == "batch_topk"
    expected = float(state.threshold)
    metrics, code = accumulate_gradients(
        sae,
        x,
        batch_topk=batch_topk,
        auxk_alpha=auxk_alpha,
        dead=state.idle > dead_after,
        guess=0.8 * expected if expected > 0 else 0.0,
    )
    with torch.no_grad():
        torch.nn.utils.clip_grad_norm_(sae.parameters(), _CLIP_NORM)
        decoder = sae.W_dec
        if sae.config.normalize_decoder:
            decoder.grad -= (decoder.grad * decoder).sum(1, keepdim=True) * decoder
        state.optimizer.param_groups[0]["lr"] = lr
        state.optimizer.step()
        if sae.config.normalize_decoder:
            decoder.copy_(F.normalize(decoder, dim=1))
        state.idle += x.shape[0]
        state.idle[code.cols] = 0
        if batch_topk and code.cols.numel():
            smallest = code.values.detach().min()
            known = not torch.isnan(state.threshold)
            state.threshold.copy_(
                torch.lerp(smallest, state.threshold, _THRESHOLD_DECAY) if known else smallest
            )
    return metrics


def _validate(config: SAEConfig, steps: int, lr: float, checkpoint_every: int) -> None:
    if config.activation not in ("topk", "batch_topk"):
        raise ValueError(
            f"activation {config.activation!r}: no training recipe; expected 'topk' (with batch_topk true "
            f"for BatchTopK) or 'batch_topk'"
        )
    for name in ("sample_topk", "multi_topk", "encoder_only"):
        if getattr(config, name):
            raise ValueError(f"{name}: true is not supported in training; set it to false")
    if steps < 1 or checkpoint_every < 1 or not lr > 0:
        raise ValueError(
            f"expected steps >= 1, checkpoint_every >= 1 and lr > 0; got {steps}, {checkpoint_every}, {lr}"
        )


def _batch(batches: Callable[[int], Tensor], step: int, d_in: int) -> Tensor:
    x = batches(step)
    if x.dim() != 2 or x.shape[1] != d_in or x.shape[0] < 2:
        raise ValueError(
            f"batches({step}): expected [n >= 2, {d_in}] (d_in of the config), got {tuple(x.shape)}"
        )
    x = x.detach().float()
    if not bool(torch.isfinite(x).all()):
        raise ValueError(
            f"batches({step}): expected finite values, got NaN or infinity; clean the activations"
        )
    return x


def _write_checkpoint(
    path: Path, settings: dict[str, Any], sae: SparseAutoencoder, state: _State, step: int
) -> None:
    threshold = state.threshold if state.threshold >= 0 else torch.tensor(-1.0)
    tensors = {"step": torch.tensor(step), "idle": state.idle, "threshold": threshold}
    for name, parameter in sae.named_parameters():
        tensors[name] = parameter.detach()
        for moment in ("exp_avg", "exp_avg_sq"):
            tensors[f"{moment}.{name}"] = state.optimizer.state[parameter][moment]
    data = safetensors.torch.save(
        {name: tensor.cpu().contiguous() for name, tensor in tensors.items()},
        metadata={"lbdt_training": json.dumps(settings, sort_keys=True)},
    )
    write_files(path.parent, {path.name: data})


def _read_checkpoint(path: Path, settings: dict[str, Any], sae: SparseAutoencoder) -> dict[str, Tensor]:
    shapes: dict[str, tuple[int | None, ...]] = {
        "step": (),
        "idle": (sae.config.num_latents,),
        "threshold": (),
    }
    for name, parameter in sae.named_parameters():
        for prefix in ("", "exp_avg.", "exp_avg_sq."):
            shapes[prefix + name] = tuple(parameter.shape)
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            written = json.loads((file.metadata() or {}).get("lbdt_training", "{}"))
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(
            f"{path}: not a readable training checkpoint ({error}); delete it to start again"
        ) from error
    wanted = json.loads(json.dumps(settings))
    if written != wanted:
        changed = sorted(key for key in wanted if written.get(key) != wanted[key])
        raise ValueError(
            f"{path}: the checkpoint belongs to a run with another {', '.join(changed)}; delete it, or pass "
            f"the settings it was made with"
        )
    return read_tensors(path, shapes)
