"""The report's pictures: a row a concept, columns without | mask (where the SAE saw the concept) | the methods | PER.

Pillow only."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lbdt.evaluation.pictures import read_picture
from lbdt.evaluation.report import cells
from lbdt.runs.wording import short, slug

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

COLUMNS = {
    "base": "without",
    "mask": "mask",
    "negative": "negative prompt",
    "uce": "UCE",
    "steering": "steering",
    "by class": "by class",
    "ungated": "without gate",
    "per": "PER",
}
_ALWAYS = ("base", "mask", "steering", "per")
GAP = 8
CAPTION = 20
LABEL = 118
_TILE = 128
_GROUND, _INK, _FAINT, _EMPTY = (250, 250, 248), (32, 33, 36), (99, 102, 107), (228, 229, 231)


def draw(values: Mapping[str, Any], folder: Path) -> dict[str, bytes]:
    """Kind -> PNG of its grid, for the kinds that have one; the pictures' paths are relative to `folder`.

    Raises ValueError for a file that is no picture.
    """
    drawn = {}
    for name, kind in cells.kinds_of(values).items():
        if kind.get("grid"):
            stream = io.BytesIO()
            compose(kind["grid"], folder).save(stream, format="PNG", optimize=True)
            drawn[name] = stream.getvalue()
    return drawn


def file_name(kind: str) -> str:
    """`grid-KIND.png`, the kind's name without what a file's name may not hold."""
    return f"grid-{slug(kind)}.png"


def columns_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The columns of a grid: base, mask, steering and PER, and the methods that a row has a picture of."""
    return {
        part: caption
        for part, caption in COLUMNS.items()
        if part in _ALWAYS or any(row.get(part) for row in rows)
    }


def size(rows: int, columns: int = len(_ALWAYS)) -> tuple[int, int]:
    """The size of the picture of so many rows and columns."""
    across = LABEL + columns * (_TILE + GAP) + GAP
    return across, CAPTION + rows * (_TILE + GAP) + 2 * GAP


def compose(rows: Sequence[Mapping[str, Any]], folder: Path) -> Image.Image:
    """One RGB picture of `size(len(rows), len(columns_of(rows)))`; a picture that is not there leaves an empty
    tile that says so."""
    from PIL import Image, ImageDraw

    columns = columns_of(rows)
    whole = Image.new("RGB", size(len(rows), len(columns)), _GROUND)
    pen = ImageDraw.Draw(whole)
    for column, caption in enumerate(columns.values()):
        pen.text((LABEL + column * (_TILE + GAP), GAP - 2), caption, fill=_INK, font=_font(14))
    for line, row in enumerate(rows):
        top = GAP + CAPTION + line * (_TILE + GAP)
        _label(pen, top, row)
        for column, part in enumerate(columns):
            left = LABEL + column * (_TILE + GAP)
            _tile(whole, pen, (left, top), folder / row[part] if row.get(part) else None)
    return whole


def _label(pen: ImageDraw.ImageDraw, top: int, row: Mapping[str, Any]) -> None:
    style = "no style" if row.get("style") is None else str(row["style"]).replace("_", " ")
    texts = [(str(row["concept"]).replace("_", " "), _INK, 14), (style, _FAINT, 12)]
    if row.get("beside") is not None:
        texts.insert(1, (f"and {row['beside']}".replace("_", " "), _INK, 12))
    if row.get("seed") is not None:
        texts.append((f"seed {row['seed']}", _FAINT, 12))
    for number, (text, colour, height) in enumerate(texts):
        place = GAP, top + _TILE // 2 - 28 + 20 * number
        pen.text(place, _fitted(pen, text, height, LABEL - 2 * GAP), fill=colour, font=_font(height))


def _tile(whole: Image.Image, pen: ImageDraw.ImageDraw, place: tuple[int, int], path: Path | None) -> None:
    from PIL import Image

    left, top = place
    if path is None or not path.is_file():
        pen.rectangle((left, top, left + _TILE - 1, top + _TILE - 1), fill=_EMPTY)
        pen.text(
            (left + _TILE // 2, top + _TILE // 2), "no picture", fill=_FAINT, font=_font(12), anchor="mm"
        )
        return
    scaled = read_picture(path, "remove it and evaluate again")
    scaled.thumbnail((_TILE, _TILE), Image.Resampling.LANCZOS)
    factor = _TILE // max(scaled.size)
    if factor > 1:
        scaled = scaled.resize((scaled.width * factor, scaled.height * factor), Image.Resampling.NEAREST)
    whole.paste(scaled, (left + (_TILE - scaled.width) // 2, top + (_TILE - scaled.height) // 2))


def _fitted(pen: ImageDraw.ImageDraw, text: str, height: int, width: int) -> str:
    font, text = _font(height), short(text, 100)
    if pen.textlength(text, font=font) <= width:
        return text
    while text and pen.textlength(text + "…", font=font) > width:
        text = text[:-1]
    return text.rstrip() + "…"


def _font(height: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(height)
