"""Arrays that stay in their file until they are read, part by part."""

from __future__ import annotations

import codecs
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lbdt.runs.reading import open_regular


@dataclass(frozen=True)
class Blob:
    """`length` bytes of a file from `offset` on; with `latin1`, UTF-8 text whose characters are the bytes."""

    offset: int
    length: int
    latin1: bool = False


@dataclass(frozen=True)
class StoredArray:
    """A dense, C-ordered, little-endian array inside a file; nothing of it is in memory."""

    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    data: Blob | bytes
    start: int = 0
    """First byte of the array within `data`."""

    @property
    def nbytes(self) -> int:
        """Bytes of the values, as they would be in memory."""
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, max_bytes: int = 1 << 25) -> Iterator[Tensor]:
        """Consecutive parts [n, *shape[1:]] along the first axis, in the file's dtype, of at most `max_bytes` (but
        at least one row).

        Raises:
            ValueError: the file holds other bytes than the shape needs.
        """
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        count = max(1, max_bytes // max(1, row))
        pieces = self._pieces(row * count)
        for first in range(0, self.shape[0], count):
            n = min(count, self.shape[0] - first)
            part = next(pieces, b"")
            if len(part) != n * row:
                raise self._damaged()
            yield torch.frombuffer(part, dtype=self.dtype).view(n, *self.shape[1:])
        if next(pieces, b""):
            raise self._damaged()

    def _damaged(self) -> ValueError:
        return ValueError(
            f"{self.path}: an array of shape {list(self.shape)} has more or fewer bytes than that; the file is "
            f"damaged, get it again"
        )

    def _pieces(self, size: int) -> Iterator[bytearray]:
        """The array's bytes in writable pieces of `size`, the last one shorter."""
        if isinstance(self.data, bytes):
            data = self.data[self.start : self.start + self.nbytes]
            for first in range(0, len(data), size):
                yield bytearray(data[first : first + size])
            return
        with open_regular(self.path) as file:
            file.seek(self.data.offset + self.start)
            if not self.data.latin1:
                left = self.nbytes
                while left:
                    piece = bytearray(min(size, left))
                    if file.readinto(piece) != len(piece):
                        raise self._damaged()
                    left -= len(piece)
                    yield piece
                return
            # A character below 256 takes one or two bytes in UTF-8, so pieces do not line up with reads.
            decoder, left, buffer = codecs.getincrementaldecoder("utf-8")(), self.data.length, bytearray()
            try:
                while left:
                    text = file.read(min(1 << 20, left))
                    if not text:
                        raise self._damaged()
                    left -= len(text)
                    buffer += decoder.decode(text, final=not left).encode("latin-1")
                    while len(buffer) >= size:
                        yield buffer[:size]
                        del buffer[:size]
            except UnicodeError as error:
                raise self._damaged() from error
            if buffer:
                yield buffer
