"""EmojiCanvas scenes: none, one or two objects on a landscape, rendered in one of six styles.

A miniature of UnlearnCanvas (arXiv 2402.11846): its 20 object classes, each drawn as one glyph of Noto Color Emoji
(SIL Open Font License 1.1, Debian package `fonts-noto-color-emoji`). Only rendering needs the font; the shipped
models do not.
"""

from __future__ import annotations

import colorsys
import functools
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont, ImageOps

GLYPHS = {
    "Architectures": "🏛",
    "Bears": "🐻",
    "Birds": "🐦",
    "Butterfly": "🦋",
    "Cats": "🐈",
    "Dogs": "🐕",
    "Fishes": "🐟",
    "Flame": "🔥",
    "Flowers": "🌻",
    "Frogs": "🐸",
    "Horses": "🐎",
    "Human": "🧍",
    "Jellyfish": "🐙",
    "Rabbits": "🐇",
    "Sandwiches": "🥪",
    "Sea": "🌊",
    "Statues": "🗽",
    "Towers": "🗼",
    "Trees": "🌳",
    "Waterfalls": "🏞",
}
OBJECTS: tuple[str, ...] = tuple(GLYPHS)
STYLES: tuple[str, ...] = ("Photo", "Sketch", "Mosaic", "Neon", "Watercolor", "Warm")
SIDE = 128
GRID = 16
"""Pixels a side of a patch of the UNet's 8 x 8 level: on this grid a class's patches repeat exactly, which a small UNet
can learn."""
BOX = 3 * GRID
"""Pixels a side of the square in which an object stands."""
PLACES = (0, SIDE - BOX)
"""Left edges of the boxes, two patches apart: a detected patch and its eight neighbours never reach the other object.
The prompt decides the rest, so that noise alone does not hide what it asks for."""
FLOOR = 96
"""Where boxes end, in pixels from the top; the horizon runs one patch above."""

_FONT_CANDIDATES = (
    "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",
    "/usr/share/fonts/noto/NotoColorEmoji.ttf",
    "/usr/share/fonts/google-noto-color-emoji-fonts/NotoColorEmoji.ttf",
)
_FONT_SIZE = 109  # the only bitmap size that Noto Color Emoji holds


def prompt(concepts: str | Sequence[str], style: str | None = None) -> str:
    """The published prompt template, for none, one or more objects, the first of which stands on the left.

    `An image of Cats in Sketch style.`, `An image of Dogs and Cats in Sketch style.`, `An image in Sketch style.`;
    without a style, `An image of Cats.`, `An image.`
    """
    words = ["An image"]
    if concepts := (concepts,) if isinstance(concepts, str) else tuple(concepts):
        words.append("of " + " and ".join(concepts))
    if style:
        words.append(f"in {style} style")
    return " ".join(words) + "."


@functools.lru_cache(maxsize=1)
def _font() -> ImageFont.FreeTypeFont:
    path = os.environ.get("LBDT_EMOJI_FONT")
    for candidate in (path,) if path else _FONT_CANDIDATES:
        if Path(candidate).is_file():
            return ImageFont.truetype(candidate, _FONT_SIZE)
    raise FileNotFoundError(
        f"no Noto Color Emoji font at {path or ', '.join(_FONT_CANDIDATES)}; install Debian's fonts-noto-color-emoji "
        "or set LBDT_EMOJI_FONT to the font file (needed to render scenes only, not to use the shipped models)"
    )


@functools.cache
def _glyph(concept: str) -> Image.Image:
    canvas = Image.new("RGBA", (160, 160), (0, 0, 0, 0))
    ImageDraw.Draw(canvas).text((12, 12), GLYPHS[concept], font=_font(), embedded_color=True)
    return canvas.crop(canvas.getbbox())


def _landscape(rng: np.random.Generator, horizon: int) -> Image.Image:
    """A sky-and-ground gradient of random hues (no noise: it would cost the models their capacity)."""
    sky, ground = rng.uniform(0.50, 0.65), rng.uniform(0.18, 0.36)
    rows = np.zeros((SIDE, 1, 3), dtype=np.float32)
    for y in range(SIDE):
        if y < horizon:
            color = colorsys.hsv_to_rgb(sky, 0.45 - 0.30 * y / horizon, 0.95)
        else:
            color = colorsys.hsv_to_rgb(ground, 0.40, 0.80 - 0.30 * (y - horizon) / (SIDE - horizon))
        rows[y, 0] = color
    return Image.fromarray((np.repeat(rows, SIDE, axis=1) * 255).astype(np.uint8))


def _ink(value: int) -> int:
    """A grey level of edges, strengthened; 0 for those of the landscape's gradient."""
    return 0 if value < 12 else min(255, value * 3)


def _edges(image: Image.Image, blur: float) -> Image.Image:
    edges = image.filter(ImageFilter.GaussianBlur(blur)).filter(ImageFilter.FIND_EDGES)
    for box in ((0, 0, SIDE, 2), (0, SIDE - 2, SIDE, SIDE), (0, 0, 2, SIDE), (SIDE - 2, 0, SIDE, SIDE)):
        edges.paste(0, box)
    return edges.point(_ink).filter(ImageFilter.MaxFilter(3))


