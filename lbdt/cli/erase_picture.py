"""The picture of `lbdt erase`: without | where the SAE looked | with. Pillow only."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lbdt.evaluation.pictures import HOT, darkened, found, tinted
from lbdt.runs.files import write_file
from lbdt.runs.writable import check_out

if TYPE_CHECKING:
    from PIL import Image

    from lbdt.editors.edit_report import StepMask

GAP = 12
CAPTION = 26
_SMALLEST, _LARGEST = 256, 768
_GROUND, _INK = (250, 250, 248), (32, 33, 36)
_TILES = 2


def panel_size(width: int, height: int) -> tuple[int, int]:
    """Size of a panel for an image of this size: whole multiples enlarge small images, large ones are shrunk."""
    longest = max(width, height)
    if longest > _LARGEST:
        return round(width * _LARGEST / longest), round(height * _LARGEST / longest)
    factor = -(-_SMALLEST // longest)
    return width * factor, height * factor


def picture_size(width: int, height: int) -> tuple[int, int]:
    """Size of the whole picture for images of this size."""
    across, down = panel_size(width, height)
    return 3 * across + 4 * GAP, down + CAPTION + 2 * GAP


def compose(
    without: Image.Image, masks: Sequence[StepMask], erased: Image.Image, captions: tuple[str, str, str]
) -> Image.Image:
    """One RGB picture of `picture_size`; the masks are those of the first image.

    The middle shows, over the darkened image without eraser: how often each patch was replaced over all steps, and the
    masks of an early, a middle and a late step. Red: a concept was detected; amber: padding.
    """
    from PIL import Image, ImageDraw

    size = panel_size(*without.size)
    picture = Image.new("RGB", picture_size(*without.size), _GROUND)
    draw = ImageDraw.Draw(picture)
    panels = (_scaled(without, size), _masks_panel(without, masks, size), _scaled(erased, size))
    for number, (panel, caption) in enumerate(zip(panels, captions, strict=True)):
        left = GAP + number * (size[0] + GAP)
        draw.text((left, GAP - 2), _fitted(draw, caption, size[0]), fill=_INK, font=_font(15))
        picture.paste(panel, (left, GAP + CAPTION))
    return picture


def check_path(path: Path) -> None:
    """ValueError unless Pillow can write a picture of this name there; makes no file."""
    from PIL import Image

    Image.init()
    if path.suffix.lower() not in Image.EXTENSION or Image.EXTENSION[path.suffix.lower()] not in Image.SAVE:
        raise ValueError(f"--out {path}: no picture format has the ending {path.suffix!r}; use .png")
    check_out(path, "picture")


def save(picture: Image.Image, path: Path) -> None:
    """Writes the picture whole or not at all, making its folder if needed.

    Raises:
        OSError: the path, why it cannot be written, and what to do.
    """
    from PIL import Image

    data = io.BytesIO()
    picture.save(data, format=Image.registered_extensions()[path.suffix.lower()])
    write_file(path, data.getvalue())


def _masks_panel(image: Image.Image, masks: Sequence[StepMask], size: tuple[int, int]) -> Image.Image:
    from PIL import Image

    panel = Image.new("RGB", size, _GROUND)
    tile = ((size[0] - GAP // 2) // _TILES, (size[1] - GAP // 2) // _TILES)
    ground = darkened(_scaled(image, tile))
    chosen = sorted({round(place * (len(masks) - 1)) for place in (0.15, 0.5, 0.85)}) if masks else []
    tiles = [_mean_tile(ground, masks)]
    tiles += [
        _step_tile(ground, masks[number], f"step {number + 1}, t {masks[number].timestep:.0f}")
        for number in chosen
    ]
    for number, picture in enumerate(tiles):
        column, line = number % _TILES, number // _TILES
        panel.paste(picture, (column * (size[0] - tile[0]), line * (size[1] - tile[1])))
    return panel


def _mean_tile(ground: Image.Image, masks: Sequence[StepMask]) -> Image.Image:
    if not masks:
        return _labelled(ground.copy(), "no step")
    import torch

    rate = torch.stack([mask.replaced[0].float() for mask in masks]).mean(0)
    return _labelled(tinted(ground, rate, HOT), f"all {len(masks)} steps")


def _step_tile(ground: Image.Image, mask: StepMask, label: str) -> Image.Image:
    return _labelled(found(ground, mask.detected[0], mask.replaced[0]), label)


def _labelled(tile: Image.Image, text: str) -> Image.Image:
    from PIL import ImageDraw

    draw = ImageDraw.Draw(tile)
    font = _font(11)
    left, top, right, bottom = draw.textbbox((5, 3), text, font=font)
    draw.rectangle((left - 3, top - 2, right + 3, bottom + 2), fill=_INK)
    draw.text((5, 3), text, fill=_GROUND, font=font)
    return tile


def _scaled(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    from PIL import Image

    return image.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def _fitted(draw, text: str, width: int) -> str:
    font = _font(15)
    if draw.textlength(text, font=font) <= width:
        return text
    while text and draw.textlength(text + "…", font=font) > width:
        text = text[:-1]
    return text.rstrip() + "…"


def _font(size: int):
    from PIL import ImageFont

    return ImageFont.load_default(size)
