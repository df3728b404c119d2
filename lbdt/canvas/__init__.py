"""EmojiCanvas, the embedded default: a small text-to-image world with 20 objects in 6 styles, loaded offline.

The weights lie in `lbdt/canvas/weights`; `lbdt.canvas.train` made them (lbdt/canvas/README.md).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from lbdt.canvas.models import Classifier
    from lbdt.editors import ConceptEraser, Steering

WEIGHTS = Path(__file__).parent / "weights"


class Sampling(NamedTuple):
    """The steps and the guidance that pictures are generated with."""

    steps: int
    guidance: float


KINDS: dict[str, Sampling] = {
    "saeuron": Sampling(20, 3.0),
    "saemnesia": Sampling(20, 3.0),
    "gsae": Sampling(20, 3.0),
    "sdxl": Sampling(4, 1.0),
    "saeparate": Sampling(20, 3.0),
}
"""The erasers, and the sampling that each was trained for: SDXL Turbo's takes few steps without guidance."""


def __getattr__(name: str):
    if name in ("OBJECTS", "STYLES", "prompt", "render"):
        from lbdt.canvas import scenes

        return getattr(scenes, name)
    raise AttributeError(f"module 'lbdt.canvas' has no attribute {name!r}")


def load_pipeline(dtype: torch.dtype | None = None):
    """The embedded `StableDiffusionPipeline`: 128 x 128 pixels, 4 x 32 x 32 latents, float32 or `dtype`.

    Raises:
        FileNotFoundError: the installation lacks the weights.
    """
    with _quiet_loading():
        from diffusers import StableDiffusionPipeline

        pipe = StableDiffusionPipeline.from_pretrained(
            _folder("pipeline"), local_files_only=True, safety_checker=None, requires_safety_checker=False
        )
        return pipe if dtype is None else pipe.to(dtype)


@contextlib.contextmanager
def _quiet_loading():
    """No progress bars for a second's loading, nor warnings that AutoencoderTiny is not AutoencoderKL (diffusers takes
    both) and that torchvision is absent (nothing here uses it)."""
    from diffusers.utils import logging as diffusers
    from transformers.utils import logging as transformers

    before = [
        (module, module.get_verbosity(), getattr(module, "is_progress_bar_enabled", lambda: True)())
        for module in (diffusers, transformers)
    ]
    for module, _, _ in before:
        module.set_verbosity_error()
        module.disable_progress_bar()
    try:
        yield
    finally:
        for module, verbosity, bar in before:
            module.set_verbosity(verbosity)
            if bar:
                module.enable_progress_bar()


def load_eraser(kind: str = "saeuron", **settings: Any) -> ConceptEraser:
    """The embedded eraser of one kind, trained on the embedded pipeline by `benchmarks/pipelines.sh`.

    Args:
        kind: `"saeuron"`: TopK SAE with score-based concept dictionary. `"saemnesia"`: the same SAE fine-tuned so
            that one latent stands for each concept. `"gsae"`: sigmoid SAE whose latent i stands for concept i.
            `"sdxl"`: SAE of the block's update at few steps without guidance, as for SDXL Turbo. `"saeparate"`: TopK
            SAE behind a linear map and GELU, trained to draw images of an object together. `KINDS` has the sampling
            that each was trained for.
        settings: keywords of `lbdt.ConceptEraser` to change, such as `padding`.

    Raises:
        ValueError: unknown kind, or a setting that `lbdt.ConceptEraser` refuses.
        FileNotFoundError: the installation lacks the weights.
    """
    from lbdt.editors import ConceptEraser

    return ConceptEraser.from_pretrained(_eraser_folder(kind), **settings)


def load_steering(kind: str = "saeuron", **settings: Any) -> Steering:
    """The steering baseline of `load_eraser(kind)`: its SAE, dictionary and selection, the published rule of the kind.

    Args:
        kind: as for `load_eraser`.
        settings: keywords of `lbdt.Steering` to change, such as `strength`.

    Raises:
        ValueError: unknown kind, or a setting that `lbdt.Steering` refuses.
        FileNotFoundError: the installation lacks the weights.
    """
    from lbdt.editors import Steering

    return Steering.from_pretrained(_eraser_folder(kind), **settings)


def _eraser_folder(kind: str) -> Path:
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: EmojiCanvas has erasers of kind {', '.join(KINDS)}")
    return _folder(f"eraser-{kind}")


def classify(images: torch.Tensor | Sequence[Image.Image]) -> tuple[torch.Tensor, torch.Tensor]:
    """What the two embedded classifiers see in pictures.

    Args:
        images: float tensor [B, 3, 128, 128] in [-1, 1], or a list of PIL pictures of 128 x 128.

    Returns:
        Which of `OBJECTS` are seen, bool [B, 20] (several, one or none), and the style, int64 [B] into `STYLES`.

    Raises:
        ValueError: another shape.
    """
    import torch

    if not isinstance(images, torch.Tensor):
        images = as_tensor(images)
    if images.ndim != 4 or tuple(images.shape[1:]) != (3, 128, 128):
        raise ValueError(
            f"images has shape {tuple(images.shape)}, expected [B, 3, 128, 128]: EmojiCanvas pictures"
        )
    with torch.inference_mode():
        images, nets = images.float().cpu(), classifiers()
        return nets["object"](images) > 0, nets["style"](images).argmax(-1)


def as_tensor(pictures: Sequence[Image.Image]) -> torch.Tensor:
    """PIL pictures of one size as float32 [B, 3, H, W] in [-1, 1]."""
    import numpy as np
    import torch

    images = torch.stack([torch.from_numpy(np.array(picture.convert("RGB"))) for picture in pictures])
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


@functools.lru_cache(maxsize=1)
def classifiers() -> dict[str, Classifier]:
    """The embedded judges: "object", "style" and "fault"."""
    from lbdt.canvas.models import load_classifiers

    return load_classifiers(_folder("judges"))


def _folder(name: str) -> Path:
    path = WEIGHTS / name
    if not path.is_dir():
        raise FileNotFoundError(
            f"{path} is missing: reinstall lbdt with its package data, or train it (lbdt/canvas/train.py)"
        )
    return path
