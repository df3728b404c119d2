"""Faults that are made on purpose: what EmojiCanvas's artifact judge learns to tell from clean pictures.

A fault is what generation or erasure may leave: patches out of place or of another scene, a part of an object or its
ghost, the ground of another row, noise, wrong colours, a block. `lbdt/canvas/README.md` has what the judge makes of
them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lbdt.canvas.scenes import BOX, GRID, SIDE

_PATCHES = SIDE // GRID
_LEAST = 2.0
"""Grey levels by which a faulty picture differs from the clean one, on average over the patches where it does."""

Fault = Callable[[np.random.Generator, np.ndarray, np.ndarray], np.ndarray]


def _region(rng: np.random.Generator, low: int = 2, high: int = 5) -> tuple[slice, slice]:
    """A rectangle of patches, in pixels."""
    height, width = rng.integers(low, high + 1, 2)
    y, x = rng.integers(0, _PATCHES - height + 1), rng.integers(0, _PATCHES - width + 1)
    return slice(GRID * y, GRID * (y + height)), slice(GRID * x, GRID * (x + width))


def _tiles(picture: np.ndarray) -> np.ndarray:
    """[H, W, 3] as [H / 16, W / 16, 16, 16, 3]."""
    height, width = picture.shape[0] // GRID, picture.shape[1] // GRID
    return picture.reshape(height, GRID, width, GRID, 3).swapaxes(1, 2)


def shuffle(rng: np.random.Generator, picture: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The patches of a rectangle in another order."""
    area = _region(rng, 3, 8)
    tiles = _tiles(picture[area])
    flat = tiles.reshape(-1, GRID, GRID, 3)
    out = picture.copy()
    out[area] = flat[rng.permutation(len(flat))].reshape(tiles.shape).swapaxes(1, 2).reshape(out[area].shape)
    return out


def foreign(rng: np.random.Generator, picture: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Some patches of a rectangle from another picture."""
    area = _region(rng)
    taken = np.kron(rng.random((_PATCHES, _PATCHES)) < rng.uniform(0.4, 1.0), np.ones((GRID, GRID))) > 0
    out = picture.copy()
    out[area] = np.where(taken[area][..., None], other[area], picture[area])
    return out


def rows(rng: np.random.Generator, picture: np.ndarray, other: np.ndarray) -> np.ndarray:
    """A rectangle filled from other rows: a bent horizon, sky in the ground."""
    down, across = _region(rng)
    out = picture.copy()
    out[down, across] = np.roll(picture, GRID * int(rng.integers(1, _PATCHES)), axis=0)[down, across]
    return out


def smear(rng: np.random.Generator, picture: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Every patch of a rectangle of one colour: its mean."""
    area = _region(rng)
    out = picture.copy()
    tiles = _tiles(picture[area]).mean(axis=(2, 3), keepdims=True)
    out[area] = tiles.repeat(GRID, 2).repeat(GRID, 3).swapaxes(1, 2).reshape(picture[area].shape)
    return out


def ghost(rng: np.random.Generator, picture: np.ndarray, other: np.ndarray) -> np.ndarray:
    """A rectangle in which another scene shines through."""
    area = _region(rng, 3, 8)
    out = picture.astype(np.float32)
    out[area] = out[area] + rng.uniform(0.3, 0.7) * (other[area] - out[area])
    return out.round().astype(np.uint8)


def noise(rng: np.random.Generator, picture: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Noise of 12 to 50 grey levels, everywhere or in a rectangle."""
    out = picture.astype(np.float32)
    area = _region(rng) if rng.integers(2) else (slice(None), slice(None))
    out[area] += rng.normal(0, rng.uniform(12, 50), out[area].shape)
    return out.clip(0, 255).astype(np.uint8)


def colours(rng: np.random.Generator, picture: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Channels exchanged, or one much weaker."""
    if rng.integers(2):
        return picture[..., [(1, 2, 0), (2, 0, 1), (2, 1, 0), (0, 2, 1), (1, 0, 2)][rng.integers(5)]]
    out = picture.astype(np.float32)
    out[..., rng.integers(3)] *= rng.uniform(0.3, 0.7)
    return out.astype(np.uint8)


def block(rng: np.random.Generator, picture: np.ndarray, other: np.ndarray) -> np.ndarray:
    """A rectangle of one colour."""
    out = picture.copy()
    out[_region(rng, 1, 5)] = rng.integers(0, 256, 3)
    return out


def scribble(rng: np.random.Generator, picture: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Short strokes of one colour in a box."""
    out = picture.copy()
    y, x = rng.integers(0, SIDE - BOX, 2)
    colour = rng.integers(0, 256, 3) if rng.integers(2) else picture.min(axis=(0, 1))
    for _ in range(rng.integers(4, 14)):
        a, b = y + rng.integers(0, BOX - 3), x + rng.integers(0, BOX - 3)
        if rng.integers(2):
            out[a : a + 2, b : b + rng.integers(4, 20)] = colour
        else:
            out[a : a + rng.integers(4, 20), b : b + 2] = colour
    return out


FAULTS: tuple[Fault, ...] = (
    shuffle,
    foreign,
    rows,
    smear,
    ghost,
    noise,
    colours,
    block,
    scribble,
)


def spoiled(picture: np.ndarray, other: np.ndarray, clean: np.ndarray, seed: int) -> np.ndarray:
    """A picture with a fault that shows.

    Args:
        picture: uint8 [128, 128, 3].
        other: another scene, likewise, whose patches may come in.
        clean: the landscape of `picture` without an object, likewise, through which a part of the object may be lost.
        seed: decides the fault; equal arguments give equal pictures.
    """
    rng = np.random.default_rng([seed, 4])
    while True:
        kind = rng.integers(len(FAULTS) + 1)
        out = half_erased(rng, picture, clean) if kind == len(FAULTS) else FAULTS[kind](rng, picture, other)
        changed = np.abs(out.astype(int) - picture).mean(axis=2)
        tiles = changed.reshape(_PATCHES, GRID, _PATCHES, GRID).mean(axis=(1, 3))
        if (tiles > 4 * _LEAST).sum() >= 1 or changed.mean() > _LEAST:
            return out


def half_erased(rng: np.random.Generator, picture: np.ndarray, clean: np.ndarray) -> np.ndarray:
    """Some patches of the object as if nothing stood there, and some not."""
    tiles = np.abs(picture.astype(int) - clean).mean(axis=2)
    busy = np.argwhere(tiles.reshape(_PATCHES, GRID, _PATCHES, GRID).mean(axis=(1, 3)) > 4 * _LEAST)
    out = picture.copy()
    if len(busy) > 3:
        gone = rng.permutation(len(busy))[: rng.integers(2, len(busy) - 1)]
        for y, x in GRID * busy[gone]:
            out[y : y + GRID, x : x + GRID] = clean[y : y + GRID, x : x + GRID]
    return out
