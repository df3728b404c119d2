"""Pictures: reading them from files, and colour over the patches of one. Pillow only."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lbdt.runs.reading import open_regular, reason

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

HOT = (214, 51, 32)
"""Patches in which a concept was detected."""
WARM = (242, 172, 66)
"""Patches that were replaced as the padding of others."""
_MOST_PIXELS = 1 << 26


def read_picture(path: Path, advice: str = "get it again") -> Image.Image:
    """The RGB picture in a PNG or JPEG file of at most 2^26 pixels; ValueError naming the file for anything else."""
    from PIL import Image

    try:
        # Other formats' readers start programs, or are seldom looked at.
        with open_regular(path) as file, Image.open(file, formats=("PNG", "JPEG")) as picture:
            if picture.width * picture.height > _MOST_PIXELS:
                raise ValueError(f"{picture.width} x {picture.height} pixels are too many")
            return picture.convert("RGB")
    except Exception as error:  # Pillow raises nearly every kind, by the damage
        why = reason(error).removeprefix(f"{path}: ")
        raise ValueError(f"{path}: not a readable picture ({why}); {advice}") from error


def rate_tile(image: Image.Image, rate: Tensor) -> Image.Image:
    """The darkened image, redder where patches were replaced at more steps: `rate` [H, W] in [0, 1]."""
    return tinted(darkened(image), rate, HOT)


def darkened(image: Image.Image) -> Image.Image:
    """The picture in dark grey, as a ground for colours."""
    return image.convert("L").point(lambda v: 60 + v // 3).convert("RGB")


def tinted(ground: Image.Image, rate: Tensor, colour: tuple[int, int, int]) -> Image.Image:
    """`ground` under `colour`, as strong as `rate` [H, W] in [0, 1], one cell a patch."""
    from PIL import Image

    height, width = rate.shape
    alpha = Image.new("L", (width, height))
    alpha.putdata([int(200 * value) for value in rate.flatten().tolist()])
    alpha = alpha.resize(ground.size, Image.Resampling.NEAREST)
    return Image.composite(Image.new("RGB", ground.size, colour), ground, alpha)


def found(ground: Image.Image, detected: Tensor, replaced: Tensor, opacity: float = 1.0) -> Image.Image:
    """`ground` under the masks bool [H, W] of a step: `HOT` where detected, `WARM` where replaced besides."""
    padded = tinted(ground, (replaced & ~detected).float() * opacity, WARM)
    return tinted(padded, detected.float() * opacity, HOT)
