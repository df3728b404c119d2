"""Trains EmojiCanvas's judges: which objects are seen, which style, and whether a picture is faulty.

`python -m lbdt.canvas.train classifiers --work DIR` runs it (lbdt/canvas/README.md).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from lbdt.canvas import models
from lbdt.canvas.faults import spoiled
from lbdt.canvas.generate import one_hot
from lbdt.canvas.scenes import OBJECTS, STYLES, render, scene_labels
from lbdt.canvas.trainers import (
    HELD_OUT_SEED,
    JUDGE_SEED,
    adamw,
    autoencoder,
    cached_scenes,
    minimise,
    save_tensors,
    to_float,
)


def train_judges(work: Path, steps: int, count: int, only: str | None) -> None:
    """Trains the judges, on rendering seeds of their own, that of objects with noise and blur; `only`: one of them."""
    data = {
        "object": partial(_anywhere, work, count),
        "style": partial(_decoded, work, count),
        "fault": partial(_faulty, work, count),
    }
    for name in data if only is None else (only,):
        images, objects, styles = data[name](JUDGE_SEED)
        targets = styles
        if name != "style":
            targets = (one_hot(objects) if name == "object" else objects).float()
        torch.manual_seed(0)
        net = models.Classifier(models.CLASSIFIERS[name])

        def loss(
            step: int, generator: torch.Generator, name=name, net=net, images=images, targets=targets
        ) -> torch.Tensor:
            index = torch.randint(len(images), (48,), generator=generator)
            x = to_float(images[index]).contiguous()
            # A fault may be noise, and the mosaic of a landscape is of few grey levels.
            x = augment(x, generator) if name == "object" else x
            with torch.autocast("cpu", torch.bfloat16):
                logits = net(x).float()
            if name == "style":
                return F.cross_entropy(logits, targets[index], label_smoothing=0.05)
            return F.binary_cross_entropy_with_logits(logits, 0.01 + 0.98 * targets[index])

        length = steps // 3 if name == "style" else steps
        minimise(f"{name}_classifier", work, net, length, loss, [adamw(net.parameters(), 2e-3)], ema=0.99)
        images, objects, styles = data[name](HELD_OUT_SEED)
        with torch.no_grad():
            logits = torch.cat([net(to_float(part)) for part in images.split(100)])
        right = _right(name, logits, objects, styles)
        print(f"{name}: all right on {100 * right.float().mean():.2f} % of {len(images)} held-out scenes")
        save_tensors(
            {k: v.half() for k, v in net.state_dict().items()}, work / f"{name}_classifier.safetensors"
        )


def _right(name: str, logits: torch.Tensor, objects: torch.Tensor, styles: torch.Tensor) -> torch.Tensor:
    """bool [n]: which pictures the judge `name` is wholly right about."""
    if name == "style":
        return logits.argmax(-1) == styles
    return ((logits > 0) == (one_hot(objects) if name == "object" else objects > 0)).all(1)


def _anywhere(work: Path, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return cached_scenes(work, count if seed == JUDGE_SEED else 1200, seed, anywhere=seed == JUDGE_SEED)


def _decoded(work: Path, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scenes through the autoencoder, without which a mosaic is far sharper than any that is generated."""
    images, _, styles = _faulty(work, count, seed)
    half = len(images) // 2
    return images[:half], styles[:half], styles[:half]


def _faulty(work: Path, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Clean scenes and then faulty ones, in the place of objects 0 and 1; all clean ones and half of the faults have
    come through the autoencoder."""
    count = count if seed == JUDGE_SEED else 1200
    images, _, styles = cached_scenes(work, count, seed)
    path = work / f"faults-{seed}-{count}.safetensors"
    if not path.exists():
        save_tensors({"images": _with_faults(work, images, seed)}, path)
    images = load_file(path)["images"]
    return images, torch.arange(2 * count).view(-1, 1) // count, styles.repeat(2)


def _with_faults(work: Path, images: torch.Tensor, seed: int) -> torch.Tensor:
    """uint8 [2 n, 3, 128, 128] of [n, 3, 128, 128]."""
    shown, styles = scene_labels(len(images), seed)
    plain = images.permute(0, 2, 3, 1).numpy()
    vae = autoencoder(work).to(memory_format=torch.channels_last)

    def decoded(pictures: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        parts = []
        with torch.no_grad():
            for part in pictures.split(50):
                z = vae.encode(to_float(part)).latents
                z = z + 0.05 * torch.rand(len(z), 1, 1, 1, generator=generator) * torch.randn(
                    z.shape, generator=generator
                )
                parts.append(((vae.decode(z).sample.clamp(-1, 1) + 1) * 127.5).round().byte())
        return torch.cat(parts)

    def spoil(pictures: np.ndarray, first: int) -> torch.Tensor:
        out = []
        for i, picture in enumerate(pictures, first):
            names = [OBJECTS[c] for c in shown[i]]
            bare = np.asarray(render(names, STYLES[styles[i]], seed * 1_000_000 + i, bare=True))
            out.append(spoiled(picture, plain[(i + 1 + i % 97) % len(plain)], bare, seed * 1_000_000 + i))
        return torch.from_numpy(np.stack(out)).permute(0, 3, 1, 2)

    clean = decoded(images)
    half = len(images) // 2
    before = decoded(spoil(plain[:half], 0))
    after = spoil(clean[half:].permute(0, 2, 3, 1).numpy(), half)
    return torch.cat([clean, before, after]).contiguous()


def augment(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Images [B, 3, H, W] in [-1, 1], half of them blurred, with noise of random strength, as a generator's have."""
    soft = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear", align_corners=False)
    weight = torch.rand(len(x), 1, 1, 1, generator=generator) * (
        torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5
    )
    noise = 0.15 * torch.rand(len(x), 1, 1, 1, generator=generator)
    return torch.lerp(x, soft, weight) + noise * torch.randn(x.shape, generator=generator)
