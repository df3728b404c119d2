"""A judge that looks at pictures as JPEG leaves them: published scripts write .jpg files, and classify those."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lbdt.evaluation.evaluated_world import Judge, Verdicts

if TYPE_CHECKING:
    from PIL import Image

QUALITY = 75
"""Pillow's default, which the scripts leave as it is."""


class JpegJudge:
    """Another judge, on pictures that were written as JPEG and read again."""

    def __init__(self, judge: Judge) -> None:
        """`judge`: what looks at them."""
        self.judge = judge
        # Verdicts are kept under these names.
        self.name, self.features_name = (
            f"{name}; on JPEG files of quality {QUALITY}" for name in (judge.name, judge.features_name)
        )
        self.single_label = bool(getattr(judge, "single_label", False))

    def __call__(self, pictures: Sequence[Image.Image]) -> Verdicts:
        """The other judge's verdicts; `pictures` stay as they are."""
        return self.judge([through_jpeg(picture) for picture in pictures])


def through_jpeg(picture: Image.Image) -> Image.Image:
    """The RGB picture that a JPEG file of `picture` gives back."""
    from PIL import Image

    data = io.BytesIO()
    picture.convert("RGB").save(data, format="JPEG", quality=QUALITY)
    with Image.open(data, formats=("JPEG",)) as read:
        return read.convert("RGB")
