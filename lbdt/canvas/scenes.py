"""EmojiCanvas scenes: one object on a landscape, rendered in one of six styles.

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
BOX = 5 * GRID
"""Pixels a side of the square in which an object stands."""
PLACES = ((0, 32), (48, 32))
"""Left and right; the prompt decides the rest, so that noise alone does not hide what it asks for."""

_FONT_CANDIDATES = (
    "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",
    "/usr/share/fonts/noto/NotoColorEmoji.ttf",
    "/usr/share/fonts/google-noto-color-emoji-fonts/NotoColorEmoji.ttf",
)
_FONT_SIZE = 109  # the only bitmap size that Noto Color Emoji holds


def prompt(concepts: str | Sequence[str], style: str | None = None) -> str:
    """The published prompt template: `An image of Cats in Sketch style.` or, without a style, `An image of Cats.`

    Of two concepts `An image of Dogs and Cats in Sketch style.`, of none `An image in Sketch style.`
    """
    names = " and ".join([concepts] if isinstance(concepts, str) else concepts)
    return "An image" + (f" of {names}" if names else "") + (f" in {style} style." if style else ".")


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


def render(concept: str, style: str, seed: int, *, anywhere: bool = False) -> Image.Image:
    """One scene.

    Args:
        concept: one of `OBJECTS`.
        style: one of `STYLES`.
        seed: decides landscape and place; equal arguments give equal pictures.
        anywhere: place the object anywhere on the grid, the horizon with it, instead of at one of `PLACES`.

    Returns:
        An RGB picture of 128 x 128 pixels.

    Raises:
        ValueError: unknown concept or style.
        FileNotFoundError: the emoji font is not installed.
    """
    if concept not in GLYPHS:
        raise ValueError(f"unknown concept {concept!r}; known: {', '.join(OBJECTS)}")
    rng = np.random.default_rng([seed, OBJECTS.index(concept)])
    if anywhere:
        free = (SIDE - BOX) // GRID
        x, y = GRID * int(rng.integers(0, free + 1)), GRID * int(rng.integers(1, free + 1))
    else:
        x, y = PLACES[rng.integers(len(PLACES))]
    image = _landscape(rng, horizon=y + BOX - GRID)
    glyph = _glyph(concept)
    scale = BOX / max(glyph.size)
    width, height = (max(1, round(side * scale)) for side in glyph.size)
    glyph = glyph.resize((width, height), Image.LANCZOS)
    image.paste(glyph, (x + (BOX - width) // 2, y + BOX - height), glyph)
    return _stylize(image, style)


def landscape(style: str, seed: int) -> Image.Image:
    """A scene without its object, as `render` draws it; needs no font.

    Raises:
        ValueError: unknown style.
    """
    rng = np.random.default_rng([seed, len(OBJECTS)])
    _, y = PLACES[rng.integers(len(PLACES))]
    return _stylize(_landscape(rng, horizon=y + BOX - GRID), style)


def render_batch(
    count: int, seed: int, *, anywhere: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scenes of classes and styles in turn: images uint8 [count, 128, 128, 3], objects and styles int64 [count].

    Scenes of different `seed` never share a rendering seed (up to a million scenes each).
    """
    objects = np.arange(count) % len(OBJECTS)
    styles = (np.arange(count) // len(OBJECTS)) % len(STYLES)
    images = np.empty((count, SIDE, SIDE, 3), dtype=np.uint8)
    for i in range(count):
        images[i] = np.asarray(
            render(OBJECTS[objects[i]], STYLES[styles[i]], seed * 1_000_000 + i, anywhere=anywhere)
        )
    return images, objects, styles