def _stylize(image: Image.Image, style: str) -> Image.Image:
    if style == "Photo":
        return image
    if style == "Sketch":
        return ImageOps.invert(_edges(ImageOps.grayscale(image), blur=0.7)).convert("RGB")
    if style == "Mosaic":
        return image.resize((32, 32), Image.BOX).resize((SIDE, SIDE), Image.NEAREST)
    if style == "Neon":
        night, violet = (Image.new("RGB", (SIDE, SIDE), color) for color in ((18, 8, 40), (255, 160, 255)))
        return ImageChops.add(night, ImageChops.multiply(_edges(image, blur=0.8), violet))
    if style == "Watercolor":
        paper = Image.new("RGB", (SIDE, SIDE), (252, 244, 226))
        return Image.blend(image.filter(ImageFilter.MedianFilter(7)), paper, 0.30)
    if style == "Warm":
        gray = np.asarray(ImageOps.grayscale(image), dtype=np.float32)[..., None] / 255
        sepia = gray * np.array([255, 190, 110], dtype=np.float32)
        sepia[(np.arange(SIDE) % 8) < 2] *= 0.72
        return Image.fromarray(sepia.astype(np.uint8))
    raise ValueError(f"unknown style {style!r}; known: {', '.join(STYLES)}")


def render(
    concepts: str | Sequence[str], style: str, seed: int, *, anywhere: bool = False, bare: bool = False
) -> Image.Image:
    """One scene.

    Args:
        concepts: none, one or two of `OBJECTS`, from left to right.
        style: one of `STYLES`.
        seed: decides the landscape and the place of a single object; equal arguments give equal pictures.
        anywhere: put the objects anywhere on the grid, the horizon with them, instead of at `PLACES`.
        bare: leave the objects out: the landscape behind them.

    Returns:
        An RGB picture of 128 x 128 pixels.

    Raises:
        ValueError: unknown concept or style, more than two concepts, or one twice.
        FileNotFoundError: the emoji font is not installed (an empty scene needs none).
    """
    names = (concepts,) if isinstance(concepts, str) else tuple(concepts)
    if unknown := [name for name in names if name not in GLYPHS]:
        raise ValueError(f"unknown concept {unknown[0]!r}; known: {', '.join(OBJECTS)}")
    if len(names) > len(PLACES) or len(set(names)) < len(names):
        raise ValueError(f"concepts: expected up to {len(PLACES)} different ones, got {', '.join(names)}")
    rng = np.random.default_rng([seed, len(OBJECTS), *map(OBJECTS.index, names)])
    floor, places = FLOOR, PLACES
    if anywhere:
        floor = GRID * int(rng.integers(BOX // GRID + 1, SIDE // GRID))
        left = int(
            rng.integers(0, (SIDE - BOX) // GRID + 1 if len(names) < 2 else (SIDE - 2 * BOX) // GRID + 1)
        )
        right = int(rng.integers(left + BOX // GRID, (SIDE - BOX) // GRID + 1)) if len(names) > 1 else left
        places = (GRID * left, GRID * right)
    if len(names) == 1:
        places = places[rng.integers(len(places)) :]
    image = _landscape(rng, horizon=floor - GRID)
    for name, x in zip(() if bare else names, places, strict=False):
        glyph = _glyph(name)
        scale = BOX / max(glyph.size)
        width, height = (max(1, round(side * scale)) for side in glyph.size)
        glyph = glyph.resize((width, height), Image.LANCZOS)
        image.paste(glyph, (x + (BOX - width) // 2, floor - height), glyph)
    return _stylize(image, style)


def scene_labels(count: int, seed: int) -> tuple[list[tuple[int, ...]], np.ndarray]:
    """What `count` scenes show: class indices from left to right, and styles int64 [count].

    Of five scenes one is empty, two hold one object and two hold a pair; classes and styles come equally often.
    """
    rng = np.random.default_rng([seed, count])
    shown: list[tuple[int, ...]] = []
    turn: list[int] = []
    for i in range(count):
        if len(turn) < 2:
            turn += rng.permutation(len(OBJECTS)).tolist()
        first = turn.pop() if i % 5 else -1
        if i % 5 == 0:
            shown.append(())
        elif i % 5 < 3:
            shown.append((first,))
        else:
            second = int(rng.integers(len(OBJECTS) - 1))
            second += second >= first
            shown.append((first, second) if rng.integers(2) else (second, first))
    styles = np.arange(count) // 5 % len(STYLES)
    return shown, styles


def render_batch(
    count: int, seed: int, *, anywhere: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The scenes of `scene_labels`: images uint8 [count, 128, 128, 3], objects int64 [count, 2] (-1: none; a single
    object comes first) and styles int64 [count].

    Scenes of different `seed` never share a rendering seed (up to a million scenes each).
    """
    shown, styles = scene_labels(count, seed)
    objects = np.full((count, len(PLACES)), -1, dtype=np.int64)
    images = np.empty((count, SIDE, SIDE, 3), dtype=np.uint8)
    for i, classes in enumerate(shown):
        objects[i, : len(classes)] = classes
        names = [OBJECTS[c] for c in classes]
        images[i] = np.asarray(render(names, STYLES[styles[i]], seed * 1_000_000 + i, anywhere=anywhere))
    return images, objects, styles.astype(np.int64)
