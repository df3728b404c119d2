"""SHA-256 of files, texts, bytes and tensors: what everything that lbdt tells apart by a few bytes is told apart by."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK = 1 << 22


def sha256(pieces: str | bytes | memoryview | Iterable[str | bytes | memoryview]) -> str:
    """SHA-256, hexadecimal, of text (as UTF-8) or bytes, or of several pieces in a row."""
    digest = hashlib.sha256()
    for piece in [pieces] if isinstance(pieces, str | bytes | memoryview) else pieces:
        digest.update(piece.encode() if isinstance(piece, str) else piece)
    return digest.hexdigest()


def blocks(file: BinaryIO) -> Iterator[bytes]:
    """The rest of an open file, in pieces for `sha256`."""
    while block := file.read(_BLOCK):
        yield block


def marked(parts: Iterable[Any]) -> Iterator[str | memoryview]:
    """Tensors (with dtype and shape) and texts (others by `str`), as pieces for `sha256` that show where each ends."""
    from torch import Tensor

    for part in parts:
        if isinstance(part, Tensor):
            yield f"{part.dtype} {tuple(part.shape)}"
            yield raw(part)
        else:
            yield f"{part}\0"


def raw(tensor: Tensor) -> memoryview:
    """A tensor's bytes, on the CPU."""
    import torch

    # Any dtype as bytes: NumPy has no bfloat16.
    return memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
