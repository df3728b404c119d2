"""What the trainers of EmojiCanvas share: cached scenes, seeded batches, checkpoints that resume."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save
from tqdm import tqdm

from lbdt.canvas import WEIGHTS
from lbdt.canvas.scenes import render_batch
from lbdt.runs.files import write_files

TRAIN_SEED, JUDGE_SEED, HELD_OUT_SEED = 1, 2, 3


def cached_scenes(
    cache: Path, count: int, seed: int, *, anywhere: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scenes of `render_batch`, kept in `cache`: images uint8 [count, 3, 128, 128] (channels_last memory), objects
    int64 [count, 2] and styles int64 [count]."""
    path = cache / f"scenes-{seed}-{count}{'-anywhere' if anywhere else ''}.npz"
    if not path.exists():
        images, objects, styles = render_batch(count, seed, anywhere=anywhere)
        data = io.BytesIO()
        np.savez(data, images=images, objects=objects, styles=styles)
        write_files(cache, {path.name: (data.getbuffer(),)})
    with np.load(path) as data:
        images = torch.from_numpy(data["images"]).permute(0, 3, 1, 2)
        return images, torch.from_numpy(data["objects"]), torch.from_numpy(data["styles"])


def to_float(images: torch.Tensor) -> torch.Tensor:
    """Images uint8 [B, 3, H, W] as float32 in [-1, 1], channels_last."""
    return (images.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised by five Newton-Schulz steps (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

    `torch.optim.Muon` takes matrices only; here a convolution's weight is the matrix [out, in * height * width].
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if "exp_avg" not in state:
                    state["exp_avg"] = torch.zeros_like(p)
                average = state["exp_avg"].lerp_(p.grad, 1 - group["momentum"])
                update = orthogonal(p.grad.lerp(average, group["momentum"]).flatten(1))
                scale = max(1.0, update.shape[0] / update.shape[1]) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update.view_as(p), alpha=-group["lr"] * scale)


def adamw(params, lr: float) -> torch.optim.AdamW:
    """AdamW with the trainers' settings, for parameters or groups of them."""
    return torch.optim.AdamW(params, lr=lr, weight_decay=0.01, betas=(0.9, 0.99), foreach=True)


def orthogonal(x: torch.Tensor) -> torch.Tensor:
    """`x` [m, n] with its singular values brought near 1, by the quintic iteration of Muon's authors, in bfloat16."""
    a, b, c = 3.4445, -4.7750, 2.0315
    y = x.bfloat16()
    y = y / (y.norm() + 1e-7)
    if tall := y.shape[0] > y.shape[1]:
        y = y.T
    for _ in range(5):
        gram = y @ y.T
        y = a * y + (b * gram + c * gram @ gram) @ y
    return (y.T if tall else y).to(x.dtype)


def minimise(
    name: str,
    folder: Path,
    model: torch.nn.Module,
    steps: int,
    loss_fn: Callable[[int, torch.Generator], torch.Tensor],
    optimizers: Sequence[torch.optim.Optimizer],
    *,
    warmup: int = 200,
    ema: float = 0.0,
    seed: int = 0,
    save_every: int = 200,
) -> torch.nn.Module:
    """Minimises a loss with warm-up, linear decay and clipping at 1; goes on from `folder/name.ckpt`.

    `loss_fn` gets the step and a generator that `(seed, step)` seeds, so a run that was killed goes on where its last
    checkpoint stood. Returns the model, in evaluation mode; with `ema` > 0 the averaged weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.ckpt"
    params = dict(model.named_parameters())
    average = {k: p.detach().clone() for k, p in params.items()} if ema else {}
    rates = [(group, group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]
    first = _load(path, params, average, optimizers) if path.exists() else 0
    log = open(folder / f"{name}.jsonl", "a")  # noqa: SIM115 - closed below, shared by the loop
    bar = tqdm(range(first, steps), total=steps, initial=first, desc=name, mininterval=10)
    running = None
    for step in bar:
        for group, rate in rates:
            group["lr"] = rate * min((step + 1) / warmup, max(0.02, (steps - step) / max(1, steps - warmup)))
        loss = loss_fn(step, torch.Generator().manual_seed(seed * 1_000_003 + step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params.values(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if ema:
            decay = min(ema, (step + 1) / (step + 10))
            torch._foreach_lerp_(list(average.values()), [p.detach() for p in params.values()], 1 - decay)
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        if (step + 1) % 50 == 0:
            bar.set_postfix(loss=f"{running:.4f}")
            log.write(json.dumps({"step": step + 1, "loss": running}) + "\n")
            log.flush()
        if (step + 1) % save_every == 0 or step + 1 == steps:
            _save(path, params, average, optimizers, step + 1)
    log.close()
    with torch.no_grad():
        for k, value in average.items():
            params[k].copy_(value)
    return model.eval()


def _save(path: Path, params: dict, average: dict, optimizers: Sequence, step: int) -> None:
    tensors = {f"model.{k}": p.detach() for k, p in params.items()} | {
        f"ema.{k}": v for k, v in average.items()
    }
    for k, p in params.items():
        for optimizer in optimizers:
            tensors |= {f"optim.{field}.{k}": value for field, value in optimizer.state.get(p, {}).items()}
    save_tensors(tensors, path, {"step": str(step)})


def autoencoder(work: Path) -> torch.nn.Module:
    """The autoencoder of `work`, or the embedded one where none was trained there."""
    from diffusers import AutoencoderTiny

    folder = work / "vae"
    return AutoencoderTiny.from_pretrained(folder if folder.is_dir() else WEIGHTS / "pipeline/vae").eval()


def save_tensors(
    tensors: Mapping[str, torch.Tensor], path: Path, about: dict[str, str] | None = None
) -> None:
    """Writes a safetensors file with metadata `about`, whole or not at all."""
    data = save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata=about)
    write_files(path.parent, {path.name: data})


def _load(path: Path, params: dict, average: dict, optimizers: Sequence) -> int:
    from safetensors import safe_open

    tensors = load_file(path)
    owners = {
        p: optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]
    }
    with torch.no_grad():
        for k, p in params.items():
            p.copy_(tensors[f"model.{k}"])
            if k in average:
                average[k].copy_(tensors[f"ema.{k}"])
            state = {f: tensors.get(f"optim.{f}.{k}") for f in ("exp_avg", "exp_avg_sq", "step")}
            if p in owners and state["exp_avg"] is not None:
                owners[p].state[p] = {f: value for f, value in state.items() if value is not None}
    with safe_open(path, "pt") as file:
        return int(file.metadata()["step"])
