"""An audit file's lines, read: whether one is spelt as the writer spells it, and a field is what it may be."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from lbdt.runs.wording import short
from lbdt.serving.audit_lines import HASH, MOST_LINE, NAME, canonical, check_names, check_time, unseal


class Wrong(Exception):
    """What is wrong with a line."""


def parsed(line: bytes) -> tuple[dict[str, Any], bytes, str]:
    """A line's fields but its hash, the bytes they are spelt in, and the hash it has."""
    if line.endswith(b"\r"):
        raise Wrong('ends by "\\r\\n"; expected "\\n" alone')
    if len(line) >= MOST_LINE:
        raise Wrong(f"expected at most {MOST_LINE} bytes")
    parts = unseal(line)
    try:
        # Text: of bytes the decoder would guess the encoding.
        values = json.loads((parts[0] if parts else line).decode())
    except UnicodeDecodeError as error:
        raise Wrong(f"not UTF-8 at byte {error.start}") from error
    except (ValueError, RecursionError) as error:
        raise Wrong(f"not JSON ({getattr(error, 'msg', 'too deep, or a number too long')})") from error
    if not isinstance(values, dict):
        raise Wrong("expected a JSON object")
    if parts is None or not HASH.fullmatch(parts[1]):
        raise Wrong("expected a hash of 64 hexadecimal digits at its end")
    try:
        same = canonical(values) == parts[0]
    except (ValueError, RecursionError):  # ValueError: NaN, a lone surrogate
        same = False
    if not same:
        raise Wrong("the same values are spelt otherwise than the writer spells them")
    return values, *parts


def lines_of(path: Path, file: BinaryIO) -> Iterator[bytes]:
    """Lines with their ends. Of one that is too long, all but a byte more than is allowed is passed over."""
    try:
        while line := file.readline(MOST_LINE + 1):
            cut = line
            while len(cut) > MOST_LINE and not cut.endswith(b"\n"):
                cut = file.readline(MOST_LINE + 1)
            yield line if line.endswith(b"\n") or not cut.endswith(b"\n") else line + b"\n"
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error


def opened(path: Path) -> BinaryIO:
    """A regular file for reading; ValueError naming it. Never waits, as opening a FIFO might."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise ValueError(
            f"{path}: cannot be read ({why}); expected an audit file or a folder of them"
        ) from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ValueError(f"{path}: not a regular file; expected an audit file or a folder of them")
    return os.fdopen(handle, "rb", buffering=1 << 20)


def require_names(values: dict[str, Any], names: frozenset[str]) -> None:
    if values.keys() != names:
        try:
            check_names(values, names)
        except ValueError as error:
            raise Wrong(str(error)) from error


def require_time(name: str, values: dict[str, Any]) -> None:
    try:
        check_time(name, values[name])
    except ValueError as error:
        raise Wrong(str(error)) from error


def require(name: str, values: dict[str, Any], right: bool, wanted: str) -> None:
    if not right:
        raise Wrong(f"{name}: expected {wanted}, got {brief(values[name])}")


def is_hash(value: Any) -> bool:
    return isinstance(value, str) and HASH.fullmatch(value) is not None


def is_name(value: Any) -> bool:
    return isinstance(value, str) and NAME.fullmatch(value) is not None


def brief(value: Any) -> str:
    return short(ascii(value) if isinstance(value, str | int | float) else type(value).__name__, 60)


def shown_hash(value: str) -> str:
    return f"{value[:12]}..." if len(value) == 64 else value
