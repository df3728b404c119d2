"""Names and texts that users choose: as parts of file names, and as text for people."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any

from lbdt.runs.digests import sha256

_MOST = 60
"""Three of them, with what else stands in a file's name, stay below the 255 bytes of file systems."""


def slug(text: str) -> str:
    """Text as a part of a file's name: at most 60 ASCII letters, digits, dots and hyphens, no dot in front.

    A name that is cut short, or would be hidden or lead out of the folder, ends in eight digits of its SHA-256, so that
    two of them stay apart.
    """
    word = re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-") or "none"
    if len(word) <= _MOST and word[0] != ".":
        return word
    digest = sha256(text.encode("utf-8", "surrogatepass"))[:8]
    return f"{word.lstrip('.-')[: _MOST - len(digest) - 1] or 'none'}-{digest}"


def printable(text: str) -> str:
    """`text` with all that is no visible character or space (line breaks, control characters, lone surrogates) as
    Python escapes it, such as `\\n`."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def legible(values: Any) -> Any:
    """JSON-like values with all their texts `printable`, the keys too."""
    if isinstance(values, str):
        return printable(values)
    if isinstance(values, dict):
        return {legible(key): legible(value) for key, value in values.items()}
    return [legible(value) for value in values] if isinstance(values, list | tuple) else values


def short(text: str, most: int) -> str:
    """`text` in at most `most` characters: of a longer one the beginning and the end, `…` between them."""
    if len(text) <= most:
        return text
    end = (most - 1) // 3
    return f"{text[: most - 1 - end]}…{text[len(text) - end :]}"


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` was perhaps meant to be, letters' case aside; None where none is near."""
    lowered = {other.lower(): other for other in known}
    near = difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=0.5)
    return lowered[near[0]] if near else None


def require_unicode(what: str, text: str) -> None:
    """ValueError, beginning with `what`, for a lone surrogate: no file in UTF-8 can hold it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{what}: expected Unicode text, got the lone surrogate {ascii(text[error.start])} in "
            f"{ascii(short(text, 60))}"
        ) from error
