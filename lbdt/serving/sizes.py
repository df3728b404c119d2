"""Sizes of pictures, as users write them."""

from __future__ import annotations


def pixels_of(size: str) -> tuple[int, int]:
    """(width, height) of "512x512".

    Raises:
        ValueError: another form, or not multiples of 8 from 8 to 8192.
    """
    width, _, height = size.partition("x")
    pixels = tuple(
        int(side) if side.isascii() and side.isdigit() and len(side) < 5 else 0 for side in (width, height)
    )
    if not all(8 <= side <= 8192 and side % 8 == 0 for side in pixels):
        raise ValueError(
            f"size: expected WIDTHxHEIGHT in multiples of 8 up to 8192, such as 512x512, got {size[:40]!r}"
        )
    return pixels[0], pixels[1]
